"""Configuration: the recipes' numbers, files and overrides, and what is said about wrong ones."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from xkd_fast.config import (
    CheckpointOptions,
    Config,
    DataOptions,
    DemoData,
    OptimizerOptions,
    TrainOptions,
    load_config,
    render_config,
    shipped_configs,
)
from xkd_fast.data.synthetic import SyntheticOptions
from xkd_fast.errors import UserError
from xkd_fast.yaml_text import parse_yaml

K400 = ("xkd_base_k400", "mas_base_k400", "mats_base_k400", "xkd_large_k400")


def options_of(value, prefix=""):
    """Every option under a configuration object: (dotted key, value, documentation)."""
    for field in dataclasses.fields(value):
        key, inner = f"{prefix}{field.name}", getattr(value, field.name)
        if dataclasses.is_dataclass(inner):
            yield from options_of(inner, f"{key}.")
        else:
            yield key, inner, field.metadata.get("doc", "")


WITH_DEMO = load_config(None, ["data.demo={}"])
OPTIONS = list(options_of(WITH_DEMO))
KEYS = [key for key, _, _ in OPTIONS]


def error_of(path=None, overrides=()) -> str:
    with pytest.raises(UserError) as caught:
        load_config(path, overrides)
    return str(caught.value)


def write(folder: Path, text: str, name: str = "run.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


# --------------------------------------------------------------------------------------------------------------- the recipes

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


# -------------------------------------------------------------------------------------------------------- reading and writing

positive = st.floats(min_value=1e-12, max_value=1e12, allow_nan=False)
share = st.floats(min_value=0, max_value=1, exclude_max=True)
text = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)  # every character but lone surrogates

configs = st.builds(
    lambda seed, output, data, train, optimizer, checkpoint: dataclasses.replace(
        Config(), seed=seed, output=output, data=data, train=train, optimizer=optimizer, checkpoint=checkpoint
    ),
    seed=st.integers(0, 2**63 - 1),
    output=text | st.sampled_from(["null", "true", "1e-4", "12", "~", "- a", "a: b", "#", "'", '"', " ", "\n", "=", "<<"]),
    data=st.builds(
        DataOptions,
        train=st.lists(text, max_size=3).map(tuple),
        demo=st.none()
        | st.builds(DemoData, videos=text, render=st.builds(SyntheticOptions, seed=st.integers(0, 9), background=share)),
    ),
    train=st.builds(TrainOptions, epochs=st.integers(1, 10**9), stop_after_steps=st.none() | st.integers(1, 10**9)),
    optimizer=st.builds(
        OptimizerOptions, lr=positive, eps=positive, clip_norm=st.none() | positive, betas=st.tuples(share, share)
    ),
    checkpoint=st.builds(CheckpointOptions, resume=text),
)


@settings(max_examples=40, deadline=None)
@given(config=configs)
def test_a_rendered_configuration_reads_back_equal(tmp_path_factory, config):
    """Catches text, numbers or nulls that come back as something else: the file saved with a run must be that run's."""
    path = write(tmp_path_factory.mktemp("config"), render_config(config))
    assert load_config(path) == config


def test_a_rendered_configuration_explains_every_option():
    """Catches an option without documentation, or one left out of --print-config."""
    rendered = render_config(WITH_DEMO)
    plain = " ".join(rendered.replace("\n", " ").replace("#", " ").split())
    for key, _, doc in OPTIONS:
        assert doc, f"{key} has no documentation"
        assert re.search(rf"^ *{key.rpartition('.')[2]}: ", rendered, re.MULTILINE), key
        assert " ".join(doc.split()) in plain, key


def test_as_dict_is_json_and_holds_every_option():
    """Catches a value that JSON (checkpoints, Weights & Biases) cannot hold, or a section left out."""
    plain = json.loads(json.dumps(WITH_DEMO.as_dict()))
    for key in KEYS:
        value = plain
        for name in key.split("."):
            value = value[name]


@pytest.mark.parametrize(
    ("written", "value"),
    [("1e-4", 1e-4), ("1E5", 1e5), ("+.5e-3", 5e-4), ("2.", 2.0), ("3", 3.0), ("0.25", 0.25)],
)
def test_numbers_are_numbers(tmp_path, written, value):
    """Catches PyYAML's reading of 1e-4 as text, in files and in overrides."""
    path = write(tmp_path, f"optimizer:\n  lr: {written}\n")
    assert load_config(path).optimizer.lr == value
    assert load_config(None, [f"optimizer.lr={written}"]).optimizer.lr == value
    assert isinstance(load_config(path).optimizer.lr, float)


