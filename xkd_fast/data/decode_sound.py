"""Decoding of stored sounds alone by NVIDIA DALI on the CPU, for samples without picture and evaluation of sound alone."""

from __future__ import annotations

import functools
import io
import wave
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from xkd_fast.data.decode import DecodedClip, DecodeRequest, UndecodableError, reason_of, require_dali


class SoundDecoder:
    """A DALI pipeline of sound alone, fed by hand as `xkd_fast.data.decode.ClipDecoder` is.

    Raises:
        UserError: DALI is not installed.
    """

    def __init__(self, batch_size: int, threads: int) -> None:
        self.batch_size, self.threads = batch_size, threads
        self._pipeline = self._build()

    def _build(self) -> Any:
        require_dali()
        from nvidia.dali import fn, types
        from nvidia.dali.pipeline import Pipeline

        pipeline = Pipeline(
            batch_size=self.batch_size, num_threads=self.threads, device_id=None, prefetch_queue_depth=1, exec_dynamic=True
        )
        with pipeline:
            audio = fn.external_source(name="audio", ndim=1, dtype=types.DALIDataType.UINT8)
            waveform, _ = fn.decoders.audio(audio, downmix=True, dtype=types.DALIDataType.FLOAT)
            pipeline.set_outputs(waveform)
        pipeline.build()
        return pipeline

    def _run(self, requests: Sequence[DecodeRequest]) -> list[DecodedClip]:
        self._pipeline.feed_input("audio", [request.audio for request in requests])
        (waveforms,) = self._pipeline.run()
        return [
            DecodedClip(torch.empty(request.frames, 0, 0, 3, dtype=torch.uint8), torch.from_dlpack(waveforms[place]))
            for place, request in enumerate(requests)
        ]

    def __call__(self, requests: Sequence[DecodeRequest]) -> list[DecodedClip]:
        """Decode a batch; the frames of its clips have no pixels, [T, 0, 0, 3].

        Raises:
            UndecodableError: naming the places in ``requests`` that DALI cannot decode.
        """
        try:
            return self._run(requests)
        except RuntimeError:
            self._pipeline = self._build()  # a failed pipeline makes no promises
        clips, reasons = [], {}
        for place, request in enumerate(requests):
            try:
                clips += self._run([request])
            except RuntimeError as error:
                reasons[place] = reason_of(error)
                self._pipeline = self._build()
        if reasons:
            raise UndecodableError(reasons)
        return clips


@functools.cache
def placeholder_sound() -> NDArray[np.uint8]:
    """A WAV file of a few samples, for decoders that take picture and sound together where the sound is not wanted."""
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16000)
        file.writeframes(bytes(128))
    return np.frombuffer(buffer.getvalue(), np.uint8)
