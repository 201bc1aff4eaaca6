"""Where samples come from: files on disk, the part of each that counts, and its classes.

A folder of class folders is one way to say that, a list is another (``--list``), and `xkd_fast.data.datasets` knows those of
the usual data sets.
"""

from __future__ import annotations

import csv
import errno
import io
import math
import os
import re
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from xkd_fast.amounts import count_of
from xkd_fast.errors import UserError

VIDEO_SUFFIXES = frozenset(
    """.264 .265 .3g2 .3gp .asf .avi .divx .dv .f4v .flv .h264 .h265 .hevc .ivf .m1v .m2ts .m2v .m4a .m4v .mjpeg .mjpg .mkv
    .mov .mp4 .mpe .mpeg .mpg .mts .mxf .nut .ogm .ogv .qt .rm .rmvb .ts .vob .webm .wmv .y4m""".split()  # noqa: SIM905
)
SOUND_SUFFIXES = frozenset(".aac .aif .aiff .au .flac .m4a .mka .mp3 .oga .ogg .opus .wav .wma".split())  # noqa: SIM905
MEDIA_SUFFIXES = VIDEO_SUFFIXES | SOUND_SUFFIXES
LIST_COLUMNS = ("path", "label", "start", "end")
HEADER_FORM = "path[,label[,start[,end]]]"
HEADER_WORDS = frozenset(("class", "clip", "end", "file", "filename", "id", "label", "name", "path", "start", "url", "video"))
LABEL_SEPARATOR = "|"
LOST_AND_FOUND = "lost+found"  # at the root of a disk of its own; its administrator alone may list it


@dataclass(frozen=True, slots=True)  # a large data set has millions
class Source:
    """A file, or a part of one, and its classes."""

    name: str  # unlike every other's; how reports call it
    path: str
    classes: tuple[str, ...] = ()  # none, one, or several
    start: float | None = None  # seconds of the file's own time line; None = from its beginning
    end: float | None = None  # seconds; None = to its end
    size: int = -1  # bytes; -1 where that cannot be read
    missing: bool = False  # named by a list, but there is no such file


@dataclass(frozen=True)
class SourceSet:
    """Sources that become one shard set."""

    sources: list[Source]
    classes: list[str]  # in the order of their numbers
    about: dict[str, Any] = field(default_factory=dict)  # for the manifest: data set, split, …; part of the plan as well
    warnings: list[str] = field(default_factory=list)  # sentences for the user

    @property
    def present(self) -> list[Source]:
        """The sources whose files are there."""
        return [source for source in self.sources if not source.missing]

    @property
    def missing(self) -> list[Source]:
        """The sources whose files are not there."""
        return [source for source in self.sources if source.missing]


def sorted_classes(sources: Sequence[Source]) -> list[str]:
    """All classes of the sources, sorted."""
    return sorted({name for source in sources for name in source.classes})


def segment_name(path: str, start: float | None, end: float | None) -> str:
    """How reports call a part of a file: as in media fragments, ``path#t=START,END``."""
    if start is None and end is None:
        return path
    return f"{path}#t={0 if start is None else start:.15g}" + ("" if end is None else f",{end:.15g}")


def find_sources(root: Path, suffixes: Collection[str] = VIDEO_SUFFIXES) -> SourceSet:
    """Files below ``root`` with one of these endings, sorted by name; the first folder of a path is the class.

    Raises:
        UserError: no such folder, one that cannot be listed, or no video in it.
    """
    if not root.is_dir():
        raise UserError(f"{root} is not a folder; name the folder that holds the videos, in one sub-folder per class")
    left_out: Counter[str] = Counter()
    sources = [
        Source(
            name,
            str(root / name),
            (name.split("/", 1)[0],) if "/" in name else (),
            size=file_size(root / name),
        )
        for name in sorted(media_names(root, suffixes, left_out))
    ]
    if not sources:
        sounds = sum(left_out[suffix] for suffix in SOUND_SUFFIXES.difference(suffixes))
        more = f"; of its {sounds} sounds, samples are made with --missing-video keep-as-audio-only" if sounds else ""
        raise UserError(f"{root} holds no video; files with one of these endings count: {' '.join(sorted(suffixes))}{more}")
    warnings = []
    if left_out:
        most = ", ".join(f"{count} {suffix or 'without one'}" for suffix, count in left_out.most_common(8))
        files = count_of(left_out.total(), "file")
        warnings.append(f"left out by their endings: {files} of {root} ({most}); a --list may name any")
    return SourceSet(sources, sorted_classes(sources), warnings=warnings)


