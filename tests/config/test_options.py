"""Rules of the options themselves: ranges, geometry, and what goes with what."""

from __future__ import annotations

import dataclasses
import re

import pytest

from tests.config.known import OPTIONS, error_of
from xkd_fast.config import (
    TrainOptions,
    load_config,
)
from xkd_fast.errors import UserError


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


def test_a_recorded_pass_is_not_offered_for_float16():
    """Catches a recording, whose backward pass knows nothing of the loss scale: small gradients would silently be 0."""
    assert load_config(None, ["model.cuda_graph=true"]).model.cuda_graph is True
    assert "loss that is not scaled" in error_of(None, ["model.cuda_graph=true", "train.precision=float16"])


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
