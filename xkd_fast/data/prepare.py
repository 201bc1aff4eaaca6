"""From videos to a shard set: ``xkd-fast prepare SRC DST``.

Sources are shuffled by a hash of their names and cut into shards in that order, so the assignment depends on nothing that
happens while they are converted. A finished shard is never done again: an interrupted run goes on with the first one that is
missing and ends with the same files. Whatever cannot be used is skipped, counted and listed in ``report.csv``.
"""

from __future__ import annotations

import contextlib
import csv
import datetime
import hashlib
import io
import json
import os
import time
import zlib
from collections import Counter
from collections.abc import Generator, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from xkd_fast.data.convert import Converted, ConvertTask, Skipped
from xkd_fast.data.shards import FORMAT, MANIFEST, NewSample, ShardWriter, index_path, read_json
from xkd_fast.data.sources import MEDIA_SUFFIXES, VIDEO_SUFFIXES, Source, SourceSet, find_sources
from xkd_fast.data.video_codecs import AUTO, AUTO_REASON, CODECS, encoder_quality, quality_scales
from xkd_fast.data.workers import PAUSE, Outcome, require_workers, run_tasks
from xkd_fast.errors import UserError
from xkd_fast.files import InUse, aside, sole_use, write_aside
from xkd_fast.model.options import FORBID_EXTRA, option, require

PLAN = "prepare.json"
REPLACEABLE = "replaceable"  # in a plan: a later call with replace=True may remove the shards
REPORT = "report.csv"
REPORT_COLUMNS = ("source", "status", "reason", "detail", "key", "shard", "frames")
WITHOUT_AUDIO, WITHOUT_VIDEO = "without audio", "without video"  # details of sources that were written
CONVERTER = 2  # of the code that turns a source into a sample; another one gives other pictures or sound
AHEAD = 4096  # sources converted ahead of a slow one, at most,
AHEAD_BYTES = 512 * 2**20  # and what they may take; both bound memory


@dataclass(frozen=True)
class PrepareOptions:
    """What becomes of every source video."""

    __pydantic_config__ = FORBID_EXTRA

    codec: Literal["auto", "mjpeg", "h264", "vp9", "mosaic", "yuv"] = option(
        "auto",
        "video codec of the shards, all but h264 for CPUs too; auto = as the folder was begun, else one is chosen and named",
    )
    fps: float = option(8.0, "frames per second of the shards, constant")
    short_side: int = option(128, "shorter side of the frames, pixels, even; the aspect is kept")
    sample_rate: int = option(16000, "audio samples per second of the shards, mono")
    min_seconds: float = option(0.25, "videos shorter than this are skipped, seconds; 0 = none")
    quality: int | None = option(None, f"encoder quality, lower is better: {quality_scales()}; only with a codec by name")
    samples_per_shard: int = option(512, "sources per shard, before skipping")
    seed: int = option(0, "seed of the order of samples over shards")
    missing_audio: Literal["skip", "keep-as-video-only"] = option(
        "skip",
        "videos whose sound is missing or silent: left out, or kept for evaluation of video alone; never filled with zeros",
    )
    missing_video: Literal["skip", "keep-as-audio-only"] = option(
        "skip", "files without picture: left out, or kept for evaluation of sound alone"
    )
    workers: int = option(0, "processes that convert; 0 = one per core")
    seconds_per_file: float = option(300.0, "time limit of one source, seconds; then it is skipped as timed_out")

    def __post_init__(self) -> None:
        require(
            self.codec == "auto" or self.codec in CODECS, f"codec = {self.codec!r} must be one of auto, {', '.join(CODECS)}"
        )
        require(0.1 <= self.fps <= 240, f"fps = {self.fps} must lie in 0.1-240")
        require(
            16 <= self.short_side <= 4096 and self.short_side % 2 == 0,
            f"short_side = {self.short_side} must be an even number of pixels in 16-4096",
        )
        require(8000 <= self.sample_rate <= 96000, f"sample_rate = {self.sample_rate} must lie in 8000-96000 Hz")
        require(0 <= self.min_seconds <= 86400, f"min_seconds = {self.min_seconds} must lie in 0-86400")
        if self.codec == "auto":
            problem = f"quality = {self.quality} needs a codec by name, since each has its own scale: {quality_scales()}"
            require(self.quality is None, problem)
        else:
            encoder_quality(self.codec, self.quality)
        require(self.samples_per_shard >= 1, f"samples_per_shard = {self.samples_per_shard} must be 1 or more")
        require(0 <= self.seed < 2**63, f"seed = {self.seed} must lie in 0-{2**63 - 1}")
        audio, video = ("skip", "keep-as-video-only"), ("skip", "keep-as-audio-only")
        require(self.missing_audio in audio, f"missing_audio = {self.missing_audio!r} must be {' or '.join(audio)}")
        require(self.missing_video in video, f"missing_video = {self.missing_video!r} must be {' or '.join(video)}")
        require(self.workers >= 0, f"workers = {self.workers} must be 0 or more")
        require(0 < self.seconds_per_file <= 86400, f"seconds_per_file = {self.seconds_per_file} must lie in 0-86400, above 0")

    @property
    def encoder_quality(self) -> int:
        """The quality given, or the codec's default; the codec has been chosen."""
        return encoder_quality(self.codec, self.quality)

    @property
    def suffixes(self) -> frozenset[str]:
        """Endings of the files in a folder that count: of videos, and of sounds where these are kept."""
        return VIDEO_SUFFIXES if self.missing_video == "skip" else MEDIA_SUFFIXES

    def content(self) -> dict[str, Any]:
        """The options that shape the shards: not how, or how fast, they are made. The codec has been chosen."""
        content = asdict(self) | {"quality": self.encoder_quality}
        return {name: content[name] for name in content if name not in ("workers", "seconds_per_file")}


