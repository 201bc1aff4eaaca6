"""The shipped configurations: the recipes' numbers, written out, and runnable as they are."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest

from tests.config.known import options_of
from xkd_fast.config import (
    load_config,
    shipped_configs,
)
from xkd_fast.yaml_text import parse_yaml

K400 = ("xkd_base_k400", "mas_base_k400", "mats_base_k400", "xkd_large_k400")

# XKD.md sections 2 to 9, stated here a second time and by hand.
RECIPE = {
    "data.fps": 8,
    "data.clip_seconds": 4,
    "data.sample_rate": 16000,
    "data.local_audio_seconds": 1,
    "model.teacher_view": "global",
    "model.refinement": "mean",
    "model.cls_token": True,
    "model.mlp_ratio": 4,
    "model.video.frames": 32,
    "model.video.size": 112,
    "model.video.channels": 3,
    "model.video.patch_frames": 4,
    "model.video.patch_size": 16,
    "model.video.mask_ratio": 0.85,
    "model.video.local_frames": 8,
    "model.video.local_size": int(112 / 1.16),
    "model.audio.mel_bins": 80,
    "model.audio.frames": 448,
    "model.audio.patch_bins": 4,
    "model.audio.patch_frames": 16,
    "model.audio.mask_ratio": 0.8,
    "model.audio.local_views": 1,
    "model.audio.local_frames": 112,
    "model.head.hidden": 2048,
    "model.head.bottleneck": 256,
    "model.head.prototypes": 8192,
    "model.objective.reconstruction_weight": 5,
    "model.objective.distillation_weight": 1,
    "model.objective.alignment_weight": 1,
    "model.objective.student_temperature": 0.1,
    "model.objective.centre_momentum": 0.9,
    "model.objective.mmd_gammas": (0.001, 0.01, 0.1, 1, 10, 100, 1000),
    "model.objective.mmd_scope": "rank",
    "augment.short_side_first": True,
    "augment.video_global.crop_area": (0.2, 1),
    "augment.video_global.crop_aspect": (3 / 4, 4 / 3),
    "augment.video_global.flip": 0.5,
    "augment.video_global.brightness": 0.4,
    "augment.video_global.contrast": 0.4,
    "augment.video_global.saturation": 0.4,
    "augment.video_global.hue": 0.2,
    "augment.video_global.greyscale": 0,
    "augment.video_global.blur": 0,
    "augment.video_local.crop_area": (0.08, 0.4),
    "augment.video_local.crop_aspect": (3 / 4, 4 / 3),
    "augment.video_local.flip": 0.5,
    "augment.video_local.brightness": 0.4,
    "augment.video_local.contrast": 0.4,
    "augment.video_local.saturation": 0.4,
    "augment.video_local.hue": 0.2,
    "augment.video_local.greyscale": 0.2,
    "augment.video_local.blur": 0.5,
    "augment.video_local.blur_sigma": (0.1, 2),
    "augment.audio_global.volume": 0.1,
    "augment.audio_global.crop_canvas": (1, 1),
    "augment.audio_global.crop_scale": (1, 1),
    "augment.audio_local.volume": 0.2,
    "augment.audio_local.crop_canvas": (1, 1.5),
    "augment.audio_local.crop_scale": (0.6, 1.5),
    "augment.audio_start_step": 100,
    "model.video.pixel_mean": (0.485, 0.456, 0.406),
    "model.video.pixel_std": (0.229, 0.224, 0.225),
    "mel.n_fft": 1024,
    "mel.hop": 143,
    "mel.f_min": 0,
    "mel.f_max": 8000,
    "mel.mean": -5.3688107,
    "mel.std": 4.410007,
    "train.epochs": 800,
    "train.global_batch": 256,
    "train.precision": "bfloat16",
    "optimizer.lr": 0.0001,
    "optimizer.lr_batch": 256,
    "optimizer.betas": (0.9, 0.95),
    "optimizer.eps": 0.00000001,
    "optimizer.weight_decay": 0.3,
    "optimizer.clip_norm": 0.3,
    "optimizer.warmup_epochs": 30,
    "optimizer.freeze_last_layer_epochs": 0,
    "ema.video_start": 0.997,
    "ema.video_end": 1,
    "ema.audio_start": 0.997,
    "ema.audio_end": 1,
}

VARIANT = {
    "xkd": {"video_views": 1, "video": (0.1, 0.1, 0), "audio": (0.07, 0.07, 0)},
    "mas": {"video_views": 3, "video": (0.09, 0.11, 30), "audio": (0.04, 0.06, 30)},
    "mats": {"video_views": 3, "video": (0.1, 0.1, 0), "audio": (0.07, 0.07, 0)},
}


@pytest.mark.parametrize("name", K400)
def test_recipe_states_the_released_numbers(name):
    """Catches a recipe file that drifts from XKD.md, by an edit of the file or of a default it relies on."""
    config = load_config(name)
    actual = {key: value for key, value, _ in options_of(config)}
    assert {key: actual[key] for key in RECIPE} == RECIPE

    video, audio = config.model.video, config.model.audio
    assert (video.grid, video.tokens, video.patch_numbers, video.keep) == ((8, 7, 7), 392, 3072, 59)
    assert (audio.grid, audio.tokens, audio.patch_numbers, audio.keep) == ((20, 28), 560, 64, 112)
    assert video.local_grid == (2, 6, 6)  # 72 tokens
    assert audio.local_grid == (20, 7)  # 140 tokens
    assert (config.data.clip_samples, config.data.local_samples) == (64000, 16000)

    variant, size, _ = name.split("_")
    expected = VARIANT[variant]
    assert config.model.variant == variant
    assert video.local_views == expected["video_views"]
    objective = config.model.objective
    assert dataclasses.astuple(objective.video_teacher_temperature) == expected["video"]
    assert dataclasses.astuple(objective.audio_teacher_temperature) == expected["audio"]
    encoder, decoder = {"base": ((768, 12, 12), (384, 4, 12)), "large": ((1024, 24, 16), (512, 8, 16))}[size]
    assert dataclasses.astuple(config.model.encoder) == encoder
    assert dataclasses.astuple(config.model.decoder) == decoder


# What a base recipe writes out: all that XKD.md gives a value for, and where and how it runs.
GIVEN = {*RECIPE, "model.variant", "model.video.local_views"}
GIVEN |= {f"model.{part}.{name}" for part in ("encoder", "decoder") for name in ("width", "depth", "heads")}
GIVEN |= {
    f"model.objective.{m}_teacher_temperature.{name}" for m in ("video", "audio") for name in ("start", "end", "warmup_epochs")
}
RUN = {"output", "train.micro_batch", "train.zero_stage", "checkpoint.every_steps", "checkpoint.keep"}


def written_options(mapping: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key and value of every option that a file's mapping holds."""
    for name, value in mapping.items():
        if isinstance(value, dict):
            yield from written_options(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", tuple(value) if isinstance(value, list) else value


@pytest.mark.parametrize("variant", VARIANT)
def test_a_base_recipe_writes_its_values_out(variant: str) -> None:
    """Red if a recipe relies on a default: a changed default would silently change the published recipe."""
    text = (shipped_configs() / f"{variant}_base_k400.yaml").read_text(encoding="utf-8")
    written = dict(written_options(parse_yaml(text)[0]))
    resolved = {key: value for key, value, _ in options_of(load_config(f"{variant}_base_k400"))}
    assert written.keys() == GIVEN | RUN
    assert written == {key: resolved[key] for key in written}


def test_every_shipped_configuration_is_valid_and_the_demo_is_one_of_them():
    """Catches a shipped file with a key that no longer exists, and a demo that a bare `train` would not find."""
    paths = sorted(shipped_configs().glob("*.yaml"))
    assert {"demo", "xkd_base_k400", "mas_base_k400", "mats_base_k400"} <= {path.stem for path in paths}
    for path in paths:
        config = load_config(path)
        assert config.train.accumulation(1) >= 1
    demo = load_config("demo")
    assert demo.data.demo is not None
    assert demo.train.accumulation(2) >= 1  # `make demo` trains on two processes


@pytest.mark.parametrize("name", ("demo", "xkd_base_k400"))
@pytest.mark.parametrize("ranks", (1, 2, 4, 8))
def test_shipped_recipes_run_as_they_are_on_one_to_eight_processes(name: str, ranks: int):
    """Catches ``deepspeed xkd_fast/train.py`` that fails as soon as a machine has another number of GPUs."""
    train = load_config(name).train
    assert train.clips_per_pass(ranks) * train.accumulation(ranks) * ranks == train.global_batch
