"""Schedules against the text of XKD.md section 8, at the ends of every ramp."""

import math
from dataclasses import replace

import numpy as np
import pytest

from xkd_fast.config import Config
from xkd_fast.engine.schedule import Schedule, cosine, teacher_temperature, warmup_cosine
from xkd_fast.model.options import TemperatureOptions

STEPS_PER_EPOCH = 7


def schedule(**changes):
    """The released recipe, with sections changed as ``section={"option": value}``."""
    config = Config()
    config = replace(config, **{name: replace(getattr(config, name), **values) for name, values in changes.items()})
    return Schedule(config, STEPS_PER_EPOCH)


def test_warm_up_reaches_the_base_exactly_and_the_cosine_starts_there_again():
    """Off by one: a first step above 0, a peak never reached, or a peak only once."""
    released = schedule()
    warmup, total = 30 * STEPS_PER_EPOCH, 800 * STEPS_PER_EPOCH
    assert released.total_steps == total
    assert released.at(0).learning_rate == 0.0
    assert released.at(1).learning_rate == pytest.approx(1e-4 / (warmup - 1), rel=1e-12)
    assert released.at(warmup - 1).learning_rate == released.at(warmup).learning_rate == 1e-4
    rest = total - warmup
    for i in (1, rest // 2, rest - 1):
        assert released.at(warmup + i).learning_rate == pytest.approx(1e-4 * (1 + math.cos(math.pi * i / rest)) / 2, rel=1e-12)
    assert released.at(total - 1).learning_rate > 0
    rates = [released.at(step).learning_rate for step in range(total)]
    assert rates[:warmup] == sorted(rates[:warmup]) and rates[warmup:] == sorted(rates[warmup:], reverse=True)


def test_learning_rate_grows_with_the_global_batch():
    """A rate per clip that changes with the number of GPUs."""
    assert schedule(train={"global_batch": 1024}).base_learning_rate == pytest.approx(4e-4)
    assert schedule(train={"global_batch": 32}).at(30 * STEPS_PER_EPOCH).learning_rate == pytest.approx(1.25e-5)


@pytest.mark.parametrize("epochs, warmup", [(2, 0), (1, 1), (2, 5)], ids=["none", "all", "longer than the run"])
def test_short_runs_have_finite_rates_within_the_base(epochs, warmup):
    """A division by zero where no step is left for warm-up or cosine."""
    run = schedule(train={"epochs": epochs, "global_batch": 256}, optimizer={"warmup_epochs": warmup})
    rates = [run.at(step).learning_rate for step in range(run.total_steps)]
    assert all(0 <= rate <= 1e-4 for rate in rates)
    assert rates[0] == (1e-4 if warmup == 0 else 0.0)
    assert max(rates) == pytest.approx(1e-4)


def test_the_last_warm_up_step_is_the_base_to_the_last_bit():
    """1e-4 · 13 / 13 is not 1e-4."""
    assert all(warmup_cosine(steps - 1, 1e-4, steps, 1000) == 1e-4 for steps in range(2, 300))


def test_a_warm_up_of_one_step_does_not_divide_by_zero():
    """A run whose epoch is a single step."""
    assert [warmup_cosine(step, 1.0, 1, 3) for step in range(3)] == [0.0, 1.0, pytest.approx(0.5)]


def test_momenta_start_at_0_997_and_approach_1_along_a_cosine_per_modality():
    """Momentum ramped by epoch, along a line, or one for both modalities."""
    run = schedule(ema={"audio_start": 0.9, "audio_end": 0.95})
    total = run.total_steps
    assert (run.at(0).video_momentum, run.at(0).audio_momentum) == (pytest.approx(0.997), pytest.approx(0.9))
    assert run.at(total // 2).video_momentum == pytest.approx(0.9985, rel=1e-12)
    assert run.at(total // 4).video_momentum == pytest.approx(1 - 0.003 * (1 + math.cos(math.pi / 4)) / 2, rel=1e-12)
    assert 0.9999 < run.at(total - 1).video_momentum < 1
    assert run.at(total // 2).audio_momentum == pytest.approx(0.925, rel=1e-12)
    assert cosine(0, 0.5, 1.0, 10) == 0.5


def test_teacher_temperature_is_linear_per_epoch_with_both_ends():
    """The released MAS ramp: 0.04 in epoch 0 and 0.06 in epoch 29 already."""
    options = TemperatureOptions(0.04, 0.06, warmup_epochs=30)
    ours = [teacher_temperature(epoch, options) for epoch in range(40)]
    np.testing.assert_allclose(ours, [*np.linspace(0.04, 0.06, 30), *[0.06] * 10], rtol=1e-12)
    assert teacher_temperature(0, TemperatureOptions(0.04, 0.06, warmup_epochs=0)) == 0.06
    assert teacher_temperature(0, TemperatureOptions(0.04, 0.06, warmup_epochs=1)) == 0.04


def test_temperatures_change_with_the_epoch_not_within_it():
    """A temperature by step, or the two modalities swapped."""
    model = Config().model
    objective = replace(model.objective, video_teacher_temperature=TemperatureOptions(0.09, 0.11, 3))
    run = schedule(model={"objective": objective})
    video = [run.at(step).video_temperature for step in range(4 * STEPS_PER_EPOCH)]
    np.testing.assert_allclose(video, np.repeat([0.09, 0.10, 0.11, 0.11], STEPS_PER_EPOCH))
    assert run.at(0).audio_temperature == 0.07


def test_last_layer_is_frozen_in_the_first_epochs_only():
    """A freeze by steps, or one that never ends."""
    run = schedule(optimizer={"freeze_last_layer_epochs": 2})
    frozen = [run.at(step).last_layer_frozen for step in range(3 * STEPS_PER_EPOCH)]
    assert frozen == [True] * (2 * STEPS_PER_EPOCH) + [False] * STEPS_PER_EPOCH
    assert not schedule().at(0).last_layer_frozen