@dataclass
class PrepareReport:
    """What a run of prepare came to."""

    written: int
    skipped: Counter[str] = field(default_factory=Counter)
    shards: int = 0
    converted_now: int = 0  # sources handled by this call; the rest stood already
    without_audio: int = 0  # of those written
    without_video: int = 0  # of those written

    @property
    def sources(self) -> int:
        """Videos found."""
        return self.written + sum(self.skipped.values())


def shuffle(sources: list[Source], seed: int) -> list[Source]:
    """The sources in an order that depends on their names and the seed alone."""

    def rank(source: Source) -> bytes:
        return hashlib.sha256(f"{seed}\n{source.name}".encode("utf-8", "surrogateescape")).digest()

    return sorted(sources, key=rank)


def plan_of(sources: SourceSet, options: PrepareOptions) -> dict[str, Any]:
    """What identifies a run: its options and its sources. A folder is only continued by the same plan."""
    ordered = shuffle(sources.sources, options.seed)
    names = _digest(f"{source.name}\0{source.size}" for source in ordered)
    plan: dict[str, Any] = {"format": FORMAT, "converter": CONVERTER, "options": options.content()}
    plan |= {"sources": len(ordered), "names_and_sizes": names}
    if missing := [source.name for source in ordered if source.missing]:
        plan["missing"] = _digest(missing)
    if sources.about:  # in a folder the names tell the classes
        labels = _digest("\0".join(source.classes) for source in ordered)
        plan |= {"about": sources.about, "labels": _digest([labels, *sources.classes])}
    return plan


def _digest(texts: Iterable[str]) -> str:
    return hashlib.sha256("\0".join(texts).encode("utf-8", "surrogateescape")).hexdigest()


