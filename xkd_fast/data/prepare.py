"""From a folder of videos to a shard set: ``xkd-fast prepare SRC DST``.

Sources are shuffled by a hash of their names and cut into shards in that order, so the assignment depends on nothing that
happens while they are converted. A finished shard is never done again: an interrupted run goes on with the first one that is
missing and ends with the same files. Whatever cannot be used is skipped, counted and listed in ``report.csv``.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import json
import os
import zlib
from collections import Counter
from collections.abc import Generator, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from xkd_fast.data.convert import Converted, ConvertTask, Skipped
from xkd_fast.data.shards import FORMAT, MANIFEST, NewSample, ShardWriter, index_path, read_json
from xkd_fast.data.video_codecs import AUTO, AUTO_REASON, CODECS, encoder_quality, quality_scales
from xkd_fast.data.workers import PAUSE, Outcome, require_workers, run_tasks
from xkd_fast.errors import UserError
from xkd_fast.files import InUse, aside, sole_use, write_aside
from xkd_fast.model.options import FORBID_EXTRA, option, require

VIDEO_SUFFIXES = frozenset(
    """.3gp .asf .avi .divx .f4v .flv .m2ts .m2v .m4a .m4v .mkv .mov .mp4 .mpeg .mpg .mts .mxf .ogm .ogv .ts .vob .webm
    .wmv""".split()  # noqa: SIM905
)
PLAN = "prepare.json"
REPLACEABLE = "replaceable"  # in a plan: a later call with replace=True may remove the shards
REPORT = "report.csv"
REPORT_COLUMNS = ("source", "status", "reason", "detail", "key", "shard", "frames")
AHEAD = 64  # sources converted ahead of a slow one, at most; bounds memory


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
        require(self.workers >= 0, f"workers = {self.workers} must be 0 or more")
        require(0 < self.seconds_per_file <= 86400, f"seconds_per_file = {self.seconds_per_file} must lie in 0-86400, above 0")

    @property
    def encoder_quality(self) -> int:
        """The quality given, or the codec's default; the codec has been chosen."""
        return encoder_quality(self.codec, self.quality)

    def content(self) -> dict[str, Any]:
        """The options that shape the shards: not how, or how fast, they are made. The codec has been chosen."""
        content = asdict(self) | {"quality": self.encoder_quality}
        return {name: content[name] for name in content if name not in ("workers", "seconds_per_file")}


@dataclass(frozen=True)
class Source:
    """A video and its class."""

    name: str  # path below the source folder, forward slashes
    class_name: str | None
    size: int  # bytes; -1 where it cannot be read


@dataclass
class PrepareReport:
    """What a run of prepare came to."""

    written: int
    skipped: Counter[str] = field(default_factory=Counter)
    shards: int = 0
    converted_now: int = 0  # sources handled by this call; the rest stood already

    @property
    def sources(self) -> int:
        """Videos found."""
        return self.written + sum(self.skipped.values())


def find_sources(root: Path) -> list[Source]:
    """Videos below ``root``, sorted by name; the first folder of a path is the class.

    Raises:
        UserError: no such folder, one that cannot be listed, or no video in it.
    """
    if not root.is_dir():
        raise UserError(f"{root} is not a folder; name the folder that holds the videos, in one sub-folder per class")
    sources = [
        Source(name, name.split("/", 1)[0] if "/" in name else None, _size(root / name)) for name in sorted(_video_names(root))
    ]
    if not sources:
        raise UserError(f"{root} holds no video; files with one of these endings count: {' '.join(sorted(VIDEO_SUFFIXES))}")
    return sources


def _video_names(root: Path) -> Iterator[str]:
    """Paths of videos below ``root``. Links to folders are followed, but not back into a folder that the path came through."""
    waiting: list[tuple[str, frozenset[tuple[int, int]]]] = [("", frozenset())]
    while waiting:
        folder, above = waiting.pop()
        try:
            status = os.stat(root / folder)
            entries = list(os.scandir(root / folder))
        except OSError as error:
            raise UserError(f"{root / folder} cannot be listed: {error.strerror}; make it readable or remove it") from error
        identity = (status.st_dev, status.st_ino)
        if identity in above:
            continue
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if _is_folder(entry):
                waiting.append((f"{folder}{entry.name}/", above | {identity}))
            elif os.path.splitext(entry.name)[1].lower() in VIDEO_SUFFIXES:
                yield folder + entry.name


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:  # converting it will tell why
        return -1


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself, or into a place that may not be seen
        return False


def shuffle(sources: list[Source], seed: int) -> list[Source]:
    """The sources in an order that depends on their names and the seed alone."""

    def rank(source: Source) -> bytes:
        return hashlib.sha256(f"{seed}\n{source.name}".encode("utf-8", "surrogateescape")).digest()

    return sorted(sources, key=rank)


def plan_of(sources: list[Source], options: PrepareOptions) -> dict[str, Any]:
    """What identifies a run: its options and its sources. A folder is only continued by the same plan."""
    names = "\0".join(f"{source.name}\0{source.size}" for source in sources).encode("utf-8", "surrogateescape")
    digest = hashlib.sha256(names).hexdigest()
    return {"format": FORMAT, "options": options.content(), "sources": len(sources), "names_and_sizes": digest}


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
        options = stored.get("options")
        for name, value in plan["options"].items():
            earlier = options.get(name) if isinstance(options, dict) else None
            if earlier != value:
                raise UserError(
                    f"{destination} was prepared with {name} = {earlier}, this call asks for {value}; "
                    "choose another folder, or delete this one"
                )
        if any(stored.get(name) != plan[name] for name in plan if name != REPLACEABLE):
            raise UserError(
                f"{destination} was prepared from {stored.get('sources')} videos, and the source folder now holds "
                f"{plan['sources']} or others, by name or size; choose another folder, or delete this one"
            )
        return
    if any(entry.name != aside(path).name for entry in destination.iterdir()):  # that one is of a call that was cut off here
        raise UserError(f"{destination} holds files that are not shards of prepare; choose an empty or a new folder")
    write_aside(path, json.dumps(plan, indent=2).encode())


