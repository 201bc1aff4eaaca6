"""State names: ours, the released XKD files', and the way between them, lossless in both directions.

Ours (``M`` is ``video`` or ``audio``, ``N`` a block number)::

    M_student.encoder.{patch_embedding.*, cls_token, position, blocks.N.*, norm.*}     M_teacher.… likewise
    M_student.head.{linear1.*, norm.*, linear2.*, linear3.*, prototypes, prototype_scale}
    M_decoder.{project_in.*, mask_token, position, blocks.N.*, project_out.*}
    M_centre
    blocks.N.{norm1.*, qkv.weight, proj.*, norm2.*, fc1.*, fc2.*}

A block stack shared by both modalities (XKD-MAS, XKD-MATS) appears under both names. The released files hold one encoder
each, without prefix (XKD.md section 11); a full released state has the prefixes ``vid_student.backbone.`` and so on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from xkd_fast.errors import UserError
from xkd_fast.files import replace_with

State = dict[str, Tensor]

_BLOCK = {"norm1": "norm1", "qkv": "attn.qkv", "proj": "attn.proj", "norm2": "norm2", "fc1": "mlp.fc1", "fc2": "mlp.fc2"}
_ENCODER = {"cls_token": "cls_token", "position": "enc_pos_embed", "norm": "encoder_norm"}
_PATCH_EMBEDDING = {"video": "cuboid_embed.proj", "audio": "patch_embed.proj"}
_HEAD = {
    "linear1": ("mlp.0",),
    "norm": ("mlp.1", "mlp.4"),  # one module, stored twice
    "linear2": ("mlp.3",),
    "linear3": ("mlp.6",),
    "prototypes": ("last_layer.weight_v",),
    "prototype_scale": ("last_layer.weight_g",),
}
_DECODER = {"mask_token": "mask_token", "position": "dec_pos_embed", "project_in": "mid_proj", "project_out": "out_proj"}
_CENTRE = {"video_centre": "vt2as_ce_loss.center", "audio_centre": "at2vs_ce_loss.center"}
_SHORT = {"video": "vid", "audio": "aud"}
_LONG = {short: long for long, short in _SHORT.items()}

ENCODER_FILES = ("vid_student", "vid_teacher", "aud_student", "aud_teacher")


def _split(name: str, table: Mapping[str, Any]) -> tuple[str, str] | None:
    """(key of ``table`` that starts ``name`` at a dot, the rest with its dot), or None."""
    for key in table:
        if name == key or name.startswith(key + "."):
            return key, name[len(key) :]
    return None


def _translate_block(name: str, table: Mapping[str, str]) -> str | None:
    number, _, rest = name.partition(".")
    found = _split(rest, table) if number.isdigit() else None
    return f"{number}.{table[found[0]]}{found[1]}" if found else None


def _encoder_to_released(modality: str, name: str) -> str | None:
    if name.startswith("blocks."):
        block = _translate_block(name.removeprefix("blocks."), _BLOCK)
        return f"encoder.blocks.{block}" if block else None
    table = _ENCODER | {"patch_embedding": _PATCH_EMBEDDING[modality]}
    found = _split(name, table)
    return table[found[0]] + found[1] if found else None


def released_names(name: str) -> tuple[str, ...]:
    """The released name or names (a tensor may be stored twice) of one of ours.

    Raises:
        KeyError: if the name is not one of ours.
    """
    if name in _CENTRE:
        return (_CENTRE[name],)
    owner, _, rest = name.partition(".")
    modality, _, role = owner.partition("_")
    short = _SHORT.get(modality)
    translated: tuple[str, ...] = ()
    if short and role in ("student", "teacher"):
        if rest.startswith("encoder."):
            inner = _encoder_to_released(modality, rest.removeprefix("encoder."))
            translated = (f"{short}_{role}.backbone.{inner}",) if inner else ()
        elif rest.startswith("head.") and (found := _split(rest.removeprefix("head."), _HEAD)):
            translated = tuple(f"{short}_{role}.head.{target}{found[1]}" for target in _HEAD[found[0]])
    elif short and role == "decoder":
        if rest.startswith("blocks."):
            block = _translate_block(rest.removeprefix("blocks."), _BLOCK)
            translated = (f"{short}_ae.decoder.blocks.{block}",) if block else ()
        elif found := _split(rest, _DECODER):
            translated = (f"{short}_ae.{_DECODER[found[0]]}{found[1]}",)
    if not translated:
        raise KeyError(f"{name} is not a state name of an XKD model")
    return translated


def our_name(released: str) -> str:
    """Our name of one released name; the inverse of :func:`released_names`.

    Raises:
        KeyError: if the name is not a released one.
    """
    for ours, theirs in _CENTRE.items():
        if released == theirs:
            return ours
    owner, _, rest = released.partition(".")
    short, _, role = owner.partition("_")
    modality = _LONG.get(short)
    blocks = {theirs: ours for ours, theirs in _BLOCK.items()}
    translated: str | None = None
    if modality and role in ("student", "teacher"):
        if rest.startswith("backbone."):
            inner = _encoder_to_ours(modality, rest.removeprefix("backbone."))
            translated = f"encoder.{inner}" if inner else None
        elif rest.startswith("head."):
            table = {theirs: ours for ours, several in _HEAD.items() for theirs in several}
            found = _split(rest.removeprefix("head."), table)
            translated = f"head.{table[found[0]]}{found[1]}" if found else None
    elif modality and role == "ae":
        role = "decoder"
        if rest.startswith("decoder.blocks."):
            block = _translate_block(rest.removeprefix("decoder.blocks."), blocks)
            translated = f"blocks.{block}" if block else None
        else:
            table = {theirs: ours for ours, theirs in _DECODER.items()}
            found = _split(rest, table)
            translated = table[found[0]] + found[1] if found else None
    if translated is None:
        raise KeyError(f"{released} is not a name of a released XKD state")
    return f"{modality}_{role}.{translated}"


def _encoder_to_ours(modality: str, released: str) -> str | None:
    if released.startswith("encoder.blocks."):
        blocks = {theirs: ours for ours, theirs in _BLOCK.items()}
        block = _translate_block(released.removeprefix("encoder.blocks."), blocks)
        return f"blocks.{block}" if block else None
    table = {theirs: ours for ours, theirs in _ENCODER.items()} | {_PATCH_EMBEDDING[modality]: "patch_embedding"}
    found = _split(released, table)
    return table[found[0]] + found[1] if found else None


def to_released(state: Mapping[str, Tensor]) -> State:
    """A state in ours → released names; what they store twice is written twice."""
    return {released: tensor for name, tensor in state.items() for released in released_names(name)}


def from_released(state: Mapping[str, Tensor]) -> State:
    """A state in released names → ours.

    Raises:
        UserError: if a tensor stored twice has two values, or a name is unknown.
    """
    ours: State = {}
    for released, tensor in state.items():
        try:
            name = our_name(released)
        except KeyError as error:
            raise UserError(f"{error.args[0]}; is this an XKD checkpoint?") from None
        if name in ours and not torch.equal(ours[name], tensor):
            raise UserError(f"{released} differs from its duplicate under {released_names(name)[0]}; the file is inconsistent")
        ours[name] = tensor
    return ours


def read_released_encoder(path: str | Path, owner: str) -> State:
    """Read one released encoder file, e.g. ``…vid_student.pth.tar`` with ``owner="vid_student"``, into our names.

    Raises:
        UserError: if the file cannot be read or holds other keys than one encoder's.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds, all of which mean the same to the user
        raise UserError(f"{path} cannot be read as a PyTorch state dict: {error}") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{path} does not hold a flat state dict of tensors, as released encoder files do")
    return from_released({f"{owner}.backbone.{name}": tensor for name, tensor in state.items()})