def media_names(root: Path, suffixes: Collection[str], left_out: Counter[str] | None = None) -> Iterator[str]:
    """Paths below ``root``, with forward slashes, of files with one of these endings (in small letters).

    A link to a folder is followed, but into no folder that the path came through, nor one that holds files of the same class
    already: links among folders would multiply their files. Hidden names are passed over, and so is a disk's ``lost+found`` in
    ``root``. ``left_out`` counts files with other endings, by these.

    Raises:
        UserError: a folder that cannot be listed.
    """
    waiting, links = [("", frozenset[tuple[int, int]]())], list[tuple[str, frozenset[tuple[int, int]]]]()
    seen: set[tuple[str, int, int]] = set()
    while waiting or links:  # folders themselves before links to them, so that names do not depend on the file system's order
        folder, above = waiting.pop() if waiting else links.pop()
        try:
            status = os.stat(root / folder)
            entries = sorted(os.scandir(root / folder), key=lambda entry: entry.name, reverse=True)
        except OSError as error:
            raise UserError(f"{root / folder} cannot be listed: {error.strerror}; make it readable or remove it") from error
        identity = (status.st_dev, status.st_ino)
        if identity in above or (folder.split("/", 1)[0], *identity) in seen:
            continue
        seen.add((folder.split("/", 1)[0], *identity))
        for entry in entries:
            if entry.name.startswith(".") or (not folder and entry.name == LOST_AND_FOUND):
                continue
            if _is_folder(entry):
                (links if entry.is_symlink() else waiting).append((f"{folder}{entry.name}/", above | {identity}))
            elif (suffix := os.path.splitext(entry.name)[1].lower()) in suffixes:
                yield folder + entry.name
            elif left_out is not None:
                left_out[suffix] += 1


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself, or into a place that may not be seen
        return False


def file_size(path: str | os.PathLike[str]) -> int:
    """Bytes of a file; -1 where that cannot be read (converting it will tell why)."""
    try:
        return os.stat(path).st_size
    except OSError:
        return -1


def is_missing(path: str | os.PathLike[str]) -> bool:
    """Whether there is no such file; one that cannot be reached (a folder without rights, a server away) may be there."""
    try:
        os.lstat(path)
    except OSError as error:
        return error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG)
    return False


# ------------------------------------------------------------------------------------------------------------------- lists


def read_list(path: Path) -> SourceSet:
    """Sources that a file lists: a csv with the header ``path[,label[,start[,end]]]``, or one path a line.

    Lines end as on any system. Paths count from the list's folder, or are absolute. A label is a class, several separated by
    ``|``, or empty; start and end are seconds of the file's own time line, or empty. Files that do not exist are kept, as
    missing.

    Raises:
        UserError: naming the line, if a row breaks these rules or repeats another; or if nothing is listed, or no file exists.
    """
    sources: list[Source] = []
    lines: dict[tuple[str, float | None, float | None], int] = {}
    for line, row in _list_rows(path):
        source = _listed(path, line, row)
        key = (os.path.normpath(source.path), source.start or None, source.end)  # from 0 is from the beginning
        if key in lines:
            raise UserError(
                f"{path}, line {line}: {source.name!r} was named in line {lines[key]} already; remove one of the two "
                f"(several classes of one source are written A{LABEL_SEPARATOR}B)"
            )
        lines[key] = line
        sources.append(source)
    if not sources:
        raise UserError(f"{path} lists no file; write one path a line, or a csv with the header {','.join(LIST_COLUMNS)}")
    listed = SourceSet(sources, sorted_classes(sources), {"list": path.name})
    if not listed.present:
        raise UserError(
            f"{path}: none of the {len(sources)} files that it lists exists, such as {sources[0].path}; "
            + (_other_header(sources[0].name) or "paths count from the list's folder, or are absolute")
        )
    return listed


def read_text(path: Path, what: str) -> str:
    """The text of a list or an annotation file; bytes that are no UTF-8 stand for themselves, as in file names.

    Raises:
        UserError: naming the file, if it cannot be read.
    """
    try:
        return path.read_bytes().decode("utf-8-sig", "surrogateescape")
    except OSError as error:
        raise UserError(f"{path}, {what}, cannot be read: {error.strerror}; name another file or make it readable") from error


