"""The judge of speed judges: contestants do the same whole step, each as its name says, and ratios point the right way."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import contestants, measure, race, record, test_step
from benchmarks.contestants import Contestant, Fast, Released, Strong
from benchmarks.test_step import model_options
from tests.tiny import random_batch
from xkd_fast import reference
from xkd_fast.reference import MODALITIES

CPU = torch.device("cpu")
PLAIN: dict[str, Callable[..., Contestant]] = {"reference": Released, "strong": partial(Strong, compiled=False)}
VARIANTS = ("xkd", "mas", "mats")


def state_of(model: reference.XKD) -> dict[str, Tensor]:
    """Weights, teachers and centres, copied."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("variant", VARIANTS)
def test_all_do_the_whole_step(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Red if one leaves out clipping, an update, decay, teachers or centres, and so is faster than it may be."""
    for name, value in {"LR": 1e-2, "MAX_NORM": 0.02, "MOMENTUM": 0.5}.items():  # all of which would hardly show otherwise
        monkeypatch.setattr(contestants, name, value)
    states = {}
    for name, kind in {"fast": Fast, **PLAIN}.items():
        contestant = kind(model_options(variant, tiny=True), CPU, torch.float32)
        before = state_of(contestant.model)
        for seed in range(4):
            contestant.step(*random_batch(contestant.model.options, 4, seed=seed, dtype=torch.float32))
        states[name] = state_of(contestant.model)
    expected = states.pop("reference")
    moved = {key: (tensor - before[key]).norm() for key, tensor in expected.items()}
    still = {key for key, distance in moved.items() if distance == 0}
    assert {key.rpartition(".")[2].rpartition("_")[2] for key in still} <= {"scale", "temperature"}, still
    for name, state in states.items():
        for key in expected.keys() - still:
            assert (state[key] - expected[key]).norm() <= 0.01 * moved[key], f"{name}: {key}"


def test_the_released_loop_waits_for_every_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Red if the reference is spared what released code does, or the others wait for their norms one by one."""
    waited: list[torch.Size] = []
    monkeypatch.setattr(Tensor, "item", lambda self, item=Tensor.item: waited.append(self.shape) or item(self))
    for name, kind in {"fast": Fast, **PLAIN}.items():
        contestant = kind(model_options("xkd", tiny=True), CPU, torch.float32)
        batch = random_batch(contestant.model.options, 2, dtype=torch.float32)
        if isinstance(contestant, Released):  # on a CPU PyTorch's update waits too
            monkeypatch.setattr(contestant.scaler, "step", lambda optimizer: None)
        waited.clear()
        contestant.step(*batch)
        clipped = len(list(reference.clipped_parameters(contestant.model)))
        assert len(waited) == (clipped if name == "reference" else 0), name


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_strong_one_is_strong(variant: str) -> None:
    """Red if the yardstick is not compiled, or forms attention matrices that nobody needs."""
    options = model_options(variant, tiny=True)
    for compiled in (True, False):
        model = Strong(options, CPU, torch.float32, compiled=compiled).model
        parts = [module for module in model.modules() if isinstance(module, (reference.Block, reference.Head))]
        assert {module._compiled_call_impl is not None for module in parts} == {compiled}
        plain = {id(module) for module in parts if type(module) is reference.Block}
        assert plain == {id(model.teacher(modality).encoder.blocks[-1]) for modality in MODALITIES}


class Timed:
    """An entrant whose steps take given seconds."""

    peak_bytes = 5

    def __init__(self, seconds: tuple[float, ...], loss: float) -> None:
        self._seconds, self.terms = iter(seconds), {"total": loss}

    def step(self) -> float:
        return next(self._seconds)


def test_ratios_are_of_the_other_ones_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Red if a ratio is upside down, or not taken round by round, or if speed is not clips by time."""
    entrants = {"fast": Timed((1.0, 2.0, 4.0), 1.6), "rival": Timed((2.0, 6.0, 4.0), 2.0)}
    monkeypatch.setattr(race.Race, "_entrant", lambda self, name, kind: entrants[name])
    contest = race.Race(model_options("xkd", tiny=True), CPU, torch.float32, 3)
    list(contest.run({"rival": Released}, rounds=3, counted={}))
    row = contest.row
    assert row["fast_against"] == {"rival": {"median": 2.0, "min": 1.0, "max": 3.0, "runs": 3}}
    assert row["seconds"]["fast"] == {"median": 2.0, "min": 1.0, "max": 4.0, "runs": 3}
    assert row["clips_per_second"] == {"rival": 0.75, "fast": 1.5}
    assert row["disagreement"]["rival"] == pytest.approx(0.25)


def test_launches_are_operators_that_are_no_views() -> None:
    """Red if views count, which launch nothing, or an operator in place does not."""
    x = torch.ones(4, 4)
    assert measure.launches(lambda: (x.view(16) + 1, x.t().t_(), x[0].mul_(2), torch._foreach_add([x, x], 1))) == 3


def test_the_json_says_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Red if a figure, its spread, or what it was measured on is missing from what is written."""
    monkeypatch.setenv("XKD_BENCHMARK_RESULTS", str(tmp_path))
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    monkeypatch.setattr(test_step, "DEVICE", CPU)
    test_step.test_step(False, "xkd", "float32", 2, 2, defaultdict(list))
    (file,) = tmp_path.glob("step_*_xkd_float32.json")
    written: dict[str, Any] = json.loads(file.read_text())
    assert {"device", "torch", "python", "packages", "commit", "dirty"} <= written.keys()
    (row,) = written["rows"]
    names = {"reference", "strong", "fast"}
    assert row["clips"] == 2 and row["clips_per_second"].keys() == row["costs"].keys() == names
    assert row["fast_against"].keys() == names - {"fast"}
    assert all(ratio.keys() >= {"median", "min", "max"} for ratio in row["fast_against"].values())
    for costs in row["costs"].values():
        assert min(costs[kind] for kind in ("saved_bytes", "gflop_per_clip", "launches")) > 0
    assert row["peak_bytes"].keys() in (names, set())  # some systems do not tell
