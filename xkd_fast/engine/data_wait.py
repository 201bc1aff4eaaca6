"""Which stage of making batches keeps the step waiting, and what to do about it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from xkd_fast.data.stage_times import STAGES, Stage, StageTimes

ADVICE: dict[Stage, str] = {
    "read": "keep copies on a local disk (data.cache.folder=FOLDER), read shards front to back (data.order=sequential), or "
    "raise data.threads",
    "decode": "raise data.threads, draw more clips of each file (data.clips_per_file), decode on the GPU where there is one "
    "(data.decode=gpu), or prepare the shards with smaller frames or a faster codec (README, Which codec)",
    "augment": "raise data.threads, or start fewer processes per machine",
    "copy": "raise data.prefetch, and look for other work on the device's bus or the host's memory",
}


@dataclass(frozen=True)
class Interval:
    """How one rank's data kept up between two records."""

    rank: int
    clips: int  # made
    share: float  # of the time, spent waiting for data, 0-1
    seconds: dict[Stage, float]  # that making the clips took, by stage
    needed: float  # clips/s of this rank, if it never waited

    @property
    def slowest(self) -> Stage:
        """The stage that takes the most time."""
        return max(STAGES, key=lambda stage: self.seconds[stage])

    def speed(self, stage: Stage) -> float:
        """Clips/s of a stage by itself."""
        return self.clips / max(self.seconds[stage], 1e-9)


class DataWait:
    """Reads the stages' times at the logging cadence, and says once of each slow stage that the step waits for it."""

    def __init__(self, times: StageTimes, threshold: float | None, device: torch.device) -> None:
        """``threshold``: share of the time, 0-1; None = never say anything."""
        self._times, self._threshold, self._device = times, threshold, device
        self._told: set[Stage] = set()
        self._begun = False  # the first interval holds the wait for the first batch, which says nothing

    def read(self, share: float, clips_per_second: float) -> tuple[dict[str, float], str | None]:
        """Metrics of the interval, and a warning where one is due. For every rank; synchronises.

        Args:
            share: of the interval that this rank spent waiting for its data, 0-1.
            clips_per_second: that all ranks trained on together.

        Returns:
            Milliseconds per clip of each stage on the rank that waited longest, by metric; and the warning, if any.
        """
        seconds, clips = self._times.read()
        every = torch.zeros(dist.get_world_size(), 2 + len(STAGES), dtype=torch.float64, device=self._device)
        every[dist.get_rank()] = torch.tensor([share, clips, *(seconds[stage] for stage in STAGES)], dtype=torch.float64)
        dist.all_reduce(every)
        rows = every.tolist()
        rank = max(range(len(rows)), key=lambda place: rows[place][0])
        share, made, *spent = rows[rank]
        needed = clips_per_second / len(rows) / max(1 - share, 1e-3)
        interval = Interval(rank, int(made), share, dict(zip(STAGES, spent, strict=True)), needed)
        metrics = {f"data_{stage}_ms": 1000 * interval.seconds[stage] / max(interval.clips, 1) for stage in STAGES}
        return metrics, self._warning(interval)

    def _warning(self, interval: Interval) -> str | None:
        begun, self._begun = self._begun, True
        slow = interval.slowest
        if not begun or self._threshold is None or interval.share <= self._threshold or slow in self._told:
            return None
        if not interval.clips:
            return None  # a single batch lasts longer than the interval; the next one tells
        self._told.add(slow)
        who = f"rank {interval.rank}" if dist.get_world_size() > 1 else "the step"
        return (
            f"{who} waited for its data for {100 * interval.share:.0f} % of the time since the last record "
            f"(log.data_wait_alarm = {self._threshold:g}); the slow stage is {slow}, at "
            f"{_rate(interval.speed(slow))} clips/s where the step could take {_rate(interval.needed)}: {ADVICE[slow]}"
        )


def _rate(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