def csv_rows(path: Path, text: str, *, skip_spaces: bool = False) -> Iterator[tuple[int, list[str]]]:
    """Numbers of lines (of a row's last one), and rows that are not blank.

    Raises:
        UserError: naming the line, where the text is no csv.
    """
    reader = csv.reader(io.StringIO(text, newline=""), strict=True, skipinitialspace=skip_spaces)
    try:
        for row in reader:
            if any(cell.strip() for cell in row):
                yield reader.line_num, row
    except csv.Error as error:
        raise UserError(
            f'{path}, line {reader.line_num}: {error}; write it as csv, with " around cells that hold a comma'
        ) from error


def _list_rows(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    text = read_text(path, "a list of sources")
    if "\n" not in text:  # lines as Macs ended them once, and some programs still do
        text = text.replace("\r", "\n")
    first = [cell.strip().strip('"').lower() for cell in text.lstrip().split("\n", 1)[0].split(",")]
    if "path" not in first or (first[0] != "path" and not set(first) <= set(LIST_COLUMNS)):
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                yield number, {"path": line.removesuffix("\r")}
        return
    rows = csv_rows(path, text)
    number, header = next(rows)
    columns = [name.strip().lower() for name in header]
    unknown = [name for name in columns if name not in LIST_COLUMNS]
    if unknown or len(set(columns)) < len(columns):
        raise UserError(
            f"{path}, line {number}: the header {','.join(header)} must hold path, and may hold label, start and end, each once"
        )
    for number, row in rows:
        if len(row) != len(columns):
            raise UserError(
                f"{path}, line {number}: {len(row)} cells where the header has {len(columns)}; "
                'write " around a cell that holds a comma'
            )
        yield number, dict(zip(columns, row, strict=True))


def _other_header(first: str) -> str:
    """What to write instead of the header of another kind of table; nothing where a list's first line is no such header."""
    for separator, called in (("\t", "tabs"), (";", "semicolons"), (",", "")):
        cells = [cell.strip().strip('"').lower() for cell in first.split(separator)]
        words = [word for cell in cells for word in re.split(r"[\s_]+", cell)]
        if len(cells) > 1 and not HEADER_WORDS.isdisjoint(words) and not set("./\\") & set(first):
            header = f"its first line, {first.strip()!r}, looks like a header"
            if called:
                return f"{header} of cells between {called}; write them between commas, under the header {HEADER_FORM}"
            return f"{header} of other names; write the header {HEADER_FORM}"
    return ""


def _listed(path: Path, line: int, row: dict[str, str]) -> Source:
    name = row["path"]
    if not name.strip():
        raise UserError(f"{path}, line {line}: the path is empty")
    if "\0" in name:
        raise UserError(f"{path}, line {line}: the path holds a zero byte, which no file's name does")
    classes = tuple(dict.fromkeys(part.strip() for part in row.get("label", "").split(LABEL_SEPARATOR) if part.strip()))
    where = f"{path}, line {line}"
    start, end = (_seconds(where, column, row.get(column, "")) for column in ("start", "end"))
    check_segment(where, start, end)
    file = path.parent / name
    return Source(segment_name(name, start, end), str(file), classes, start, end, file_size(file), is_missing(file))


def _seconds(where: str, column: str, text: str) -> float | None:
    if not text.strip():
        return None
    try:
        if "_" in text or not text.isascii():  # which Python takes for digits
            raise ValueError
        return float(text)
    except ValueError:
        raise UserError(f"{where}: {column} {text!r} is no number of seconds; write one such as 12.5, or nothing") from None


def check_segment(where: str, start: float | None, end: float | None) -> None:
    """Refuse a part of a file that cannot be one.

    Raises:
        UserError: beginning with ``where``, the rule and the values.
    """
    for name, value in (("start", start), ("end", end)):
        if value is not None and not (math.isfinite(value) and value >= 0):
            raise UserError(f"{where}: {name} = {value:g} must be 0 or more seconds")
    if end is not None and end <= (start or 0.0):
        raise UserError(f"{where}: end = {end:g} must come after start = {start or 0.0:g}")
