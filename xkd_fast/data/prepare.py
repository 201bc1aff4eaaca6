"""From videos to a shard set: ``xkd-fast prepare SRC DST``.

Sources are shuffled by a hash of their names and cut into shards in that order, so the assignment depends on nothing that
happens while they are converted. A finished shard is never done again: an interrupted run goes on with the first one that is
missing and ends with the same files. Whatever cannot be used is skipped, counted and listed in ``report.csv``.
"""

from __future__ import annotations

import contextlib
import csv
import datetime
import io
import json
import os
import shutil
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from xkd_fast.amounts import count_of
from xkd_fast.data.convert import Converted, ConvertTask, Skipped
from xkd_fast.data.prepare_options import PrepareOptions
from xkd_fast.data.prepare_plan import (
    PLAN,
    REPLACEABLE,
    REPORT,
    begin,
    check_plan,
    choose_codec,
    continues,
    holds_no_sample,
    plan_of,
    shuffle,
)
from xkd_fast.data.shards import FORMAT, MANIFEST, NewSample, ShardWriter, StandingShard, index_path, read_json
from xkd_fast.data.sources import Source, SourceSet, find_sources
from xkd_fast.data.spool import NotStored, Payload
from xkd_fast.data.workers import PAUSE, Outcome, require_workers, run_tasks
from xkd_fast.errors import UserError
from xkd_fast.files import InUse, aside, sole_use, write_aside

REPORT_COLUMNS = ("source", "status", "reason", "detail", "key", "shard", "frames", "bytes")  # the last one: of the source
WITHOUT_AUDIO, WITHOUT_VIDEO = "without audio", "without video"  # details of sources that were written
RETRIED = ("timed_out", "crashed", "unreadable")  # reasons that may be the machine's, its load's or its file system's
SPOOLS = ".converting-"  # how the folder of long streams begins, inside the destination
AHEAD = 4096  # sources converted ahead of a slow one, at most,
AHEAD_BYTES = 512 * 2**20  # and what they may take; both bound memory


@dataclass
class PrepareReport:
    """What a run of prepare came to."""

    written: int
    skipped: Counter[str] = field(default_factory=Counter)
    shards: int = 0
    converted_now: int = 0  # sources handled by this call; the rest stood already
    without_audio: int = 0  # of those written
    without_video: int = 0  # of those written
    retried: int = 0  # sources that an earlier call could not read and this one tried again
    recovered: int = 0  # of those retried, now written
    rewritten: int = 0  # shards that stood and have others' samples now

    @property
    def sources(self) -> int:
        """Videos found."""
        return self.written + sum(self.skipped.values())


def prepare(
    source: str | os.PathLike[str] | SourceSet,
    destination: str | os.PathLike[str],
    options: PrepareOptions | None = None,
    *,
    retry: bool = False,
    replace: bool = False,
    console: Console | None = None,
) -> PrepareReport:
    """Turn videos into a shard set; call again after an interruption to go on.

    Args:
        source: folder of videos, whose sub-folders are the classes; or any sources.
        destination: folder of the shards.
        options: sizes, codec, workers.
        retry: try sources of finished shards once more that timed out, crashed or were unreadable. A shard that gets a sample
            by that is written again, with what it held copied, and is then as if its source had been read at once.
        replace: remove shards of other or changed sources, or other options, rather than refuse the folder, if they were
            prepared so themselves.
        console: where progress is shown.

    Raises:
        UserError: no videos, a destination that belongs to something else, is in use or cannot be written, a video of a
            finished shard that has changed since, or no video that could be used.
    """
    options, console = options or PrepareOptions(), console or Console()
    destination = Path(destination)
    workers = options.workers or processors()
    require_workers(workers)
    sources = source if isinstance(source, SourceSet) else find_sources(Path(source), options.suffixes)
    if destination.exists() and not destination.is_dir():
        raise UserError(f"{destination} is a file; name a folder for the shards")
    try:
        destination.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{destination} cannot be made a folder ({error.strerror}); name another one for the shards") from error
    try:
        with sole_use(destination):
            options, reason = choose_codec(options, destination)
            plan = plan_of(sources, options) | ({REPLACEABLE: True} if replace else {})
            changed = partial(_have_changed, destination, sources, options)
            for sentence in (begin(destination, plan, anew=replace, changed=changed), reason):
                if sentence:
                    console.print(escape(sentence), soft_wrap=True, highlight=False)
            return _prepare(destination, sources, options, workers, console, retry)
    except InUse as error:
        raise UserError(f"another prepare is writing to {destination}; wait for it, or stop it") from error
    except OSError as error:
        place = f" ({error.filename})" if error.filename else ""
        raise UserError(
            f"preparing {destination} failed: {error.strerror}{place}; mend that, then call again to go on"
        ) from error