def test_overrides_are_laid_over_the_file_in_order(tmp_path):
    """Catches overrides lost, applied in the wrong order, or that replace a whole section."""
    path = write(tmp_path, "train: {epochs: 5, micro_batch: 8}\ndata: {train: [a, b], demo: {videos: v}}\n")
    overrides = ["train.epochs=2", "train={epochs: 3}", "data.train=[c]", "data.demo=null", "optimizer.clip_norm=null"]
    config = load_config(path, overrides)
    assert (config.train.epochs, config.train.micro_batch) == (3, 8)
    assert config.data.train == ("c",)
    assert config.data.demo is None
    assert config.optimizer.clip_norm is None


def test_a_section_given_in_part_keeps_its_own_defaults():
    """Catches the audio teacher's temperature, or the local view's crop, falling back to the other one's defaults."""
    config = load_config(
        None, ["model.objective.audio_teacher_temperature.warmup_epochs=5", "augment={video_local: {flip: 0}}", "log=null"]
    )
    assert dataclasses.astuple(config.model.objective.audio_teacher_temperature) == (0.07, 0.07, 5)
    assert config.augment.video_local == dataclasses.replace(Config().augment.video_local, flip=0.0)
    assert config.augment.audio_local == Config().augment.audio_local
    assert config.log == Config().log


def test_a_file_can_extend_another(tmp_path):
    """Catches a base that wins over the file, or that is looked for in the wrong folder."""
    (tmp_path / "deep").mkdir()
    write(tmp_path, "base: xkd_large_k400\ntrain: {epochs: 7, micro_batch: 4}\n", "middle.yaml")
    config = load_config(write(tmp_path / "deep", "base: ../middle.yaml\ntrain: {epochs: 9}\n"))
    assert (config.train.epochs, config.train.micro_batch, config.model.encoder.width) == (9, 4, 1024)


def test_a_base_that_leads_back_is_refused(tmp_path):
    """Catches endless recursion."""
    write(tmp_path, "base: run.yaml\n", "other.yaml")
    assert "leads back" in error_of(write(tmp_path, "base: other.yaml\n"))


# ------------------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("train.epoch", "train.epochs"),
        ("trian.epochs", "train.epochs"),
        ("optimiser.lr", "optimizer.lr"),
        ("lr", "optimizer.lr"),
        ("train.lr", "optimizer.lr"),
        ("train.weight_decay", "optimizer.weight_decay"),
        ("audio.frames", "model.audio.frames"),
        ("model.video.frame", "model.video.frames"),
        ("model.audio.melbins", "model.audio.mel_bins"),
        ("model.objective.mmd_gamma", "model.objective.mmd_gammas"),
        ("data.demo.render.clip_per_class", "data.demo.render.clips_per_class"),
        ("checkpoint.every_step", "checkpoint.every_steps"),
        ("log.every_step", "log.every_steps"),
    ],
)
def test_an_unknown_key_names_the_nearest(tmp_path, typed, meant):
    """Catches a typo that is ignored, or advice that points elsewhere; in overrides and in files alike."""
    assert f"{typed} is not an option; the nearest one is {meant} " in error_of(None, [f"{typed}=3"])
    *sections, name = typed.split(".")
    if ".".join(sections) in ("trian", "optimiser", "audio"):
        return  # in a file, the section itself is the unknown key
    nested = "".join(f"{'  ' * depth}{section}:\n" for depth, section in enumerate(sections))
    path = write(tmp_path, f"{nested}{'  ' * len(sections)}{name}: 3\n")
    message = error_of(path)
    assert f"{typed} is not an option; the nearest one is {meant} ({path}:{len(sections) + 1})" in message


@pytest.mark.parametrize(
    ("typed", "place"),
    [
        ("foo.bar", ""),
        ("foo", ""),
        ("train.quux", "train"),
        ("train.batch_size", "train"),  # not model.video.patch_size, which looks much like it
        ("train.epochs.all", "train"),
        ("model.video.quux", "model.video"),
        ("data.demo.render.quux", "data.demo.render"),
    ],
)
def test_an_unknown_key_like_no_other_lists_what_there_is(typed: str, place: str) -> None:
    """Red if advice points at an option that has nothing to do with what was typed, or leaves out where to look."""
    prefix = f"{place}." if place else ""
    names = dict.fromkeys(key.removeprefix(prefix).split(".")[0] for key in KEYS if key.startswith(prefix))
    holds = f"{place or 'a configuration'} holds {', '.join(names)}"
    assert f"{typed} is not an option; {holds} (override" in error_of(None, [f"{typed}=1"])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.from_regex(r"[a-z_]{1,8}", fullmatch=True), min_size=1, max_size=3).map(".".join))
