"""The fast model with one technique left out, or one added: what each is worth, in time and in memory.

A technique that is left out is computed the reference's way, at the same place, to the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.contestants import Fast, clip_in_a_loop, fast_with
from xkd_fast import reference
from xkd_fast.data.views import MaskNoise, Views
from xkd_fast.engine.updates import Torch
from xkd_fast.model import autoencoder, vit, xkd
from xkd_fast.model.head import directions
from xkd_fast.model.options import ModelOptions
from xkd_fast.model.packing import Group, added, heads_of, pack, unpack
from xkd_fast.model.products import linear
from xkd_fast.model.switches import SWITCHES
from xkd_fast.model.tokens import embed
from xkd_fast.objective.losses import Distilled, Losses
from xkd_fast.reference import MODALITIES, Decoder, Network
from xkd_kernels.unit_rows import EPS

Functions = tuple[tuple[Any, str, Callable[..., Any]], ...]
"""(module, name, what it is replaced by)"""


@contextmanager
def replaced(functions: Functions) -> Iterator[None]:
    """Call others in place of some functions."""
    with ExitStack() as stack:
        for module, name, function in functions:
            stack.enter_context(patch.object(module, name, function))
        yield


class Altered(Fast):
    """A fast model of another class, with functions that its forward pass calls replaced.

    Attributes:
        changes: options that differ.
        model_class: of the model.
        functions: what its forward pass calls others in place of.
    """

    changes: Mapping[str, Any] = {}
    model_class: type[xkd.XKD] = xkd.XKD
    functions: Functions = ()

    def build(self, options: ModelOptions) -> reference.XKD:
        """The fast model, changed."""
        functions = self.functions

        class Patched(self.model_class):  # type: ignore[name-defined, misc]
            def forward(self, views: Views, masks: MaskNoise | None = None) -> Losses:
                with replaced(functions):
                    return super().forward(views, masks)

        model = super().build(replace(options, **self.changes))
        model.__class__ = Patched
        return model


def altered(name: str, **attributes: Any) -> type[Altered]:
    """A contestant."""
    return type("AlteredFast", (Altered,), {"name": name, **attributes})


# ----------------------------------------------------------------------------------------------------- one technique left out


class ViewByView(xkd.XKD):
    """Every view of every modality passes the blocks by itself."""

    def encode_students(self, clips: dict[str, list[Tensor]], order: dict[str, Tensor]) -> dict[str, list[Tensor]]:
        encoded: dict[str, list[Tensor]] = {}
        for m in MODALITIES:
            encoder, visible = self.student(m).encoder, order[m][:, : self.keep(m)]
            encoded[m] = []
            for tokens in embed(encoder, clips[m], visible=visible, kernels=self.options.kernels):
                x, groups = pack([tokens])
                x = added(*self.runner.blocks(encoder.blocks, x, groups))  # type: ignore[arg-type]
                encoded[m] += unpack(encoder.norm(x), groups)
        return encoded


def embed_everything(encoder: reference.Encoder, clips: Any, visible: Tensor | None, *, kernels: str) -> list[Tensor]:
    """All tokens of the first clip are embedded, and the visible ones taken then."""
    embedded = embed(encoder, clips, visible=None, kernels=kernels)
    if visible is not None:
        first = int(encoder.has_cls)
        places = torch.cat([visible.new_zeros(len(visible), first), visible + first], dim=1)
        embedded[0] = embedded[0].gather(1, places.unsqueeze(-1).expand(-1, -1, embedded[0].shape[-1]))
    return embedded


def predict_everything(decoder: Decoder, tokens: Tensor, masked: int, attend: Any, kernels: str) -> Tensor:
    """The decoder's last block and projection of all tokens, of which the masked are taken then."""
    block, batch, length = decoder.blocks[-1], *tokens.shape[:2]

    def mix(qkv: Tensor, groups: Any, heads: int) -> Tensor:
        q, k, v = heads_of(qkv.view(batch, length, -1), heads)
        return attend(q, k, v).flatten(0, 1)

    whole = added(*vit.run_block(block, tokens.flatten(0, 1), None, [Group(batch, length)], mix, kernels))  # type: ignore[arg-type]
    return decoder.project_out(whole.view(batch, length, -1))[:, length - masked :]