def processors() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def shards_of(sources: SourceSet, options: PrepareOptions) -> list[list[Source]]:
    """Which sources go into which shard; those whose files are missing go into none."""
    present, size = shuffle(sources.present, options.seed), options.samples_per_shard
    return [present[start : start + size] for start in range(0, len(present), size)]


def standing_shards(sources: SourceSet, destination: Path, options: PrepareOptions) -> int:
    """How many shards of these sources stand in a folder already; writes nothing.

    Raises:
        UserError: a folder that `prepare` would refuse.
    """
    if destination.exists() and not destination.is_dir():
        raise UserError(f"{destination} is a file; name a folder for the shards")
    if not destination.is_dir() or all(entry.name == aside(destination / PLAN).name for entry in destination.iterdir()):
        return 0
    plan = plan_of(sources, choose_codec(options, destination)[0])
    if holds_no_sample(destination) and not continues(destination, plan):
        return 0
    check_plan(destination, plan)
    shards = shards_of(sources, options)
    return len(shards) - sum(work.standing is None for work in _work(destination, shards, retry=False)[0])


@dataclass(frozen=True)
class _Work:
    """A shard to be written: all of its sources, or those of a finished one that are tried again."""

    number: int
    sources: list[Source]  # of the whole shard
    places: range | list[int]  # of the sources to convert
    standing: StandingShard | None = None  # what the other sources came to

    @property
    def chosen(self) -> list[Source]:
        """The sources to convert."""
        return [self.sources[place] for place in self.places]


def _work(destination: Path, shards: list[list[Source]], retry: bool) -> tuple[list[_Work], list[Source]]:
    """The shards that are missing, and with ``retry`` those with sources to try again; and the sources left for a retry.

    Raises:
        UserError: a source whose sample stands has changed since.
    """
    work: list[_Work] = []
    left: list[Source] = []
    for number, sources in enumerate(shards):
        index = _standing(destination, number, sources)
        if index is None:
            work.append(_Work(number, sources, range(len(sources))))
            continue
        _require_unchanged(destination, sources, index["report"])
        changed = {place for place, row in enumerate(index["report"]) if _has_changed(sources[place], row)}
        again = [place for place, row in enumerate(index["report"]) if row["reason"] in RETRIED or place in changed]
        if retry and again:
            work.append(_Work(number, sources, again, StandingShard(_tar(destination, number))))
        elif not retry:
            left += [sources[place] for place in sorted(changed)]
    return work, left


def _standing(destination: Path, number: int, sources: list[Source]) -> dict[str, Any] | None:
    """The index of a shard of so many sources that stands; None where it does not, or is of others."""
    index = standing_index(_tar(destination, number))
    return index if index is not None and len(index["report"]) == len(sources) else None


def _has_changed(source: Source, row: dict[str, Any]) -> bool:
    """Whether a file can be reached and has not the size that it had when its row was written."""
    return source.size >= 0 and row.get("bytes") != source.size


def _changed(sources: list[Source], rows: list[dict[str, Any]]) -> Iterator[tuple[Source, dict[str, Any]]]:
    """The sources of a shard whose samples stand and whose files have changed since, with their rows."""
    for source, row in zip(sources, rows, strict=True):
        if row["status"] == "written" and row.get("bytes") != "" and _has_changed(source, row):
            yield source, row


def _have_changed(destination: Path, sources: SourceSet, options: PrepareOptions) -> bool:
    """Whether a sample stands whose source has changed since."""
    shards = enumerate(shards_of(sources, options))
    indexes = ((own, _standing(destination, number, own)) for number, own in shards)
    return any(any(_changed(own, index["report"])) for own, index in indexes if index is not None)