def test_no_unknown_key_is_ever_taken(key):
    """Catches any key outside the configuration that passes, and advice that is no option itself."""
    known = {".".join(name.split(".")[:depth]) for name in KEYS for depth in range(1, name.count(".") + 2)}
    if key in known:
        return
    message = error_of(None, [f"{key}=1"])
    nearest = re.search(rf"{re.escape(key)} is not an option; the nearest one is ([a-z_.]+) ", message)
    listed = re.search(rf"{re.escape(key)} is not an option; [a-z_. ]+ holds [a-z_, ]+ \(override", message)
    assert nearest or listed, message
    assert nearest is None or nearest.group(1) in known


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("train.epochs=many", "train.epochs = many must be a whole number"),
        ("train.epochs=2.5", "train.epochs = 2.5 must be a whole number"),
        ("train.epochs=true", "train.epochs = true must be a whole number"),
        ("train.epochs='3'", 'train.epochs = "3" must be a whole number'),
        ("train.epochs=[3]", "train.epochs = [3] must be a whole number"),
        ("train.epochs=", "train.epochs = null must be a whole number"),
        ("train.epochs={a: 1}", "train.epochs = {a: 1} must be a whole number"),
        ("optimizer.lr=1:30", 'optimizer.lr = "1:30" must be a number'),
        ("optimizer.clip_norm=off", "optimizer.clip_norm = off must be a number or null"),
        ("optimizer.betas=[0.9]", "optimizer.betas = [0.9] must be a list of 2, each item a number"),
        ("optimizer.betas=[0.9, x]", "optimizer.betas = [0.9, x] must be a list of 2, each item a number"),
        ("data.train=/data/k400", "data.train = /data/k400 must be a list, each item text"),
        ("train.precision=fp8", "train.precision = fp8 must be one of float32, bfloat16, float16"),
        ("train.zero_stage=4", "train.zero_stage = 4 must be one of 0, 1, 2, 3"),
        ("log.progress=yes", "log.progress = yes must be true or false"),
        ("output=3", "output = 3 must be text"),
        ("model=3", "model = 3 must be a section with options of its own"),
        ("optimizer.lr=.nan", "optimizer.lr=.nan': .nan is no finite number"),
        ("optimizer.lr=1e999", "1e999 is no finite number, or too large a one"),
        ("train.epochs=99999999999999999999", "too large a one"),
        ("train.epochs=[1", "not valid YAML"),
        ("train.epochs=!!binary aGk=", "aGk= is not a value that is understood here"),
        ("train.epochs", "'train.epochs' is not an override; write key.path=value"),
        ("=3", "'=3' is not an override"),
    ],
)
def test_a_wrong_value_is_named_with_what_was_expected(override, sentence):
    """Catches coerced values (true as 1, '3' as 3, 1:30 as 90) and messages that do not say what to write."""
    assert sentence in error_of(None, [override])


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("model.video.size=113", "model.video.size = 113 must be a positive multiple of model.video.patch_size = 16"),
        ("model.video.local_frames=64", "model.video.local_frames = 64 "),
        ("model.video.mask_ratio=0.999", "model.video.mask_ratio = 0.999 keeps 0 of 392 tokens visible"),
        ("model.audio.frames=450", "model.audio.frames = 450 must be a positive multiple of model.audio.patch_frames = 16"),
        ("model.encoder.heads=7", "model.encoder.width = 768 must be a positive multiple of model.encoder.heads = 7"),
        ("data.fps=7", "= 28 frames must equal model.video.frames = 32"),
        ("data.local_audio_seconds=5", "data.local_audio_seconds = 5.0 is longer than the clip"),
        ("mel.f_max=9000", "mel.f_max = 9000 Hz must be at most half of data.sample_rate = 16000 Hz"),
        ("train.micro_batch=24", "train.global_batch = 256 must be a multiple of train.micro_batch = 24"),
        ("augment.video_local.flip=3", "augment.video_local.flip: video view flip = 3.0 must lie in 0-1"),
    ],
)
def test_impossible_values_name_value_rule_and_key(override, sentence):
    """Catches geometry that would fail deep inside the model, and rules whose message is lost or reworded on the way."""
    assert sentence in error_of(None, [override])


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ("train.zero_stage=3", "with train.zero_stage = 3 every rank waits"),
        ("model.objective.mmd_scope=global", "with model.objective.mmd_scope = global every rank waits"),
    ],
)
def test_ranks_that_wait_for_each_other_are_not_timed(more, reason):
    """Catches a slow rank whose time all others show."""
    assert load_config(None, ["log.stragglers=true"]).log.stragglers
    assert reason in error_of(None, ["log.stragglers=true", more])


