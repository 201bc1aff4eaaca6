"""Files and overrides: what is read is what was written."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.config.known import KEYS, OPTIONS, WITH_DEMO, error_of, write
from xkd_fast.config import (
    CheckpointOptions,
    Config,
    DataOptions,
    DemoData,
    OptimizerOptions,
    TrainOptions,
    load_config,
    render_config,
)
from xkd_fast.data.synthetic import SyntheticOptions

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