def _require_unchanged(destination: Path, sources: list[Source], rows: list[dict[str, Any]]) -> None:
    for source, row in _changed(sources, rows):
        raise UserError(
            f"{source.path} has {source.size} bytes, and had {row.get('bytes')} when its sample in {destination} was made; "
            f"restore it, or delete {row['shard']} there to have that shard made again"
        )


def standing_samples(destination: str | os.PathLike[str]) -> tuple[int, int]:
    """How many samples, in how many finished shards, stand in a folder."""
    found = [index for tar in Path(destination).glob("shard-[0-9]*.tar") if (index := standing_index(tar)) is not None]
    return sum(len(index["samples"]) for index in found), len(found)


def _prepare(
    destination: Path, sources: SourceSet, options: PrepareOptions, workers: int, console: Console, retry: bool
) -> PrepareReport:
    """Write the shards that are missing, then report and manifest."""
    numbers = {name: number for number, name in enumerate(sources.classes)}
    shards = shards_of(sources, options)
    (work, left), total = _work(destination, shards, retry), sum(map(len, shards))
    if left:
        told = f"{count_of(len(left), 'source')} skipped before, such as {left[0].name!r}, changed since: --retry tries again"
        console.print(escape(told), soft_wrap=True, highlight=False)
    now = sum(len(each.places) for each in work)
    done = total - now
    report = PrepareReport(0, shards=len(shards), converted_now=now)

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    shown = bool(work) and console.is_terminal
    with (
        Progress(*columns, TextColumn("{task.fields[note]}"), console=console, disable=not shown) as progress,
        _spools(destination) as spools,
        contextlib.closing(_convert_in_order(work, options, workers, spools)) as outcomes,
    ):
        bar = progress.add_task(f"preparing {escape(destination.name)}", total=total, completed=done, note="")
        skipped, plain = 0, _PlainProgress(console, destination.name, done, total)
        for each in work:
            writer = ShardWriter(destination, _name(each.number), options.codec)
            rows: list[dict[str, Any]] = []
            fresh = set(each.places)
            try:
                for place, entry in enumerate(each.sources):
                    if place not in fresh:
                        rows.append(_keep(writer, each.standing, place))
                        continue
                    key = f"{each.number * options.samples_per_shard + place:08d}"
                    rows.append(_store(writer, entry, key, next(outcomes), numbers, options))
                    skipped += rows[-1]["status"] == "skipped"
                    progress.update(bar, advance=1, note=f"{skipped} skipped" if skipped else "")
                    plain.advance(skipped)
                _close(writer, rows, each, destination / MANIFEST, report)
            except BaseException:
                writer.abandon()
                raise
    return _finish(destination, sources, options, report)


def _close(writer: ShardWriter, rows: list[dict[str, Any]], work: _Work, manifest: Path, report: PrepareReport) -> None:
    """Put a shard in its place, unless it would be the one that stands."""
    if work.standing is not None:
        report.retried += len(work.places)
        report.recovered += sum(rows[place]["status"] == "written" for place in work.places)
        if [_verdict(row) for row in rows] == [_verdict(row) for row in work.standing.index["report"]]:
            writer.abandon()
            if rows != work.standing.index["report"]:  # skipped as before, with other details
                manifest.unlink(missing_ok=True)
                write_aside(index_path(work.standing.path), json.dumps(work.standing.index | {"report": rows}).encode())
            return
        report.rewritten += 1
        manifest.unlink(missing_ok=True)  # it is of the shards as they were; without it, nobody reads half of a set
    writer.close({"report": rows})


def _verdict(row: dict[str, Any]) -> tuple[str, str]:
    return row["status"], row["reason"]


@contextlib.contextmanager
def _spools(destination: Path) -> Iterator[Path]:
    """A folder for long streams on their way into shards, which goes with the call; those of killed calls are removed."""
    for left in destination.glob(f"{SPOOLS}*"):
        shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=SPOOLS, dir=destination, ignore_cleanup_errors=True) as folder:
        yield Path(folder)