def choose_codec(options: PrepareOptions, destination: Path) -> tuple[PrepareOptions, str]:
    """Options with a codec in the place of ``auto``, and why this one; as they are, without a word, where one is named."""
    if options.codec != "auto":
        return options, ""
    if begun := _begun_with(destination):
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
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    options: PrepareOptions | None = None,
    *,
    replace: bool = False,
    console: Console | None = None,
) -> PrepareReport:
    """Turn a folder of videos into a shard set; call again after an interruption to go on.

    Args:
        source: folder of videos; sub-folders of it are the classes.
        destination: folder of the shards.
        options: sizes, codec, workers.
        replace: remove shards of other sources or options rather than refuse the folder, if they were prepared so themselves.
        console: where progress is shown.

    Raises:
        UserError: no videos, a destination that belongs to something else, is in use or cannot be written, or no video that
            could be used.
    """
    options, console = options or PrepareOptions(), console or Console()
    root, destination = Path(source), Path(destination)
    workers = options.workers or _processors()
    require_workers(workers)
    sources = shuffle(find_sources(root), options.seed)
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
            return _prepare(root, destination, sources, options, workers, console)
    except InUse as error:
        raise UserError(f"another prepare is writing to {destination}; wait for it, or stop it") from error
    except OSError as error:
        place = f" ({error.filename})" if error.filename else ""
        raise UserError(
            f"preparing {destination} failed: {error.strerror}{place}; mend that, then call again to go on"
        ) from error


def _processors() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _prepare(
    root: Path, destination: Path, sources: list[Source], options: PrepareOptions, workers: int, console: Console
) -> PrepareReport:
    """Write the shards that are missing, then report and manifest."""
    classes = sorted({entry.class_name for entry in sources if entry.class_name is not None})
    size = options.samples_per_shard
    shards = [sources[start : start + size] for start in range(0, len(sources), size)]
    missing = [number for number in range(len(shards)) if not _is_whole(_tar(destination, number))]
    done = len(sources) - sum(len(shards[number]) for number in missing)

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.fields[note]}"), console=console, disable=not missing) as progress:
        bar = progress.add_task(f"preparing {escape(destination.name)}", total=len(sources), completed=done, note="")
        skipped = 0
        with contextlib.closing(_convert_in_order(root, shards, missing, options, workers)) as outcomes:
            for number in missing:
                writer = ShardWriter(destination, _name(number), options.codec)
                rows = []
                try:
                    for place, entry in enumerate(shards[number]):
                        row = _store(writer, entry, number * size + place, next(outcomes), classes, options.fps)
                        rows.append(row)
                        skipped += row["status"] == "skipped"
                        progress.update(bar, advance=1, note=f"{skipped} skipped" if skipped else "")
                    writer.close({"report": rows})
                except BaseException:
                    writer.abandon()
                    raise
    return _finish(destination, len(shards), classes, options, converted_now=len(sources) - done)


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


def _convert_in_order(
    root: Path, shards: list[list[Source]], missing: list[int], options: PrepareOptions, workers: int
) -> Generator[Outcome, None, None]:
    """Outcomes of all sources of the missing shards, in their order; conversion runs ahead by a bounded number."""
    returned = 0

    def tasks() -> Iterator[Any]:
        given = 0
        for number in missing:
            for entry in shards[number]:
                while given - returned >= AHEAD + workers:
                    yield PAUSE
                given += 1
                yield ConvertTask(
                    path=str(root / entry.name),
                    codec=options.codec,
                    fps=options.fps,
                    short_side=options.short_side,
                    sample_rate=options.sample_rate,
                    min_seconds=options.min_seconds,
                    quality=options.encoder_quality,
                )

    waiting: dict[int, Outcome] = {}
    converting = run_tasks("xkd_fast.data.convert:convert", tasks(), workers=workers, seconds=options.seconds_per_file)
    with contextlib.closing(converting):
        for outcome in converting:
            waiting[outcome.index] = outcome
            while returned in waiting:
                ready = waiting.pop(returned)
                returned += 1
                yield ready


def _store(
    writer: ShardWriter, source: Source, number: int, outcome: Outcome, classes: list[str], fps: float
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
    writer.add(
        NewSample(
            key=key,
            label=classes.index(source.class_name) if source.class_name is not None else -1,
            video=result.video,
            audio=result.audio,
            frames=result.frames,
            samples=result.samples,
            height=result.height,
            width=result.width,
            details={
                "class": source.class_name,
                "source": source.name,
                "duration": result.frames / fps,
                "offset": result.audio_offset,
            },
        )
    )
    return row | {"status": "written", "key": key, "shard": writer.path.name, "frames": result.frames}


def _finish(
    destination: Path, shards: int, classes: list[str], options: PrepareOptions, *, converted_now: int
) -> PrepareReport:
    """Write report and manifest from the shards' indexes; the manifest comes last and makes the set whole."""
    rows: list[dict[str, Any]] = []
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
    manifest = {
        "format": FORMAT,
        "codec": options.codec,
        "fps": options.fps,
        "short_side": options.short_side,
        "sample_rate": options.sample_rate,
        "classes": classes,
        "samples": written,
        "shards": entries,
        "skipped": dict(sorted(skipped.items())),
        "options": options.content(),
    }
    write_aside(destination / MANIFEST, json.dumps(manifest, indent=2).encode())
    return PrepareReport(written, skipped, shards, converted_now)
