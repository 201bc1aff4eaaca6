"""The log-mel front end against the released model's own numbers, and against definitions written out."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from xkd_fast.data.log_mel import LogMel, MelOptions, hz_to_mel, mel_filterbank, mel_to_hz

GOLDEN = Path(__file__).parent.parent / "golden" / "log_mel.safetensors"
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-5}


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return load_file(GOLDEN)


def error(ours: Tensor, theirs: Tensor) -> float:
    """max|x − y| / max|y|."""
    return ((ours.double() - theirs.double()).abs().max() / theirs.double().abs().max()).item()


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_filterbank_is_the_released_one(golden: dict[str, Tensor], dtype: torch.dtype) -> None:
    # a filterbank on the HTK scale, or without area normalisation, is off by tens of per cent
    ours = mel_filterbank(MelOptions(), 80, 16000).to(dtype)
    assert error(ours, golden["mel_filterbank"]) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("view", ["global", "local"])
def test_log_mel_is_the_released_one(golden: dict[str, Tensor], view: str, dtype: torch.dtype) -> None:
    # window (symmetric for periodic), padding, power, floor or normalisation wrong
    ours = LogMel(MelOptions(), 80, 16000, dtype=dtype)(golden[f"{view}.waveform"][None])
    assert ours.dtype == dtype
    assert ours.shape[1:] == golden[f"{view}.log_mel"].shape
    assert error(ours[0], golden[f"{view}.log_mel"]) < TOLERANCE[dtype]


def test_one_frame_by_the_definition() -> None:
    # an independent statement, with an explicit Fourier sum, of a frame at the reflected edge and one inside
    options = MelOptions(n_fft=64, hop=20, f_min=100.0, f_max=3000.0, mean=-2.0, std=3.0)
    wave = np.random.default_rng(0).normal(size=200)
    bank = mel_filterbank(options, 6, 8000).numpy()
    ours = LogMel(options, 6, 8000, dtype=torch.float64)(torch.from_numpy(wave)[None])[0].numpy()
    assert ours.shape == (6, 200 // 20 + 1)
    window = [0.5 - 0.5 * math.cos(2 * math.pi * n / 64) for n in range(64)]
    for frame in (0, 4, 10):
        power = []
        for k in range(33):
            real = imaginary = 0.0
            for n in range(64):
                place = abs(frame * 20 + n - 32)
                place = place if place < 200 else 2 * 199 - place
                real += window[n] * wave[place] * math.cos(2 * math.pi * k * n / 64)
                imaginary -= window[n] * wave[place] * math.sin(2 * math.pi * k * n / 64)
            power.append(real**2 + imaginary**2)
        expected = (np.log(bank @ np.array(power) + np.finfo(np.float32).eps) + 2.0) / 3.0
        np.testing.assert_allclose(ours[:, frame], expected, rtol=1e-10)


def test_first_frames_only() -> None:
    # the model's spectrogram is cut from the start, not stretched and not from the middle
    wave = torch.randn(2, 4000, generator=torch.Generator().manual_seed(0))
    front_end = LogMel(MelOptions(hop=100, n_fft=256), 16, 16000)
    assert torch.equal(front_end(wave, 30), front_end(wave)[..., :30])


def test_silence_is_the_floor() -> None:
    # the floor of a float64 front end is float32's epsilon too
    for dtype in TOLERANCE:
        quiet = LogMel(MelOptions(), 80, 16000, dtype=dtype)(torch.zeros(1, 2000))
        assert quiet.amax().item() == pytest.approx((math.log(2.0**-23) + 5.3688107) / 4.410007, rel=1e-6)
        assert quiet.amax() == quiet.amin()


def test_mel_scale() -> None:
    # Slaney: 200/3 Hz per mel up to 1 kHz, then 27 mels per factor 6.4
    hz = torch.tensor([0.0, 200.0 / 3, 1000.0, 6400.0], dtype=torch.float64)
    torch.testing.assert_close(hz_to_mel(hz), torch.tensor([0.0, 1.0, 15.0, 42.0], dtype=torch.float64))
    ramp = torch.linspace(0, 8000, 101, dtype=torch.float64)
    torch.testing.assert_close(mel_to_hz(hz_to_mel(ramp)), ramp)


def test_triangle_without_a_bin_is_refused() -> None:
    # such a mel bin would be constant: log(eps) in every frame
    with pytest.raises(ValueError, match=r"model.audio.mel_bins = 128 .* mel.n_fft = 256"):
        mel_filterbank(MelOptions(n_fft=256), 128, 16000)


@pytest.mark.parametrize(("field", "value"), [("n_fft", 1023), ("hop", 0), ("f_min", -1.0), ("f_max", 0.0), ("std", 0.0)])
def test_bad_options_name_the_key(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"mel\.{field} = {value}"):
        MelOptions(**{field: value})