class _PlainProgress:
    """A line at every tenth where the console is no terminal, such as in a log; silent where it is one."""

    def __init__(self, console: Console, name: str, done: int, total: int) -> None:
        self._console, self._name, self._first, self._done, self._total = console, name, done, done, total
        self._begun = time.monotonic()

    def advance(self, skipped: int) -> None:
        """One source more, ``skipped`` of all so far."""
        self._done += 1
        if self._console.is_terminal or 10 * self._done // self._total == 10 * (self._done - 1) // self._total:
            return
        seconds = (time.monotonic() - self._begun) / (self._done - self._first) * (self._total - self._done)
        left = f", about {datetime.timedelta(seconds=round(seconds))} left" if self._done < self._total else ""
        line = f"preparing {self._name}: {self._done} of {self._total}, {skipped} skipped{left}"
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)


def _name(number: int) -> str:
    return f"shard-{number:06d}"


def _tar(destination: Path, number: int) -> Path:
    return destination / f"{_name(number)}.tar"


def standing_index(tar: Path) -> dict[str, Any] | None:
    """The index of a shard that stands; None where it does not.

    It stands where its index, which is written last, has its two tables, which agree, and the tar the size that it says.

    Raises:
        UserError: a file of it that is there but cannot be reached; what it holds may be whole.
    """
    try:
        size, text = tar.stat().st_size, index_path(tar).read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(
            f"{error.filename}, of a finished shard, cannot be read: {error.strerror}; make it readable, "
            "or delete it to have that shard made again"
        ) from error
    try:
        index = json.loads(text)
    except ValueError:
        return None
    if not isinstance(index, dict) or size != index.get("bytes"):
        return None
    if not _is_table(index, "samples", "key") or not _is_table(index, "report", "reason"):
        return None
    written = sum(row.get("status") == "written" for row in index["report"])
    return index if written == len(index["samples"]) else None


def _is_table(index: dict[str, Any], name: str, column: str) -> bool:
    rows = index.get(name)
    return isinstance(rows, list) and all(isinstance(row, dict) and column in row for row in rows)


def convert_task(source: Source, options: PrepareOptions, spool: Path | None = None) -> ConvertTask:
    """What a worker is to do with a source; its long streams go into files whose paths begin with ``spool``."""
    return ConvertTask(
        path=source.path,
        codec=options.codec,
        fps=options.fps,
        short_side=options.short_side,
        sample_rate=options.sample_rate,
        min_seconds=options.min_seconds,
        quality=options.encoder_quality,
        start=source.start,
        end=source.end,
        without_sound=options.missing_audio == "keep-as-video-only",
        without_picture=options.missing_video == "keep-as-audio-only",
        spool=None if spool is None else str(spool),
    )


def _convert_in_order(work: list[_Work], options: PrepareOptions, workers: int, spools: Path) -> Generator[Outcome, None, None]:
    """Outcomes of all sources to convert, in their order; conversion runs ahead of a slow one, within bounds.

    The files of an outcome's streams are deleted when the next one is asked for.
    """
    returned = held = 0

    def tasks() -> Iterator[Any]:
        given = 0
        for each in work:
            for entry in each.chosen:
                while given - returned >= AHEAD + workers or (held >= AHEAD_BYTES and given > returned):
                    yield PAUSE
                yield convert_task(entry, options, spools / str(given))
                given += 1

    waiting: dict[int, Outcome] = {}
    converting = run_tasks("xkd_fast.data.convert:convert", tasks(), workers=workers, seconds=options.seconds_per_file)
    with contextlib.closing(converting):
        for outcome in converting:
            waiting[outcome.index] = outcome
            held += _bytes(outcome)
            while returned in waiting:
                ready = waiting.pop(returned)
                returned, held = returned + 1, held - _bytes(ready)
                yield ready
                for left in spools.glob(f"{ready.index}.*"):
                    left.unlink(missing_ok=True)


def _bytes(outcome: Outcome) -> int:
    """What a finished source takes of memory until it is its turn to be written."""
    result = outcome.result
    parts: tuple[Payload | None, ...] = (result.video, result.audio) if isinstance(result, Converted) else ()
    return sum(len(part) for part in parts if isinstance(part, bytes))


def _keep(writer: ShardWriter, standing: StandingShard | None, place: int) -> dict[str, Any]:
    """Copy the sample of a source, if it gave one, from the shard that stands; returns its row of the report."""
    assert standing is not None, "a new shard converts all of its sources"
    row: dict[str, Any] = standing.index["report"][place]
    if row["status"] == "written":
        writer.add(standing.sample(row["key"]))
    return row