def write_released_encoder(state: Mapping[str, Tensor], path: str | Path, owner: str) -> None:
    """Write the encoder of ``owner`` (one of :data:`ENCODER_FILES`) from a state in our names as a released file."""
    prefix = f"{owner}.backbone."
    ours = f"{_LONG[owner[:3]]}_{owner[4:]}.encoder."
    encoder = to_released({name: tensor for name, tensor in state.items() if name.startswith(ours)})
    if not encoder:
        raise UserError(f"the state holds no tensor named {ours}…, so {owner} cannot be written")
    contents = {name.removeprefix(prefix): tensor.detach().cpu().clone() for name, tensor in encoder.items()}
    _replace(Path(path), lambda temporary: torch.save(contents, temporary))


def write_safetensors(state: Mapping[str, Tensor], path: str | Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write a state in our names; shared tensors are written under each of their names. Replaces ``path`` in one step."""
    contents = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}
    _replace(Path(path), lambda temporary: save_file(contents, temporary, dict(metadata or {})))


def read_safetensors(path: str | Path) -> State:
    """Read a state written by :func:`write_safetensors`.

    Raises:
        UserError: if the file is missing or not a safetensors file.
    """
    try:
        return load_file(path)
    except Exception as error:  # safetensors raises its own and the system's errors
        raise UserError(f"{path} cannot be read as safetensors: {error}") from error


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_with(path, write)
