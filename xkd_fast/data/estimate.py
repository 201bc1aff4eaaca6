"""What a prepare would come to: some sources converted and thrown away, the rest estimated from them."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from xkd_fast.data.convert import Converted, ConvertTask, Skipped, convert
from xkd_fast.data.prepare import PrepareOptions, choose_codec, convert_task, processors, shards_of, shuffle
from xkd_fast.data.sources import SourceSet
from xkd_fast.data.spool import discard, size_of
from xkd_fast.data.workers import require_workers, run_tasks

TRIED = 12  # sources converted for an estimate
MEMBER_OVERHEAD = 3 * 768 + 700  # bytes of a sample in a tar beside its streams: headers, padding, description; and its index


@dataclass(frozen=True)
class Trial:
    """What a source came to: its time in a worker, seconds, and the bytes of its sample or why there is none."""

    seconds: float
    bytes: int
    reason: str | None


@dataclass(frozen=True)
class Estimate:
    """What preparing all sources would come to, estimated from a few of them."""

    sources: int  # files that are there
    shards: int  # at most; an empty one is written too
    workers: int
    tried: int
    skipped: dict[str, int]  # of those tried, by reason, the most frequent first
    bytes: float  # of all shards
    seconds: float  # of the whole run


def try_source(task: ConvertTask) -> Trial:
    """Convert a source, for its time and size alone. Runs in a worker process."""
    start = time.perf_counter()
    result = convert(task)
    seconds = time.perf_counter() - start
    if isinstance(result, Skipped):
        return Trial(seconds, 0, result.reason)
    assert isinstance(result, Converted)
    size = MEMBER_OVERHEAD
    for stream in (result.video, result.audio):
        if stream is not None:
            size += size_of(stream)
            discard(stream)
    return Trial(seconds, size, None)


def estimate(sources: SourceSet, options: PrepareOptions, *, destination: Path | None = None, tried: int = TRIED) -> Estimate:
    """Convert up to ``tried`` sources, picked by a hash of their names, write nothing, and estimate the rest.

    A ``destination`` that was begun has its say in the codec, where that is ``auto``.

    Raises:
        UserError: ``options.workers`` below 0.
    """
    options, _ = choose_codec(options, destination)
    workers = options.workers or processors()
    require_workers(workers)
    present = sources.present
    chosen = shuffle(present, options.seed + 1)[:tried]
    size, seconds, skipped = 0, 0.0, Counter[str]()
    with (
        tempfile.TemporaryDirectory(prefix="xkd-fast-") as spools,
        contextlib.closing(
            run_tasks(
                "xkd_fast.data.estimate:try_source",
                [convert_task(source, options, Path(spools) / str(number)) for number, source in enumerate(chosen)],
                workers=min(workers, len(chosen)) or 1,
                seconds=options.seconds_per_file,
            )
        ) as outcomes,
    ):
        for outcome in outcomes:
            trial = outcome.result
            if outcome.failure is not None:
                skipped["unreadable" if outcome.failure == "raised" else outcome.failure] += 1
                seconds += options.seconds_per_file if outcome.failure == "timed_out" else 0.0
                continue
            size, seconds = size + trial.bytes, seconds + trial.seconds
            if trial.reason is not None:
                skipped[trial.reason] += 1
    share = len(present) / max(1, len(chosen))
    return Estimate(
        sources=len(present),
        shards=len(shards_of(sources, options)),
        workers=workers,
        tried=len(chosen),
        skipped=dict(skipped.most_common()),
        bytes=size * share,
        seconds=seconds * share / workers,
    )