def _store(
    writer: ShardWriter, source: Source, key: str, outcome: Outcome, numbers: dict[str, int], options: PrepareOptions
) -> dict[str, Any]:
    """Write a source's sample, if it gave one; returns its row of the report."""
    row: dict[str, Any] = dict.fromkeys(REPORT_COLUMNS, "") | {"source": source.name, "status": "skipped"}
    if source.size >= 0:
        row["bytes"] = source.size
    result = outcome.result
    if isinstance(result, NotStored):
        raise OSError(result.errno, result.strerror, result.path)
    if outcome.failure is not None:
        reason = "unreadable" if outcome.failure == "raised" else outcome.failure
        return row | {"reason": reason, "detail": outcome.detail}
    if isinstance(result, Skipped):
        return row | {"reason": result.reason, "detail": result.detail}
    assert isinstance(result, Converted)
    labels = sorted(numbers[name] for name in source.classes)
    seconds = result.samples / options.sample_rate if result.video is None else result.frames / options.fps
    writer.add(
        NewSample(
            key=key,
            label=labels[0] if len(labels) == 1 else -1,
            video=result.video,
            audio=result.audio,
            frames=result.frames,
            samples=result.samples,
            height=result.height,
            width=result.width,
            details={
                "class": source.classes[0] if len(labels) == 1 else None,
                "classes": list(source.classes),
                "source": source.name,
                "duration": seconds,
                "offset": result.audio_offset,
            },
            labels=tuple(labels) if len(labels) > 1 else (),
        )
    )
    lacking = WITHOUT_VIDEO if result.video is None else WITHOUT_AUDIO if result.audio is None else ""
    return row | {"status": "written", "detail": lacking, "key": key, "shard": writer.path.name, "frames": result.frames}


def _finish(destination: Path, sources: SourceSet, options: PrepareOptions, report: PrepareReport) -> PrepareReport:
    """Write report and manifest from the shards' indexes; the manifest comes last and makes the set whole."""
    absent = {"status": "skipped", "reason": "missing", "detail": "there is no such file"}
    rows = [dict.fromkeys(REPORT_COLUMNS, "") | absent | {"source": source.name} for source in sources.missing]
    entries = []
    for number in range(report.shards):
        tar = _tar(destination, number)
        index = read_json(index_path(tar), "the index of a shard")
        rows += index["report"]
        entry = {"name": tar.name, "samples": len(index["samples"]), "bytes": index["bytes"]}
        entries.append(entry | {"index_crc32": zlib.crc32(index_path(tar).read_bytes())})
    text = io.StringIO(newline="")
    table = csv.DictWriter(text, REPORT_COLUMNS)
    table.writeheader()
    table.writerows(sorted(rows, key=lambda row: row["source"]))
    write_aside(destination / REPORT, text.getvalue().encode("utf-8", "backslashreplace"))
    skipped = report.skipped = Counter(row["reason"] for row in rows if row["status"] == "skipped")
    written = report.written = sum(entry["samples"] for entry in entries)
    if written == 0:
        reasons = ", ".join(f"{count} {reason}" for reason, count in skipped.most_common())
        again = " and call again with --retry" if any(skipped[reason] for reason in RETRIED) else ""
        raise UserError(
            f"none of {len(rows)} videos could be used: {reasons}; see {destination / REPORT}; "
            f"mend that{again}, or prepare the folder with other options or sources"
        )
    lacking = Counter(row["detail"] for row in rows if row["status"] == "written")
    manifest = {
        "format": FORMAT,
        "codec": options.codec,
        "fps": options.fps,
        "short_side": options.short_side,
        "sample_rate": options.sample_rate,
        "classes": sources.classes,
        **({"about": sources.about} if sources.about else {}),
        "samples": written,
        "without_audio": lacking[WITHOUT_AUDIO],
        "without_video": lacking[WITHOUT_VIDEO],
        "shards": entries,
        "skipped": dict(sorted(skipped.items())),
        "options": options.content(),
    }
    write_aside(destination / MANIFEST, json.dumps(manifest, indent=2).encode())
    report.without_audio, report.without_video = lacking[WITHOUT_AUDIO], lacking[WITHOUT_VIDEO]
    return report
