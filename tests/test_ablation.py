"""What the benchmarks leave out, or add, is what their names say."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from torch import Tensor

from benchmarks import ablation, contestants, race
from benchmarks.test_step import OperatorNames, model_options
from tests.tiny import random_batch
from xkd_fast.model.switches import SWITCHES, measured_steps
from xkd_kernels import obstacle

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def stepped(kind: type[contestants.FewLaunches], steps: int = 3) -> tuple[dict[str, Tensor], set[str]]:
    """A tiny model's state after some steps, and the operators of this project that they met."""
    contestant = kind(model_options("xkd", tiny=True), CPU, torch.float32)
    views, masks = random_batch(contestant.model.options, 4, dtype=torch.float32)
    with OperatorNames() as names:
        for _ in range(steps):
            contestant.step(views, masks)
    return contestant.model.state_dict(), {name for name in names.met if name.startswith("xkd_kernels")}


@pytest.mark.parametrize("name", ["the optimiser's operator", "clipping that waits for nothing"])
def test_the_update_without_a_technique_is_the_same_update(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Red if gradients are clipped twice or not at all, or if norms, teachers or copies still go through what is left out."""
    monkeypatch.setattr(contestants, "MAX_NORM", 0.05)  # the gradients of so small a model would not be clipped
    expected, ours = stepped(contestants.Fast)
    found, met = stepped(ablation.WITHOUT[name])
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor, rtol=1e-4, atol=1e-6, msg=lambda text, key=key: f"{key}: {text}")
    if name == "the optimiser's operator":
        assert not met
        assert obstacle(CPU, torch.float32, "native") or ours, "the watch sees nothing"


def test_what_waits_does_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """Red if the loop is not called, or is called of no tensor."""
    waited = []
    monkeypatch.setattr(Tensor, "item", lambda self, item=Tensor.item: waited.append(self.shape) or item(self))
    for kind in (contestants.Fast, ablation.WITHOUT["clipping that waits for nothing"]):
        waited.clear()
        contestant = kind(model_options("xkd", tiny=True), CPU, torch.float32)
        contestant.step(*random_batch(contestant.model.options, 2, dtype=torch.float32))
        assert bool(waited) == (kind is not contestants.Fast)


def test_every_set_of_switches_takes_part_on_a_gpu() -> None:
    """Red if one that might be the fastest is never timed, so that `auto` cannot take it."""
    sets = [names for count in range(1, 1 + len(SWITCHES)) for names in combinations(SWITCHES, count)]
    timed = race.rivals(GPU, compiled=True, all_choices=True)
    assert {" + ".join(("fast", *names)) for names in sets} | {"reference", "strong"} == timed.keys()
    assert race.rivals(CPU, compiled=True, all_choices=True).keys() == {"reference", "strong"}


def test_what_auto_takes_is_part_of_the_ablation() -> None:
    """Red if the ablation tells nothing of the set of switches that runs have on a GPU, or of our kernels within it."""
    more = ablation.added_techniques(GPU, "bfloat16")
    for precisions in measured_steps().values():
        for taken in precisions["bfloat16"].values():
            for name in ("fast", "all our kernels"):
                assert not taken or " + ".join((name, *taken)) in more
