"""``auto`` is what was measured, off where nothing was, and always told."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch

from tests.tiny import tiny_options
from xkd_fast.model import switches
from xkd_fast.model.build import build_model
from xkd_fast.model.options import ModelOptions

CPU = torch.device("cpu")
TABLE = {"cpu": {"bfloat16": {"32": ["teacher_stream", "cuda_graph"], "128": ["compile"]}}}


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if this device had been measured."""
    monkeypatch.setattr(switches, "measured_steps", lambda: TABLE)


def on(options: ModelOptions) -> set[str]:
    """The switches that are on."""
    return {name for name in switches.SWITCHES if getattr(options, name) is True}


@pytest.mark.parametrize(("clips", "expected"), [(8, {"teacher_stream", "cuda_graph"}), (100, {"compile"})])
def test_the_nearest_measured_batch_counts(measured: None, clips: int, expected: set[str]) -> None:
    """Red if another batch size, precision or device is taken, or a switch stays open."""
    options, lines = switches.settled(ModelOptions(), CPU, "bfloat16", clips, obstacle={}.get)
    assert on(options) == expected and all(getattr(options, name) in (True, False) for name in switches.SWITCHES)
    assert len(lines) == 3 and all("on cpu" in line for line in lines)
    options, (line,) = switches.settled(ModelOptions(), CPU, "float32", clips, obstacle=pytest.fail)
    assert on(options) == set() and "no set of them is known to be the fastest in float32" in line


def test_what_was_asked_for_stays(measured: None) -> None:
    """Red if a measurement overrules the user, or an obstacle goes without a word."""
    asked = replace(ModelOptions(), compile=True, cuda_graph=False)
    options, (line,) = switches.settled(asked, CPU, "bfloat16", 32, obstacle={"cuda_graph": "never"}.get)
    assert on(options) == {"compile", "teacher_stream"} and line.startswith("teacher_stream: on")
    obstacle = partial(switches.obstacle_to, ModelOptions(), 3, "bfloat16")
    options, (line,) = switches.settled(ModelOptions(), CPU, "bfloat16", 32, obstacle=obstacle)
    assert on(options) == set() and "had cuda_graph, and ZeRO 3 keeps no weights at fixed places" in line
    assert "not scaled" in str(switches.obstacle_to(ModelOptions(), 1, "float16", "cuda_graph"))
    assert switches.obstacle_to(ModelOptions(), 1, "bfloat16", "cuda_graph") is None
    assert "Python" in str(switches.obstacle_to(ModelOptions(attention="xformers"), 1, "bfloat16", "compile"))
    options, lines = switches.settled(asked.as_reference(), CPU, "bfloat16", 32, obstacle={}.get)
    assert on(options) == set() and lines == []


def test_a_switch_without_effect_is_told() -> None:
    """Red if a user who asks for a CUDA graph on a CPU is left in the belief that there is one."""
    options, lines = switches.settled(replace(ModelOptions(), cuda_graph=True), CPU, "float32", 2, obstacle={}.get)
    assert options.cuda_graph is True and "cuda_graph: on, which has no effect on a CPU" in lines


def test_an_open_switch_is_off() -> None:
    """Red if a model that nobody settled compiles itself."""
    model = build_model(tiny_options(), seed=0)
    assert model.options.compile == "auto" and not model.runner._compiled
