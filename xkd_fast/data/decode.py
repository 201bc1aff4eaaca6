"""Decoding of stored samples by NVIDIA DALI on the CPU: only the clip's own frames, and the sound."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xkd_fast.data.packed import PackedError
from xkd_fast.data.video_codecs import CPU_CODECS
from xkd_fast.errors import UserError

if TYPE_CHECKING:
    from xkd_fast.data.unpack import Unpacker

FAILURES = (RuntimeError, PackedError, MemoryError)  # of a batch with a sample that cannot be decoded; or is said to be huge


def require_cpu_codec(codec: str, name: str) -> None:
    """Refuse shards whose video DALI cannot decode on the CPU.

    Raises:
        UserError: naming the codec and what to do.
    """
    if codec not in CPU_CODECS:
        raise UserError(
            f"{name} holds {codec} video, which DALI cannot decode on the CPU (a GPU could, which is not built in yet); "
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

    frames: Tensor  # [T, H, W, 3] uint8, red, green, blue
    waveform: Tensor  # [samples] float32 in [-1, 1], of the whole file


class UndecodableError(Exception):
    """Some requests of a batch cannot be decoded; ``reasons`` maps their places in the batch to DALI's words."""

    def __init__(self, reasons: dict[int, str]) -> None:
        super().__init__("; ".join(f"request {place}: {reason}" for place, reason in reasons.items()))
        self.reasons = reasons


def reason_of(error: BaseException) -> str:
    """What DALI says was wrong, without where its operator stands."""
    # DALI's message ends with the cause after this word; the rest is where the operator stands in our source
    text = str(error).rsplit("encountered:", 1)[-1].strip()
    return " ".join(text.split("C++ context")[0].split())[:300]


def require_dali() -> None:
    """Make sure that DALI is there, best before hours go into data.

    Raises:
        UserError: saying what to install.
    """
    try:
        importlib.import_module("nvidia.dali.pipeline")
    except ImportError as error:
        raise UserError(
            "NVIDIA DALI, which decodes the shards, is not installed; install xkd-fast[cuda13] (on a machine without a GPU "
            f"too) or xkd-fast[cuda12] ({error})"
        ) from error


class ClipDecoder:
    """A DALI pipeline fed by hand, batch by batch, of any size up to ``batch_size``.

    It runs when called, in the caller's thread (other Python threads go on meanwhile), so nothing is in flight between calls.

    Args:
        batch_size: requests of a call, at most.
        threads: that decode.
        codec: of all videos, one of `CPU_CODECS`.

    Raises:
        UserError: DALI is not installed, or cannot decode the codec on the CPU.
    """

    def __init__(self, batch_size: int, threads: int, codec: str = "mjpeg") -> None:
        require_cpu_codec(codec, "the request")
        self.batch_size = batch_size
        self.threads = threads
        self.codec = codec
        self._build()

    def _build(self) -> None:
        require_dali()
        from xkd_fast.data.unpack import MosaicUnpacker, YuvUnpacker

        self._unpack: Unpacker | None = None
        if self.codec == "mosaic":
            self._unpack = MosaicUnpacker(self.batch_size, self.threads)
        elif self.codec == "yuv":
            self._unpack = YuvUnpacker(self.threads)
        self._pipeline = self._build_pipeline()

    def _build_pipeline(self) -> Any:
        """Sound, and frames where they come as a video stream."""
        from nvidia.dali import fn, types
        from nvidia.dali.pipeline import Pipeline

        pipeline = Pipeline(
            batch_size=self.batch_size, num_threads=self.threads, device_id=None, prefetch_queue_depth=1, exec_dynamic=True
        )
        with pipeline:
            audio = fn.external_source(name="audio", ndim=1, dtype=types.DALIDataType.UINT8)
            waveform, _ = fn.decoders.audio(audio, downmix=True, dtype=types.DALIDataType.FLOAT)
            outputs = [waveform]
            if self._unpack is None:
                video = fn.external_source(name="video", ndim=1, dtype=types.DALIDataType.UINT8)
                start = fn.external_source(name="start", ndim=0, dtype=types.DALIDataType.INT32)
                count = fn.external_source(name="frames", ndim=0, dtype=types.DALIDataType.INT32)
                outputs.append(fn.decoders.video(video, start_frame=start, sequence_length=count, pad_mode="none"))
            pipeline.set_outputs(*outputs)
        pipeline.build()
        return pipeline

    def _run(self, requests: Sequence[DecodeRequest]) -> list[DecodedClip]:
        feed = self._pipeline.feed_input
        # DLPack shares DALI's memory, without a copy, and keeps it until the tensor is gone
        if self._unpack is not None:
            videos = self._unpack(requests)
            feed("audio", [request.audio for request in requests])
            (waveforms,) = self._pipeline.run()
        else:
            feed("audio", [request.audio for request in requests])
            feed("video", [request.video for request in requests])
            feed("start", [np.array(request.start, np.int32) for request in requests])
            feed("frames", [np.array(request.frames, np.int32) for request in requests])
            waveforms, streams = self._pipeline.run()
            videos = [torch.from_dlpack(streams[place]) for place in range(len(requests))]
        return [DecodedClip(frames, torch.from_dlpack(waveforms[place])) for place, frames in enumerate(videos)]

    def __call__(self, requests: Sequence[DecodeRequest]) -> list[DecodedClip]:
        """Decode a batch.

        Raises:
            UndecodableError: naming the places in ``requests`` that DALI cannot decode, or of which it gives too few frames.
            UserError: DALI refuses the batch but each request of it alone passes.
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
        if reasons:
            return UndecodableError(reasons)
        keys = ", ".join(request.key for request in requests)
        return UserError(f"DALI could not decode the batch of {keys}, though each sample alone passes: {reason_of(error)}")