NEGATIVE_ALLOWED = {"mel.mean", "model.video.pixel_mean"}


@pytest.mark.parametrize("key", [key for key, value, _ in OPTIONS if not isinstance(value, (str, bool))])
def test_every_number_is_range_checked(key):
    """Catches an option added without a check: no size, rate, probability or count may be below zero."""
    value = dict((k, v) for k, v, _ in OPTIONS)[key]
    if isinstance(value, tuple) and (not value or isinstance(value[0], str)):
        return  # lists of names
    wrong = f"[{', '.join(['-1000000'] * len(value))}]" if isinstance(value, tuple) else "-1000000"
    if key in NEGATIVE_ALLOWED:
        load_config(None, [f"{key}={wrong}"])
        return
    message = error_of(None, ["data.demo={}", f"{key}={wrong}"])
    assert key.rpartition(".")[2] in message, message
    assert "-1000000" in message or "-1e+06" in message, message


def test_all_errors_are_listed_with_their_place(tmp_path):
    """Catches reports that stop at the first error, so that a user runs again and again."""
    path = write(tmp_path, "seed: 1\ntrain:\n  epochs: 0\n  presicion: float32\nmodel:\n  video: {size: 113}\n")
    message = error_of(path, ["optimizer.lr=fast", "optimiser=1"])
    first, *lines = message.splitlines()
    assert first == f"{path}: 5 errors"
    assert sorted(lines) == sorted(
        [
            "  - optimiser is not an option; the nearest one is optimizer (override optimiser=1)",
            f"  - train.presicion is not an option; the nearest one is train.precision ({path}:4)",
            f"  - model.video.size = 113 must be a positive multiple of model.video.patch_size = 16 ({path}:6)",
            f"  - train.epochs = 0 must be 1 or more ({path}:3)",
            "  - optimizer.lr = fast must be a number (override optimizer.lr=fast)",
        ]
    )


@pytest.mark.parametrize(
    ("content", "line", "sentence"),
    [
        ("seed: 0\ntrain:\n  epochs: 1\n  epochs: 2\n", 4, "train.epochs is given twice, here and on line 3"),
        ("seed: 0\nseed: 1\n", 2, "seed is given twice, here and on line 1"),
        ("seed: 0\ntrain: [\n", 3, "not valid YAML"),
        ("seed: 0\n  train: 3\n", 2, "not valid YAML"),
        ("seed: 0\n\tx: 1\n", 2, "not valid YAML"),
        ("train: {[1, 2]: 3}\n", 1, "a key must be a name"),
        ("train: &a {epochs: *a}\n", 0, "nested too deeply"),
        ("a: 1\n---\nb: 2\n", 2, "not valid YAML"),
        ('output: "\\ud800"\n', 1, "surrogate"),
    ],
)
def test_broken_yaml_names_its_line(tmp_path, content, line, sentence):
    """Catches a duplicate key that silently wins, and parser errors without a place."""
    path = write(tmp_path, content)
    message = error_of(path)
    assert message.startswith(f"{path}:{line}: " if line else f"{path}: "), message
    assert sentence in message


def test_files_that_are_no_configuration(tmp_path):
    """Catches tracebacks for a wrong path, a folder, a binary file, or a list."""
    assert "does not exist; name a YAML file, or one of the shipped ones: demo, " in error_of(tmp_path / "none.yaml")
    assert "is a folder" in error_of(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    assert "cannot be read" in error_of(tmp_path / "binary.yaml")
    assert "a configuration is a mapping of options" in error_of(write(tmp_path, "- a\n- b\n"))
    assert "base = [1] must be the name of a configuration file" in error_of(write(tmp_path, "base: [1]\n"))
    assert "train.epochs is written with dots" in error_of(write(tmp_path, "train.epochs: 3\n"))
    assert load_config(write(tmp_path, "# nothing but a comment\n")) == Config()


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["seed", "train", "demo", "lr"]), inner),
    max_leaves=5,
)


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=40) | st.tuples(st.sampled_from(KEYS), st.text(max_size=12)).map("=".join))
@example("train.epochs=%")
@example("train.epochs=!!int x")
@example("output=&a [*a]")
@example("output=!!timestamp 2001-01-01")
@example("? [a]: b=c")
def test_no_text_breaks_the_reader(override):
    """Catches exceptions other than UserError, whatever is typed; a mere text file goes through the same reader."""
    try:
        load_config(None, [override])
    except UserError as error:
        assert str(error)


