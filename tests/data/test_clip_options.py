"""What a clip is: sizes that cannot fit together are refused, by the key to change."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tests.data.clip_shards import (
    DATA,
    MEL,
    MODEL,
)
from xkd_fast.data.clip_options import ClipOptions, check_against_model
from xkd_fast.data.log_mel import MelOptions
from xkd_fast.model.options import ModelOptions


def model(**changed: Any) -> ModelOptions:
    return replace(MODEL, **{name: replace(getattr(MODEL, name), **fields) for name, fields in changed.items()})


@pytest.mark.parametrize(
    ("data", "mel", "options", "message"),
    [
        (
            {"clip_seconds": 2.0},
            {},
            MODEL,
            r"data.fps × data.clip_seconds = 8 × 2 = 16 .* model.video.frames = 8.*clip_seconds to 1",
        ),
        (
            {},
            {"hop": 300},
            MODEL,
            r"data.clip_seconds gives 16000 .* 54 .* mel.hop = 300.*model.audio.frames = 64.* at most 253",
        ),
        ({"local_audio_seconds": 0.1}, {}, MODEL, r"data.local_audio_seconds gives 1600 samples, 7 .*local_frames = 16"),
        (
            {"local_audio_seconds": 0.1},
            {"n_fft": 4096},
            model(audio={"local_frames": 4, "patch_frames": 4}),
            r"mel.n_fft / 2 = 2048",
        ),
        ({}, {"f_max": 9000.0}, MODEL, r"mel.f_max = 9000 Hz must be at most half of data.sample_rate = 16000"),
        ({}, {}, model(video={"channels": 1}), r"model.video.channels = 1 must be 3"),
    ],
)
def test_sizes_that_do_not_fit_together(data: dict[str, Any], mel: dict[str, Any], options: ModelOptions, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_against_model(replace(DATA, **data), replace(MEL, **mel), options)


@pytest.mark.parametrize(
    ("field", "value"), [("fps", 0.0), ("clip_seconds", -1.0), ("threads", 0), ("prefetch", 0), ("local_audio_seconds", 2.0)]
)
def test_bad_data_options_name_the_key(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"data\.{field} = {value}"):
        replace(DATA, **{field: value})


def test_the_released_sizes_fit() -> None:
    # a rule that refuses the recipe itself: 448 and 112 frames of 64 000 and 16 000 samples at hop 143
    check_against_model(ClipOptions(), MelOptions(), ModelOptions())