class CastsAtUse(xkd.XKD):
    """The teachers' weights are cast wherever they are used."""

    def teachers_for(self, device: torch.device) -> dict[str, Network]:
        return {m: self.teacher(m) for m in MODALITIES}


def whole_matrix(qkv: Tensor, groups: Any, heads: int, kernels: str, *, has_cls: bool) -> list[Tensor]:
    """The teachers' last attention with its matrix in memory."""
    found = []
    for part in unpack(qkv, groups):
        q, k, _ = heads_of(part, heads)
        matrix = ((q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5).softmax(dim=-1)
        found.append(matrix[:, :, 0, 1:] if has_cls else matrix.mean(dim=2))
    return found


def kept_norm(x: Tensor, branch: Tensor | None, norm: nn.LayerNorm, linear: nn.Linear, kernels: str) -> tuple[Tensor, Tensor]:
    """What is normalised is kept for the backward pass."""
    total = added(x, branch)
    return total, linear(norm(total))


def kept_gelu(
    x: Tensor, branch: Tensor | None, norm: nn.LayerNorm, fc1: nn.Linear, fc2: nn.Linear, kernels: str
) -> tuple[Tensor, Tensor]:
    """What GELU gives is kept for the backward pass."""
    x, h = kept_norm(x, branch, norm, fc1, kernels)
    return x, fc2(F.gelu(h))


KEPT = tuple(
    (module, name, function)
    for module in (vit, autoencoder)
    for name, function in (("residual_norm_linear", kept_norm), ("mlp", kept_gelu))
)


class PlainDistillation(xkd.XKD):
    """Distillation by the reference's code."""

    def distil(self, source: str, teacher: Tensor, student: Tensor) -> Distilled:
        return reference.XKD.distil(self, source, teacher, student)


class PlainAlignment(xkd.XKD):
    """Alignment by the reference's code."""

    def align(self, video: Tensor, audio: Tensor) -> Tensor:
        return reference.XKD.align(self, video, audio)


class PlainReconstruction(xkd.XKD):
    """Targets are gathered and normalised first, then compared."""

    def masked_objectives(
        self, clips: Any, predicted: Any, order: dict[str, Tensor], student: Any, teacher: Any, weights: Any
    ) -> Losses:
        patch_of = {"video": self.options.video.patch, "audio": self.options.audio.patch}
        recon = {}
        for m in MODALITIES:
            masked = order[m][:, self.keep(m) :]
            clip = reference.normalised_pixels(clips[m][0], self.options.video, axis=1) if m == "video" else clips[m][0]
            patches = reference.patchify(clip, patch_of[m])
            targets = patches.gather(1, masked.unsqueeze(-1).expand(-1, -1, patches.shape[-1]))
            recon[m] = reference.patch_error(predicted[m], targets)
        return self.combine(recon, student, teacher, weights)


class PlainObjectives(PlainReconstruction, PlainDistillation, PlainAlignment):
    """All three."""


def plain_refine(tokens: Tensor, own: Tensor, other: Tensor, mode: str, *, backend: str) -> tuple[Tensor, Tensor]:
    """With all outer products, and every token weighted before their mean is taken."""
    weights = reference.refinement_weights(own, other, mode)
    return reference.refine(tokens, weights).mean(dim=1), weights


def plain_head(head: reference.Head, pooled: Tensor, kernels: str) -> Tensor:
    """The head as a module."""
    return head(pooled)  # type: ignore[no-any-return]


def prototypes_as_they_are(head: reference.Head, pooled: Tensor, kernels: str) -> Tensor:
    """The head with logits divided by the prototypes' lengths, in place of prototypes: no normalised weight is written."""
    x = directions(head, pooled, kernels)
    lengths = torch.linalg.vector_norm(head.prototypes, dim=1, keepdim=True).clamp_min(EPS)
    logits = reference.wide(linear(x, head.prototypes, None)) * (head.prototype_scale / lengths).T
    return F.layer_norm(logits, (len(head.prototypes),), eps=reference.LAYER_NORM_EPS)


class PlainUpdate(Altered):
    """Norms, AdamW, teachers and their copies by PyTorch's operators alone, as the strong yardstick has them."""

    name = "the optimiser's operator"
    update = Torch

    def __init__(self, options: ModelOptions, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(options, device, dtype)
        self.local.optimizer.backend = self.local.teachers.backend = "torch"


class WaitsToClip(Altered):
    """Gradients are clipped one by one, each of which waits for the device."""

    name = "clipping that waits for nothing"

    def __init__(self, options: ModelOptions, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(options, device, dtype)
        self.local.optimizer.clip_norm = None

    def clip(self) -> None:
        """The released loop."""
        clip_in_a_loop(self.model)


HEAD: Functions = ((xkd, "project", plain_head),)
REFINEMENT: Functions = ((xkd, "refine", plain_refine),)
PLAIN: Functions = (*HEAD, *REFINEMENT)


WITHOUT: dict[str, type[Altered]] = {
    each.name: each
    for each in (
        altered("one packed pass per modality", model_class=ViewByView),
        altered("gathering before embedding", functions=((xkd, "embed", embed_everything),)),
        altered("the decoders' ends at masked tokens alone", functions=((autoencoder, "predict_masked", predict_everything),)),
        altered("fused attention", changes={"attention": "eager"}),
        altered("one row of the teachers' attention", functions=((vit, "packed_patch_probabilities", whole_matrix),)),
        altered("the teachers' weights cast once", model_class=CastsAtUse),
        altered("recomputed norms and GELU", functions=KEPT),
        altered("targets inside the loss of masked patches", model_class=PlainReconstruction),
        altered("distillation in one pass", model_class=PlainDistillation),
        altered("alignment without a matrix of all pairs", model_class=PlainAlignment),
        altered("refinement in closed form", functions=REFINEMENT),
        altered("heads normalised in one pass", functions=HEAD),
        altered("heads, refinement and losses, all of these", model_class=PlainObjectives, functions=PLAIN),
        PlainUpdate,
        WaitsToClip,
    )
}


FP8 = "teachers in FP8"


def added_techniques(device: torch.device, precision: str) -> dict[str, type[Fast]]:
    """What is off by default, by name."""
    found: list[type[Fast]] = [
        altered("checkpointing", changes={"checkpointing": True}),
        altered("prototypes normalised behind their product", functions=((xkd, "project", prototypes_as_they_are),)),
        fast_with("compile"),
    ]
    if precision == "bfloat16":
        found.append(altered(FP8, changes={"teacher_precision": "fp8"}))
    if device.type == "cuda":
        found += [
            altered("our attention", changes={"attention": "triton"}),
            altered("our other kernels", changes={"kernels": "triton"}),
            altered("all our kernels", changes={"kernels": "triton", "attention": "triton"}),
        ]
        if precision == "bfloat16":
            both = {"kernels": "triton", "attention": "triton", "teacher_precision": "fp8"}
            found.append(altered(f"all our kernels, {FP8}", changes=both))
        found += [fast_with("teacher_stream"), fast_with("cuda_graph"), fast_with("teacher_stream", "cuda_graph")]
        found.append(fast_with(*SWITCHES))
        everything = {"kernels": "triton", "attention": "triton", **dict.fromkeys(SWITCHES, True)}
        found.append(altered(" + ".join(("all our kernels", *SWITCHES)), changes=everything))
    return {kind.name: kind for kind in found}