def check_plan(destination: Path, plan: dict[str, Any]) -> None:
    """Note the plan in a folder that is empty, or refuse a folder that belongs to another one.

    Raises:
        UserError: naming what differs.
    """
    path = destination / PLAN
    if path.is_file():
        stored = read_json(path, "the plan of an earlier prepare", "choose another folder, or delete this one")
        if stored.get("format") != plan["format"]:
            raise UserError(
                f"{destination} was prepared in format {stored.get('format')!r}, this version writes format {plan['format']}; "
                "choose another folder, or delete this one"
            )
        if stored.get("converter", 1) != plan["converter"]:
            raise UserError(
                f"{destination} was prepared by another version, whose pictures and sound differ from this one's (a whole set "
                "can be trained on as it is); choose another folder, or delete this one"
            )
        options, usual = stored.get("options"), PrepareOptions(codec="mjpeg").content()  # codec and quality were always noted
        for name, value in plan["options"].items():
            earlier = options.get(name, usual[name]) if isinstance(options, dict) else None
            if earlier != value:
                raise UserError(
                    f"{destination} was prepared with {name} = {earlier}, this call asks for {value}; "
                    "choose another folder, or delete this one"
                )
        if stored.get("about") != plan.get("about"):
            raise UserError(
                f"{destination} was prepared from {_told(stored.get('about'))}, this call names {_told(plan.get('about'))}; "
                "choose another folder, or delete this one"
            )
        if any(stored.get(name) != plan.get(name) for name in {*plan, "missing"} - {REPLACEABLE, "options"}):
            folder = "about" not in plan
            now = "the source folder now holds" if folder else "this call names"
            what = "name or size" if folder else "name, class or size"
            raise UserError(
                f"{destination} was prepared from {stored.get('sources')} videos, and {now} "
                f"{plan['sources']} or others, by {what}; choose another folder, or delete this one"
            )
        return
    if any(entry.name != aside(path).name for entry in destination.iterdir()):  # that one is of a call that was cut off here
        raise UserError(f"{destination} holds files that are not shards of prepare; choose an empty or a new folder")
    write_aside(path, json.dumps(plan, indent=2).encode())


def _told(about: object) -> str:
    return "a folder of videos" if about is None else json.dumps(about, ensure_ascii=False)


def choose_codec(options: PrepareOptions, destination: Path | None) -> tuple[PrepareOptions, str]:
    """Options with a codec in the place of ``auto``, and why this one; as they are, without a word, where one is named."""
    if options.codec != "auto":
        return options, ""
    if destination is not None and (begun := _begun_with(destination)):
        return replace(options, codec=begun), f"codec auto: {begun}, which {destination} was begun with"
    return replace(options, codec=AUTO), f"codec auto: {AUTO}, {AUTO_REASON}"


def _begun_with(destination: Path) -> Any:
    """The codec of the plan in a folder; None where there is none, or none that makes sense."""
    try:
        codec = json.loads((destination / PLAN).read_text(encoding="utf-8"))["options"]["codec"]
        return codec if codec in CODECS else None
    except (OSError, ValueError, KeyError, TypeError):  # what is damaged, `check_plan` refuses
        return None


def _is_replaceable(destination: Path) -> bool:
    """Whether a folder says that a later prepare may replace what it holds; what users prepared by themselves never does."""
    try:
        return json.loads((destination / PLAN).read_text(encoding="utf-8")).get(REPLACEABLE) is True
    except (OSError, ValueError, AttributeError):
        return False


def _continues(destination: Path, plan: dict[str, Any]) -> bool:
    try:
        check_plan(destination, plan)
    except UserError:
        return False
    return True


def _remove_shards(destination: Path) -> None:
    """Remove what prepare wrote, the plan last: cut off in between, the folder is still prepare's own."""
    for path in (*destination.glob("shard-[0-9]*"), *(destination / name for name in (REPORT, MANIFEST, PLAN))):
        path.unlink(missing_ok=True)