@settings(max_examples=80, deadline=None)
@given(st.sampled_from(sorted({key.rpartition(".")[0] or key for key in KEYS} | set(KEYS))), anything)
def test_no_value_breaks_the_checks(key, value):
    """Catches checks that fail on a type they did not expect: every value is taken or refused in a sentence."""
    try:
        config = load_config(None, [f"{key}={json.dumps(value)}"])
    except UserError as error:
        assert key.partition(".")[0] in str(error) or "too large a one" in str(error)
    else:
        assert isinstance(config, Config)


def test_accumulation():
    """Catches a global batch that is silently rounded, and advice that would not work."""
    train = TrainOptions(global_batch=256, micro_batch=32)
    assert [train.accumulation(ranks) for ranks in (1, 2, 4, 8)] == [8, 4, 2, 1]
    with pytest.raises(UserError, match=r"train\.global_batch = 256 .* train\.micro_batch × ranks = 32 × 16 = 512"):
        train.accumulation(16)
    for ranks in (3, 5, 16, 257):
        with pytest.raises(UserError) as caught:
            train.accumulation(ranks)
        advice = re.search(r"set train\.(\w+) to (\d+)", str(caught.value))
        assert advice is not None
        changed = dataclasses.replace(train, **{advice.group(1): int(advice.group(2))})
        assert changed.accumulation(ranks) >= 1


@pytest.mark.parametrize("name", ("demo", "xkd_base_k400"))
@pytest.mark.parametrize("ranks", (1, 2, 4, 8))
def test_shipped_recipes_run_as_they_are_on_one_to_eight_processes(name: str, ranks: int):
    """Catches ``deepspeed xkd_fast/train.py`` that fails as soon as a machine has another number of GPUs."""
    train = load_config(name).train
    assert train.clips_per_pass(ranks) * train.accumulation(ranks) * ranks == train.global_batch


def test_each_rank_takes_its_share():
    """Catches a share that drops clips, and advice that would not work."""
    train = TrainOptions(global_batch=32, micro_batch=None)
    assert [(train.clips_per_pass(ranks), train.accumulation(ranks)) for ranks in (1, 2, 8)] == [(32, 1), (16, 1), (4, 1)]
    with pytest.raises(UserError, match="number of ranks, 3; set it to 33"):
        train.accumulation(3)
    with pytest.raises(UserError, match="number of ranks, 40; set it to 40"):
        train.accumulation(40)


def test_an_mlp_without_hidden_numbers_is_refused():
    """Catches a model whose MLPs have width 0 and train without a word."""
    with pytest.raises(UserError, match=r"model\.mlp_ratio = 0\.001 leaves no hidden number at model\.encoder\.width = 96"):
        load_config("demo", ["model.mlp_ratio=0.001"])


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("data.order=shuffled", "data.order = shuffled must be one of random, sequential"),
        ("data.shuffle_buffer=0", "data.shuffle_buffer = 0 must lie in 1-16777216"),
        ("data.remote.timeout=0", "data.remote.timeout = 0.0 must be above 0"),
        ("data.remote.attempts=0", "data.remote.attempts = 0 must lie in 1-100"),
        ("data.cache.gib=0", "data.cache.gib = 0.0 must be above 0"),
        ("data.cache.folder=''", "data.cache.folder is empty; it must name a folder, or be null for no cache"),
        ("log.data_wait_alarm=10", "log.data_wait_alarm = 10.0 must be above 0 and at most 1, or null for off"),
        ("data.cache.size=3", "data.cache.size is not an option"),
    ],
)
def test_options_of_remote_data_are_checked(override: str, sentence: str) -> None:
    """Red if a cache of no size, a buffer of no clips or a share in per cent is taken for what it is not."""
    assert sentence in error_of(None, [override])
    options = ["data.cache={folder: /scratch, gib: 0.5}", "data.remote.timeout=5", "log.data_wait_alarm=null"]
    config = load_config(None, [*options, "data.train=['https://host/set?a=1']"])
    assert (config.data.cache.limit, config.data.remote.timeout, config.log.data_wait_alarm) == (2**29, 5.0, None)
    assert config.data.train == ("https://host/set?a=1",)
