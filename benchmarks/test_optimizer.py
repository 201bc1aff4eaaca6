"""The optimiser's step alone: per-tensor clipping, AdamW, both teachers and their bfloat16 copies, on the base model's tensors.

Floor: 4 bytes per trainable number for the norms, 28 for AdamW, 12 per teacher's number (8 where it follows on AdamW's way) and
2 per number of a copy; at this machine's speed of reading and writing that is the time below which nothing gets.
"""

from __future__ import annotations

import os
import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Callable

import pytest
import torch

from benchmarks import measure, record
from benchmarks.contestants import BETAS, LR, MAX_NORM, MOMENTUM, WEIGHT_DECAY, with_initial_weights
from benchmarks.race import too_late
from benchmarks.test_step import DEVICE, model_options
from xkd_fast import reference
from xkd_fast.engine.local import LocalUpdate
from xkd_fast.engine.updates import Torch, Update, Xkd
from xkd_fast.model.options import ModelOptions
from xkd_fast.model.xkd import XKD
from xkd_kernels import obstacle

EPS = 1e-8
CLOSE = 1e-5  # the most that two contestants' tensors may differ after some steps, of their largest number


class Contestant(ABC):
    """A model with gradients, whose step is to be taken again and again."""

    name: str

    def __init__(self, options: ModelOptions) -> None:
        self.model: XKD = with_initial_weights(options, DEVICE)  # type: ignore[assignment]
        self.model.prepare_halves(DEVICE, torch.bfloat16)
        generator = torch.Generator(DEVICE).manual_seed(0)
        self.gradients = {
            name: torch.randn(p.shape, generator=generator, device=DEVICE) * 1e-3
            for name, p in self.model.named_parameters()
            if p.requires_grad
        }

    def give_gradients(self) -> None:
        """As the backward pass would; scaling in place is allowed, so they shrink from step to step."""
        for name, gradient in self.gradients.items():
            self.model.get_parameter(name).grad = gradient

    @abstractmethod
    def step(self) -> None:
        """The step, not yet waited for."""

    def copies(self) -> None:
        """Bring the teachers' copies up to date where the update has not."""
        with torch.autocast(DEVICE.type, torch.bfloat16):
            self.model.teachers_for(DEVICE)


class Foreach(Contestant):
    """PyTorch's multi-tensor operators throughout: what a careful user writes."""

    name = "foreach"

    def __init__(self, options: ModelOptions) -> None:
        super().__init__(options)
        groups = reference.parameter_groups(self.model, WEIGHT_DECAY)
        self.optimizer = torch.optim.AdamW(groups, lr=LR, betas=BETAS, eps=EPS, foreach=True)
        self.pairs = []
        for modality in reference.MODALITIES:
            self.pairs += list(zip(self.model.student(modality).parameters(), self.model.teacher(modality).parameters()))

    def step(self) -> None:
        """See the class."""
        clipped = [p.grad for p in reference.clipped_parameters(self.model)]
        norms = torch.stack(torch._foreach_norm(clipped))
        torch._foreach_mul_(clipped, list((MAX_NORM / (norms + reference.CLIP_EPS)).clamp(max=1.0).unbind()))
        self.optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_([t for _, t in self.pairs], [s for s, _ in self.pairs], 1 - MOMENTUM)
        self.copies()


class Engine(Contestant):
    """The engine's optimiser with one of its updates."""

    update: Callable[[tuple[float, float], float], Update]

    def __init__(self, options: ModelOptions) -> None:
        super().__init__(options)
        self.local = LocalUpdate(self.model, self.update(BETAS, EPS), lr=LR, weight_decay=WEIGHT_DECAY, clip_norm=MAX_NORM)

    def step(self) -> None:
        """See the class."""
        self.local.teachers.set_momenta(MOMENTUM, MOMENTUM)
        self.local.optimizer.step()
        self.local.teachers.follow()
        self.copies()


class FusedTorch(Engine):
    """``torch.optim.AdamW(fused=True)``, multi-tensor clipping."""

    name, update = "fused", Torch


class OneOperator(Engine):
    """``xkd_kernels.adamw_ema_``."""

    name = "xkd"

    @staticmethod
    def update(betas: tuple[float, float], eps: float) -> Update:
        """The compiled operator where it runs, measured or not."""
        is_there = obstacle(DEVICE, torch.float32, "native") is None
        return Xkd(betas, eps, backend="native" if is_there else "torch")


def seconds(contestant: Contestant) -> float:
    """Of one step."""
    contestant.give_gradients()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    contestant.step()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def in_place_speed() -> float:
    """Bytes per second, read and written, of scaling a tensor larger than any cache in place, as an optimiser writes."""
    tensor, best = torch.ones(1 << 28, dtype=torch.float32, device=DEVICE), float("inf")
    for _ in range(5):
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        tensor.mul_(1.0)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * tensor.nbytes / best


def floor_bytes(model: XKD) -> int:
    """Bytes that a step has to move, each once."""
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    teachers = {id(p): p.numel() for m in reference.MODALITIES for p in model.teacher(m).parameters()}
    return 32 * trainable + 8 * sum(teachers.values()) + 2 * sum(half.numel() for half in model.halves().values())


@pytest.mark.parametrize("rival", [Foreach, FusedTorch], ids=lambda kind: kind.name)
def test_optimizer(measuring: bool, rival: type[Contestant], results: dict[str, object]) -> None:
    """Times the engine's own update beside another one, in turns; at smoke size checks that both give the same."""
    if too_late():
        pytest.skip("not reached")
    options = model_options("xkd", tiny=not measuring)
    pair = [OneOperator(options), rival(options)]
    rounds = int(os.environ.get("XKD_BENCHMARK_OPTIMIZER_ROUNDS", "9" if measuring else "1"))
    for contestant in pair * 2:
        seconds(contestant)
    taken: dict[str, list[float]] = {contestant.name: [] for contestant in pair}
    for _ in range(rounds):
        for contestant in pair:
            taken[contestant.name].append(seconds(contestant))
    mine, theirs = pair[0].model.state_dict(), pair[1].model.state_dict()
    for name, tensor in theirs.items():
        error = (mine[name] - tensor).abs().max().item() / max(tensor.abs().max().item(), 1e-12)
        assert error < CLOSE, f"{name}: {error:.1e}"
    ratios = [other / own for own, other in zip(taken["xkd"], taken[rival.name])]
    median = statistics.median(taken["xkd"])
    moved = floor_bytes(pair[0].model)
    results[rival.name] = {
        "seconds": {name: record.spread(times) for name, times in taken.items()},
        "ratio": record.spread(ratios),
        "launches": {contestant.name: measure.launches(contestant.step) for contestant in pair},
    }
    told = f"{rival.name}: xkd {1e3 * median:.1f} ms, {statistics.median(ratios):.2f} × ({min(ratios):.2f}-{max(ratios):.2f})"
    print(f"\noptimiser on {DEVICE.type} beside {told}")
    if measuring:
        floor = {"bytes": moved, "bytes_per_second_in_place": in_place_speed()}
        gpu = torch.cuda.get_device_name() if DEVICE.type == "cuda" else None
        backend = pair[0].local.optimizer.update.backend
        record.write(f"optimizer_{record.place(DEVICE)}", {"gpu": gpu, "backend": backend, "floor": floor, "rivals": results})


@pytest.fixture(scope="module")
def results() -> dict[str, object]:
    """What was measured so far, by rival."""
    return {}