def prepare(
    source: str | os.PathLike[str] | SourceSet,
    destination: str | os.PathLike[str],
    options: PrepareOptions | None = None,
    *,
    replace: bool = False,
    console: Console | None = None,
) -> PrepareReport:
    """Turn videos into a shard set; call again after an interruption to go on.

    Args:
        source: folder of videos, whose sub-folders are the classes; or any sources.
        destination: folder of the shards.
        options: sizes, codec, workers.
        replace: remove shards of other sources or options rather than refuse the folder, if they were prepared so themselves.
        console: where progress is shown.

    Raises:
        UserError: no videos, a destination that belongs to something else, is in use or cannot be written, or no video that
            could be used.
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
            if replace and _is_replaceable(destination) and not _continues(destination, plan):
                _remove_shards(destination)
            check_plan(destination, plan)
            if reason:
                console.print(escape(reason), soft_wrap=True, highlight=False)
            return _prepare(destination, sources, options, workers, console)
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
    check_plan(destination, plan_of(sources, choose_codec(options, destination)[0]))
    return sum(_is_whole(_tar(destination, number)) for number in range(len(shards_of(sources, options))))


def _prepare(destination: Path, sources: SourceSet, options: PrepareOptions, workers: int, console: Console) -> PrepareReport:
    """Write the shards that are missing, then report and manifest."""
    numbers = {name: number for number, name in enumerate(sources.classes)}
    shards = shards_of(sources, options)
    size, total = options.samples_per_shard, sum(map(len, shards))
    missing = [number for number in range(len(shards)) if not _is_whole(_tar(destination, number))]
    done = total - sum(len(shards[number]) for number in missing)

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    shown = bool(missing) and console.is_terminal
    with Progress(*columns, TextColumn("{task.fields[note]}"), console=console, disable=not shown) as progress:
        bar = progress.add_task(f"preparing {escape(destination.name)}", total=total, completed=done, note="")
        skipped, plain = 0, _PlainProgress(console, destination.name, done, total)
        with contextlib.closing(_convert_in_order(shards, missing, options, workers)) as outcomes:
            for number in missing:
                writer = ShardWriter(destination, _name(number), options.codec)
                rows = []
                try:
                    for place, entry in enumerate(shards[number]):
                        row = _store(writer, entry, number * size + place, next(outcomes), numbers, options)
                        rows.append(row)
                        skipped += row["status"] == "skipped"
                        progress.update(bar, advance=1, note=f"{skipped} skipped" if skipped else "")
                        plain.advance(skipped)
                    writer.close({"report": rows})
                except BaseException:
                    writer.abandon()
                    raise
    return _finish(destination, len(shards), sources, options, converted_now=total - done)


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


def _is_whole(tar: Path) -> bool:
    """Whether a shard stands: its index, which is written last, and a tar of the size that the index says."""
    try:
        return tar.stat().st_size == read_json(index_path(tar), "the index of a shard").get("bytes")
    except (OSError, UserError):
        return False


def convert_task(source: Source, options: PrepareOptions) -> ConvertTask:
    """What a worker is to do with a source."""
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
    )


def _convert_in_order(
    shards: list[list[Source]], missing: list[int], options: PrepareOptions, workers: int
) -> Generator[Outcome, None, None]:
    """Outcomes of all sources of the missing shards, in their order; conversion runs ahead of a slow one, within bounds."""
    returned = held = 0

    def tasks() -> Iterator[Any]:
        given = 0
        for number in missing:
            for entry in shards[number]:
                while given - returned >= AHEAD + workers or (held >= AHEAD_BYTES and given > returned):
                    yield PAUSE
                given += 1
                yield convert_task(entry, options)

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


def _bytes(outcome: Outcome) -> int:
    """What a finished source takes until it is its turn to be written."""
    result = outcome.result
    return sum(len(part or b"") for part in (result.video, result.audio)) if isinstance(result, Converted) else 0


def _store(
    writer: ShardWriter, source: Source, number: int, outcome: Outcome, numbers: dict[str, int], options: PrepareOptions
) -> dict[str, Any]:
    """Write a source's sample, if it gave one; returns its row of the report."""
    row: dict[str, Any] = dict.fromkeys(REPORT_COLUMNS, "") | {"source": source.name, "status": "skipped"}
    result = outcome.result
    if outcome.failure is not None:
        reason = "unreadable" if outcome.failure == "raised" else outcome.failure
        return row | {"reason": reason, "detail": outcome.detail}
    if isinstance(result, Skipped):
        return row | {"reason": result.reason, "detail": result.detail}
    assert isinstance(result, Converted)
    key = f"{number:08d}"
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


def _finish(
    destination: Path, shards: int, sources: SourceSet, options: PrepareOptions, *, converted_now: int
) -> PrepareReport:
    """Write report and manifest from the shards' indexes; the manifest comes last and makes the set whole."""
    absent = {"status": "skipped", "reason": "missing", "detail": "there is no such file"}
    rows = [dict.fromkeys(REPORT_COLUMNS, "") | absent | {"source": source.name} for source in sources.missing]
    entries = []
    for number in range(shards):
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
    skipped = Counter(row["reason"] for row in rows if row["status"] == "skipped")
    written = sum(entry["samples"] for entry in entries)
    if written == 0:
        reasons = ", ".join(f"{count} {reason}" for reason, count in skipped.most_common())
        raise UserError(f"none of {len(rows)} videos could be used: {reasons}; see {destination / REPORT}")
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
    return PrepareReport(written, skipped, shards, converted_now, lacking[WITHOUT_AUDIO], lacking[WITHOUT_VIDEO])
