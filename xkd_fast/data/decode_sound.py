"""Decoding of stored sounds alone by NVIDIA DALI on the CPU, for samples without picture and evaluation of sound alone."""

from __future__ import annotations

import functools
import io
import wave
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from xkd_fast.data.dali import HandFed, reason_of, sound_output
from xkd_fast.data.decode import DecodedClip, DecodeRequest, UndecodableError


class SoundDecoder:
    """Decodes sound alone, as `xkd_fast.data.decode.ClipDecoder` does both.

    Raises:
        UserError: DALI is not installed.
    """

    def __init__(self, batch_size: int, threads: int) -> None:
        self.batch_size, self.threads = batch_size, threads
        self._build()

    def _build(self) -> None:
        self._pipeline = HandFed(lambda: [sound_output()], self.batch_size, self.threads)

    def _run(self, requests: Sequence[DecodeRequest]) -> list[DecodedClip]:
        (waveforms,) = self._pipeline({"audio": [request.audio for request in requests]})
        return [
            DecodedClip(torch.empty(request.frames, 0, 0, 3, dtype=torch.uint8), waveform)
            for request, waveform in zip(requests, waveforms, strict=True)
        ]

    def __call__(self, requests: Sequence[DecodeRequest]) -> list[DecodedClip]:
        """Decode a batch; the frames of its clips have no pixels, [T, 0, 0, 3].

        Raises:
            UndecodableError: naming the places in ``requests`` that DALI cannot decode.
        """
        try:
            return self._run(requests)
        except RuntimeError:
            self._build()  # a failed pipeline makes no promises
        clips, reasons = [], {}
        for place, request in enumerate(requests):
            try:
                clips += self._run([request])
            except RuntimeError as error:
                reasons[place] = reason_of(error)
                self._build()
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
