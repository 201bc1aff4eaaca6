"""What a pile of media holds, counted before hours are spent on it: ``xkd-fast prepare SRC --audit``."""

from __future__ import annotations

import contextlib
import json
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from xkd_fast.data.estimate import Estimate, estimate
from xkd_fast.data.prepare import PrepareOptions, processors
from xkd_fast.data.probe import Probe, ProbeTask
from xkd_fast.data.sources import SourceSet
from xkd_fast.data.workers import require_workers, run_tasks
from xkd_fast.files import write_aside

KINDS = ("container", "video", "pixels", "side", "fps", "audio", "sample_rate", "channels", "sound")
SHORTEST_SIDES = (144, 240, 360, 480, 720, 1080, 1440, 2160)  # pixels; classes of sizes


@dataclass(frozen=True)
class Audit:
    """What was found."""

    files: dict[str, Probe]  # by path, as found: every file once, however many parts of it are sources
    sizes: dict[str, int]  # bytes
    missing: list[str]  # names of sources without a file
    duplicates: list[list[str]]  # paths of files of the same bytes
    not_compared: dict[str, str]  # why files that have others of their size could not be read through, by path
    sources: int  # as prepare would list them: files, and parts of files
    estimate: Estimate | None  # None where no file is there

    @property
    def readable(self) -> list[Probe]:
        """Files that could be opened and whose first picture could be decoded."""
        return [probe for probe in self.files.values() if probe.problem is None]

    @property
    def unreadable(self) -> dict[str, str]:
        """Why the other files could not, by path."""
        return {path: probe.problem for path, probe in self.files.items() if probe.problem is not None}

    @property
    def seconds(self) -> list[float]:
        """Lengths by the files' headers, ascending; files that do not say have none."""
        return sorted(probe.seconds for probe in self.readable if probe.seconds is not None)

    def counts(self) -> dict[str, Counter[str]]:
        """How many readable files there are of each container, codec, size, rate, …"""
        found: dict[str, Counter[str]] = {kind: Counter() for kind in KINDS}
        for probe in self.readable:
            for kind in KINDS:
                found[kind][_told(probe, kind)] += 1
        return found

    def summary(self) -> dict[str, Any]:
        """The figures, for JSON."""
        seconds, surplus = self.seconds, [path for group in self.duplicates for path in group[1:]]
        return {
            "sources": self.sources,
            "files": len(self.files),
            "bytes": sum(size for size in self.sizes.values() if size > 0),
            "readable": len(self.readable),
            "unreadable": len(self.unreadable),
            "missing": len(self.missing),
            "duplicates": {
                "groups": len(self.duplicates),
                "surplus_files": len(surplus),
                "surplus_bytes": sum(self.sizes[path] for path in surplus),
                "not_compared": len(self.not_compared),
            },
            "without_picture": sum(probe.video is None for probe in self.readable),
            "sound": dict(Counter(probe.sound for probe in self.readable)),
            "seconds": {
                "of_files": len(seconds),
                "total": sum(seconds),
                "median": statistics.median(seconds) if seconds else None,
                "shortest": seconds[0] if seconds else None,
                "longest": seconds[-1] if seconds else None,
            },
            "counts": {kind: dict(counter.most_common()) for kind, counter in self.counts().items()},
            "estimate": None if self.estimate is None else asdict(self.estimate),
        }


def _told(probe: Probe, kind: str) -> str:
    if kind == "side":
        reached = [side for side in SHORTEST_SIDES if side <= min(probe.width, probe.height)]
        return "none" if probe.video is None else f"{reached[-1]}+" if reached else f"below {SHORTEST_SIDES[0]}"
    value = getattr(probe, kind)
    if kind == "fps":
        return "none" if probe.video is None else "not told" if value is None else f"{value:.3g}"
    if kind in ("sample_rate", "channels"):
        return "none" if probe.audio is None else str(value)
    return value or "none"


def audit(
    sources: SourceSet,
    options: PrepareOptions | None = None,
    *,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Audit:
    """Open every file in worker processes, with a time limit for each, and look for files of the same bytes.

    Only files of the same size are read through for that. Sound is judged as `prepare` does, on the track that a shard would
    hold; that pictures are lacking or damaged inside a file is seen by `prepare` alone. Nothing is written.

    Args:
        sources: the pile.
        options: as prepare would be given: workers, time limit, and what the estimate is of.
        progress: called with (files done, files in all).

    Raises:
        UserError: ``options.workers`` below 0.
    """
    options = options or PrepareOptions()
    workers = options.workers or processors()
    require_workers(workers)
    sizes = {source.path: source.size for source in sources.present}
    alike: dict[int, list[str]] = defaultdict(list)
    for path, size in sizes.items():
        if size > 0:
            alike[size].append(path)
    twins = [path for group in alike.values() if len(group) > 1 for path in group]
    total, done = len(sizes) + len(twins), 0

    def run(function: str, paths: Sequence[str], tasks: Sequence[Any]) -> dict[str, Any]:
        nonlocal done
        found: dict[str, Any] = {}
        with contextlib.closing(run_tasks(function, tasks, workers=workers, seconds=options.seconds_per_file)) as outcomes:
            for outcome in outcomes:
                problem = f"{(outcome.failure or '').replace('_', ' ')}: {outcome.detail}"
                found[paths[outcome.index]] = outcome.result if outcome.failure is None else Probe(problem)
                done += 1
                progress(done, total)
        return {path: found[path] for path in paths}

    tasks = [ProbeTask(path, options.fps, options.sample_rate) for path in sizes]
    files = run("xkd_fast.data.probe:probe", list(sizes), tasks)
    same: dict[str, list[str]] = defaultdict(list)
    not_compared: dict[str, str] = {}
    for path, content in run("xkd_fast.data.probe:digest", twins, twins).items():
        if isinstance(content, Probe):
            not_compared[path] = content.problem or ""
        else:
            same[content].append(path)
    return Audit(
        files=files,
        sizes=sizes,
        missing=[source.name for source in sources.missing],
        duplicates=sorted(group for group in same.values() if len(group) > 1),
        not_compared=not_compared,
        sources=len(sources.sources),
        estimate=estimate(sources, options) if sizes else None,
    )


def write_json(found: Audit, path: Path) -> None:
    """Write the summary, and what was found of every file, as JSON; replaces ``path`` in one step."""
    files = {name: {"bytes": found.sizes[name], **asdict(probe)} for name, probe in found.files.items()}
    lists = {"missing_files": found.missing, "duplicate_files": found.duplicates, "not_compared_files": found.not_compared}
    text = json.dumps({**found.summary(), **lists, "by_file": files}, indent=2)
    write_aside(path, text.encode())
