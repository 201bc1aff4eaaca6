"""What a run reports: losses, gradients, speed, memory. Nothing here waits for the device off the logging path."""

from __future__ import annotations

import time

import psutil
import torch
import torch.distributed as dist
from torch import Tensor

from xkd_fast.engine.engine import Engine
from xkd_fast.engine.health import health
from xkd_fast.engine.schedule import Moment
from xkd_fast.objective.losses import Losses

NEVER = 2**62
GRADIENT_NORM = "gradient_norm"


class StepMetrics:
    """Collects one optimiser step's losses over its micro-batches and remembers, per term, the first step that broke.

    Everything stays on the device until :meth:`report`, which synchronises on purpose and is called on the logging path only.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._names: list[str] = []
        self._values: list[Tensor] = []
        self._first_bad: list[Tensor] | None = None  # per term; of the gradient norm, where that is: offloaded, on the host
        self._last: Losses | None = None

    def add(self, losses: Losses) -> None:
        """Take in one micro-batch."""
        terms = losses.terms()
        self._names = list(terms)
        self._values.append(torch.stack([value.float() for value in terms.values()]))
        self._last = losses

    def end_step(self, step: int) -> None:
        """The micro-batches so far were step number ``step`` (counted from 1), whose gradients the optimiser has used."""
        means = torch.stack(self._values).mean(dim=0)
        values = [means, self._engine.optimizer.gradient_norm().float().reshape(1)]
        never = [torch.full_like(each, NEVER, dtype=torch.int64) for each in values]
        firsts = zip(values, self._first_bad or never, strict=True)
        self._first_bad = [torch.where(each.isfinite(), first, first.clamp(max=step)) for each, first in firsts]
        self._values = [means]

    def begin_step(self) -> None:
        """Forget the step's losses; the next :meth:`add` belongs to another one."""
        self._values = []

    def first_non_finite(self) -> tuple[list[str], int] | None:
        """The terms that were NaN or infinite first, on any rank, and the step; None while all were finite. Synchronises.

        A term is told apart from the sums that it enters, and the gradient norm from the losses it follows from.
        """
        if self._first_bad is None:
            return None
        terms, norm = self._first_bad
        first = torch.cat([terms, norm.to(terms.device)])
        dist.all_reduce(first, op=dist.ReduceOp.MIN)
        bad = {name: step for name, step in zip([*self._names, GRADIENT_NORM], first.tolist(), strict=True) if step < NEVER}
        if not bad:
            return None
        start = min(bad.values())
        culprits = [name for name, step in bad.items() if step == start]
        follow = ("total", "reconstruction", "distillation", "alignment", GRADIENT_NORM)
        return [name for name in culprits if name not in follow] or culprits, start

    def report(self) -> dict[str, float]:
        """The latest step's terms averaged over micro-batches and ranks, health and gradient norms. Synchronises."""
        assert self._values and self._last is not None
        names = dict(zip(self._names, self._values[0], strict=True))
        optimizer = self._engine.optimizer
        report = averaged_over_ranks(names) | health(self._engine, self._last.outputs)
        report[GRADIENT_NORM] = optimizer.gradient_norm().item()
        report["clipped_gradient_norm"] = optimizer.clipped_gradient_norm().item()
        return report


def averaged_over_ranks(values: dict[str, Tensor]) -> dict[str, float]:
    """Scalars by name, averaged. Synchronises."""
    vector = torch.stack([value.float() for value in values.values()])
    dist.all_reduce(vector)
    return dict(zip(values, (vector / dist.get_world_size()).tolist(), strict=True))


class Speedometer:
    """Clips per second and the share of time spent waiting for data, since the last reading."""

    def __init__(self, clips_per_step: int) -> None:
        self._clips_per_step = clips_per_step
        self.restart()

    def restart(self) -> None:
        """Begin a new measuring interval."""
        self._start, self._waited, self._steps = time.perf_counter(), 0.0, 0

    def waited(self, seconds: float) -> None:
        """Count time the step waited for its data."""
        self._waited += seconds

    def step(self) -> None:
        """Count one optimiser step."""
        self._steps += 1

    def read(self) -> dict[str, float]:
        """Rates since the last reading, and start a new interval."""
        elapsed = max(time.perf_counter() - self._start, 1e-9)
        rates = {
            "clips_per_second": self._steps * self._clips_per_step / elapsed,
            "data_wait_share": self._waited / elapsed,
        }
        self.restart()
        return rates


def moment_metrics(moment: Moment) -> dict[str, float]:
    """The schedules' values as metrics."""
    return {
        "learning_rate": moment.learning_rate,
        "video_ema_momentum": moment.video_momentum,
        "audio_ema_momentum": moment.audio_momentum,
        "video_teacher_temperature": moment.video_temperature,
        "audio_teacher_temperature": moment.audio_temperature,
    }


def memory_metrics(device: torch.device) -> dict[str, float]:
    """Host memory of this process and, on a GPU, the device's peak, in GiB."""
    metrics = {"host_memory_gib": psutil.Process().memory_info().rss / 2**30}
    if device.type == "cuda":
        metrics["gpu_peak_memory_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
    return metrics
