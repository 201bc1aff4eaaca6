"""What is said about keys, values and files that are wrong, whatever is typed."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.config.known import KEYS, error_of, write
from xkd_fast.config import (
    Config,
    load_config,
)
from xkd_fast.errors import UserError


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
