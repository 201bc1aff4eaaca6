"""Where pictures are decoded: by a GPU's engines, NVDEC and nvJPEG, or on the CPU; chosen once, with the reason kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from xkd_fast.data.dali import CPU, reason_of
from xkd_fast.data.decode import FAILURES, ClipDecoder, UndecodableError
from xkd_fast.data.fetch import encoded_request
from xkd_fast.data.shards import CorruptSampleError, ShardSet
from xkd_fast.data.video_codecs import CODECS, CPU_CODECS
from xkd_fast.errors import UserError

PROBED = 3  # samples, of which one must pass


@dataclass(frozen=True)
class DecodeChoice:
    """Who decodes, and why."""

    device: torch.device
    reason: str


def choose(
    asked: Literal["auto", "cpu", "gpu"],
    codec: str,
    device: torch.device,
    obstacle: Callable[[torch.device], str | None],
    name: str = "the data set",
) -> DecodeChoice:
    """Who decodes pictures of ``codec`` for a model on ``device``.

    Args:
        asked: the option.
        codec: of all videos.
        device: where the model is.
        obstacle: tries to decode on a GPU; says in words what keeps it from that, or None.
        name: of the shards, for messages.

    Raises:
        UserError: what was asked for, or all there is, cannot run; it says what can.
    """
    on_cpu, engine = codec in CPU_CODECS, CODECS[codec].engine
    reason = "as data.decode says"
    if asked != "cpu":
        hindered = _hindered(codec, device, obstacle)
        if hindered is None:
            return DecodeChoice(device, f"{engine} takes {codec}" if asked == "auto" else reason)
        if asked == "gpu":
            instead = "set data.decode=auto or cpu" if on_cpu else f"prepare the shards with --codec {CPU_CODECS[0]}"
            raise UserError(f"data.decode = gpu cannot be done for {name}: {hindered}; {instead}")
        reason = hindered
    if on_cpu:
        return DecodeChoice(CPU, reason)
    raise UserError(
        f"{name} holds {codec} video, which DALI cannot decode on the CPU, and a GPU does not: {reason}; train on a GPU, or "
        f"prepare the shards with --codec {CPU_CODECS[0]} (or {', '.join(CPU_CODECS[1:])})"
    )


def _hindered(codec: str, device: torch.device, obstacle: Callable[[torch.device], str | None]) -> str | None:
    if device.type != "cuda":
        return f"the model is on the {device.type.upper()}" if torch.cuda.is_available() else "PyTorch finds no GPU"
    if CODECS[codec].engine is None:
        return f"{codec} is not compressed, so there is nothing for a GPU's engines to decode"
    return obstacle(device)


def decoding_obstacle(shards: ShardSet, device: torch.device) -> str | None:
    """What keeps samples of a set from being decoded on ``device``, in words; None where one of the first few is decoded."""
    found = "no sample has a picture"
    for sample in shards.has_video.nonzero()[0][:PROBED].tolist():
        try:
            request = encoded_request(shards, sample, 0, min(2, int(shards.frames[sample])))
        except CorruptSampleError as error:
            found = str(error)
            continue
        try:
            ClipDecoder(1, 1, shards.codec, device)([request])
            return None
        except UndecodableError as error:
            found = f"DALI cannot decode {shards.codec} there: {error.reasons[0]}"
        except FAILURES as error:
            found = f"DALI cannot decode {shards.codec} there: {reason_of(error)}"
    return found
