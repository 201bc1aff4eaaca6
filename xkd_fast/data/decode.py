"""Decoding of stored samples by NVIDIA DALI: only the clip's own frames, on the CPU or by a GPU's engines, and the sound."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from xkd_fast.data.dali import CPU, HandFed, encoded_input, number_input, numbers, placed, reason_of, sound_output
from xkd_fast.data.packed import PackedError
from xkd_fast.data.video_codecs import CODECS, CPU_CODECS
from xkd_fast.errors import UserError

if TYPE_CHECKING:
    import torch

    from xkd_fast.data.unpack import Unpacker

FAILURES = (RuntimeError, PackedError, MemoryError)  # of a batch with a sample that cannot be decoded; or is said to be huge
ENGINE_SHARE = 0.65  # of JPEGs that a GPU's engine decodes, the rest its other cores: DALI's default


def require_cpu_codec(codec: str, name: str) -> None:
    """Refuse video that DALI cannot decode on the CPU.

    Raises:
        UserError: naming the codec and what to do.
    """
    if codec not in CPU_CODECS:
        raise UserError(
            f"{name} holds {codec} video, which DALI cannot decode on the CPU; decode it on a GPU (data.decode=gpu), or "
            f"prepare the shards with --codec {CPU_CODECS[0]} (or {', '.join(CPU_CODECS[1:])})"
        )


@dataclass(frozen=True)
class DecodeRequest:
    """What to decode of one stored sample."""

    key: str
    video: NDArray[np.uint8]  # the encoded file's bytes
    audio: NDArray[np.uint8]  # the encoded file's bytes
    start: int  # first frame
    frames: int  # number of frames


@dataclass(frozen=True)
class DecodedClip:
    """Frames and sound of one request."""

    frames: Tensor  # [T, H, W, 3] uint8, red, green, blue; where they were decoded
    waveform: Tensor  # [samples] float32 in [-1, 1], of the whole file, in the host's memory
    kept: Sequence[Tensor] = ()  # what the frames are made of, where a GPU may still be at it


class UndecodableError(Exception):
    """Some requests of a batch cannot be decoded; ``reasons`` maps their places in the batch to DALI's words."""

    def __init__(self, reasons: dict[int, str]) -> None:
        super().__init__("; ".join(f"request {place}: {reason}" for place, reason in reasons.items()))
        self.reasons = reasons


class ClipDecoder:
    """Decodes batches of any size up to ``batch_size``, when called, in the caller's thread; see `HandFed`.

    The same on every device, but for who decodes: FFmpeg and libjpeg-turbo on a CPU; on a GPU NVDEC and nvJPEG.

    Args:
        batch_size: requests of a call, at most.
        threads: that decode.
        codec: of all videos.
        device: where pictures are decoded; their frames stay there.
        engine_share: of JPEGs, 0-1, that go to a GPU's JPEG engine where it has one.

    Raises:
        UserError: DALI is not installed, or cannot decode the codec on the CPU.
    """

    def __init__(
        self,
        batch_size: int,
        threads: int,
        codec: str = "mjpeg",
        device: torch.device = CPU,
        engine_share: float = ENGINE_SHARE,
    ) -> None:
        if device.type == "cpu":
            require_cpu_codec(codec, "the request")
        self.batch_size = batch_size
        self.threads = threads
        self.codec = codec
        self.device = device
        self.engine_share = engine_share
        self._build()

    def _build(self) -> None:
        from xkd_fast.data.unpack import JpegUnpacker, YuvUnpacker

        self._unpack: Unpacker | None = None
        if CODECS[self.codec].engine == "nvJPEG":
            self._unpack = JpegUnpacker(self.batch_size, self.threads, self.codec, self.device, self.engine_share)
        elif self.codec == "yuv":
            self._unpack = YuvUnpacker(self.threads)
        self._pipeline = HandFed(self._outputs, self.batch_size, self.threads, self.device)

    def _outputs(self) -> list[Any]:
        """Sound, and frames where they come as a video stream."""
        from nvidia.dali import fn

        if self._unpack is not None:
            return [sound_output()]
        part = {"start_frame": number_input("start"), "sequence_length": number_input("frames"), "pad_mode": "none"}
        return [sound_output(), fn.decoders.video(encoded_input("video"), **part, **placed(self.device))]

    def _run(self, requests: Sequence[DecodeRequest]) -> list[DecodedClip]:
        inputs: dict[str, list[NDArray[Any]]] = {"audio": [request.audio for request in requests]}
        kept: list[Tensor] = []
        if self._unpack is not None:
            videos, kept = self._unpack(requests)
            (waveforms,) = self._pipeline(inputs)
        else:
            inputs["video"] = [request.video for request in requests]
            inputs["start"] = [*numbers([request.start for request in requests])]
            inputs["frames"] = [*numbers([request.frames for request in requests])]
            waveforms, videos = self._pipeline(inputs)
        return [DecodedClip(frames, waveform, kept) for frames, waveform in zip(videos, waveforms, strict=True)]

    def __call__(self, requests: Sequence[DecodeRequest]) -> list[DecodedClip]:
        """Decode a batch.

        Raises:
            UndecodableError: naming the places in ``requests`` that DALI cannot decode, or of which it gives too few frames.
            UserError: DALI refuses the batch but each request of it alone passes; or a GPU refuses all of them, which is not
                the samples' fault.
        """
        try:
            clips = self._run(requests)
        except FAILURES as error:
            self._build()  # a failed pipeline makes no promises
            raise self._blame(requests, error) from error
        short = {
            place: f"{len(clip.frames)} frames from frame {request.start} on, where the index promises {request.frames}"
            for place, (request, clip) in enumerate(zip(requests, clips, strict=True))
            if len(clip.frames) != request.frames
        }
        if short:
            raise UndecodableError(short)
        return clips

    def _blame(self, requests: Sequence[DecodeRequest], error: Exception) -> Exception:
        # one bad stream fails the whole batch: find out which
        reasons: dict[int, str] = {}
        for place, request in enumerate(requests):
            try:
                self._run([request])
            except FAILURES as own:
                reasons[place] = reason_of(own)
                self._build()
        return blame([request.key for request in requests], reasons, reason_of(error), self.device)


def blame(keys: Sequence[str], reasons: dict[int, str], reason: str, device: torch.device) -> Exception:
    """What is to be raised for a batch that failed: its samples' damage, or what no other sample would mend.

    Args:
        keys: of the samples of the batch.
        reasons: why samples fail alone, by their places.
        reason: why the batch failed.
        device: that decodes.
    """
    remedy = "lower data.threads, data.prefetch or train.micro_batch, or decode with data.decode=cpu"
    if device.type == "cuda" and len(reasons) == len(keys) > 1:
        return UserError(f"{device} decodes none of {len(keys)} samples ({reason}); if its memory is full, {remedy}")
    if reasons:
        return UndecodableError(reasons)
    full = f"; if the memory of {device} is full, {remedy}" if device.type == "cuda" else ""
    return UserError(f"DALI could not decode the batch of {', '.join(keys)}, though each sample alone passes: {reason}{full}")
