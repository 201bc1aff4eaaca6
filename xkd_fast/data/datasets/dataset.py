"""What every data set's file is made of: its description, its annotation files, and the media of its entries."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from xkd_fast.data.sources import (
    MEDIA_SUFFIXES,
    Source,
    SourceSet,
    csv_rows,
    file_size,
    media_names,
    read_text,
    segment_name,
)
from xkd_fast.errors import UserError

MISSING_WARNING = 0.05  # share of a split without a file, above which the user is warned
_YOUTUBE_ID = re.compile(r"[\w-]{11}")


@dataclass(frozen=True)
class Request:
    """What is asked of a data set."""

    root: Path  # folder of the media
    split: str
    fold: int  # from 1; 0 = the data set has none
    annotations: Path | None  # folder of the annotation files; None = the usual places in and beside ``root``


@dataclass(frozen=True, slots=True)  # there are 2 million of AudioSet's
class Entry:
    """A line of a split: what it is called, which files may hold it, and its classes."""

    name: str  # for the report where no file is found
    classes: tuple[str, ...]
    line: int
    stem: str | None = None  # name, without ending, of its file; None = it is a part, start to end, of a recording
    start: float = 0.0  # seconds, of a part
    end: float = 0.0
    folder: str | None = None  # preferred where several files have the name
    recording: str = ""  # what entries share that were cut from one recording; empty = not known

    @property
    def stems(self) -> tuple[str, ...]:
        """Names, without ending, that a file may have which holds it and nothing else."""
        return (self.stem,) if self.stem is not None else part_stems(self.recording, self.start, self.end)


def part_stems(recording: str, start: float, end: float) -> tuple[str, ...]:
    """Names under which a part of a recording is usually stored: its start, and perhaps its end, in s or ms."""
    s, e, ms, me = round(start), round(end), round(1000 * start), round(1000 * end)
    tails = [f"{s}", f"{start:.3f}", f"{start:.1f}", f"{s:06d}", f"{s}_{e}", f"{start:.3f}_{end:.3f}", f"{s:06d}_{e:06d}"]
    tails += [f"{ms}_{me}"] + ([f"{ms}"] if ms else [])
    return tuple(dict.fromkeys(f"{recording}_{tail}" for tail in tails))


@dataclass(frozen=True)
class Listing:
    """What a data set's annotation files say of a split."""

    entries: list[Entry]
    classes: list[str]  # in the order of their numbers
    elsewhere: list[Entry] = field(default_factory=list)  # of the other side of the split (test for train), as far as known
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class DataSet:
    """A data set that ``--dataset`` knows."""

    name: str  # on the command line
    title: str
    classes: int  # of the official release; 0 = none has a say
    splits: tuple[str, ...]  # the first is the default
    read: Callable[[DataSet, Request], Listing]
    annotations: tuple[str, ...]  # official names of the files that are read
    published: str  # where these are to be had
    places: tuple[str, ...] = ()  # folders in or beside the media where the release has them
    folds: int = 0  # 0 = one split only
    media: str = ""  # how its files are named
    options: Mapping[str, str] = field(default_factory=dict)  # options of prepare that differ from the usual default
    note: str = ""  # what its user should know

    def request(self, root: Path, split: str | None, fold: int | None, annotations: Path | None) -> Request:
        """Check what was asked for.

        Raises:
            UserError: a split or fold that the data set has not, or a folder that is none.
        """
        split = self.splits[0] if split is None else split
        if split not in self.splits:
            raise UserError(f"--split {split} is none of {self.title}'s: {', '.join(self.splits)}")
        if fold is not None and not self.folds:
            raise UserError(f"--fold {fold}: {self.title} has one split only; leave --fold out")
        if fold is not None and not 1 <= fold <= self.folds:
            raise UserError(f"--fold {fold} must lie in 1-{self.folds} for {self.title}")
        for what, folder in (("SOURCE", root), ("--annotations", annotations)):
            if folder is not None and not folder.is_dir():
                raise UserError(f"{what} {folder} is not a folder; name the one that holds {self.title}")
        return Request(root, split, (fold or 1) if self.folds else 0, annotations)

    def folders(self, request: Request) -> list[Path]:
        """Where annotation files are looked for, in this order."""
        if request.annotations is not None:
            return [request.annotations, *(request.annotations / place for place in self.places)]
        bases = [request.root, Path(os.path.abspath(request.root)).parent]
        return [base / place for base in bases for place in ("", "annotations", *self.places)]

    def find(self, request: Request, *names: str) -> Path | None:
        """An annotation file under one of its names, if it is there."""
        places = (folder / name for folder in self.folders(request) for name in names)
        return next((place for place in places if place.is_file()), None)

    def require(self, request: Request, *names: str) -> Path:
        """An annotation file under one of its names, the first being the usual one.

        Raises:
            UserError: naming the file, where it is published, and where it was looked for.
        """
        found = self.find(request, *names)
        if found is None:
            raise self.lacks(request, names[0])
        return found

    def lacks(self, request: Request, name: str) -> UserError:
        """The error for an annotation file that is not there."""
        looked = ", ".join(str(folder) for folder in dict.fromkeys(self.folders(request)))
        return UserError(
            f"{name}, an annotation file of {self.title}, was not found in {looked}; it is published at {self.published}: "
            "put it there, or name its folder with --annotations"
        )


def table_rows(path: Path, columns: Sequence[str], optional: Sequence[str] = ()) -> Iterator[tuple[int, dict[str, str]]]:
    """Line numbers and rows of a csv with a header.

    Raises:
        UserError: naming the line, if a column is lacking or a row is longer or shorter than the header.
    """
    rows = csv_rows(path, read_text(path, "an annotation file"))
    number, header = next(rows, (1, []))
    names = [name.strip() for name in header]
    lacking = [name for name in columns if name not in names]
    if lacking:
        known = ",".join([*columns, *optional])
        raise UserError(
            f"{path}, line {number}: the header {','.join(names)!r} lacks {', '.join(lacking)}; the official file has {known}"
        )
    for number, row in rows:
        if len(row) != len(names):
            raise UserError(f"{path}, line {number}: {len(row)} cells where the header has {len(names)}; fetch the file again")
        yield number, {name: cell.strip() for name, cell in zip(names, row, strict=True)}


def text_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbers and texts of the lines that are not blank."""
    for number, line in enumerate(read_text(path, "an annotation file").splitlines(), start=1):
        if line.strip():
            yield number, line.strip()


def wrong(path: Path, line: int, problem: str) -> UserError:
    """The error for a line of an annotation file."""
    return UserError(f"{path}, line {line}: {problem}; take the official file, or mend the line")


def number_in(path: Path, line: int, what: str, text: str) -> float:
    """A number of 0 or more.

    Raises:
        UserError: naming the line.
    """
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1e6:
        raise wrong(path, line, f"{what} {text!r} is no number of 0 or more")
    return value


def youtube_id(path: Path, line: int, text: str) -> str:
    """A video's name on YouTube: 11 letters, digits, ``-`` or ``_``.

    Raises:
        UserError: naming the line.
    """
    if not _YOUTUBE_ID.fullmatch(text):
        raise wrong(path, line, f"{text!r} is no YouTube id, which has 11 letters, digits, - or _")
    return text


def span(path: Path, line: int, start: str, end: str) -> tuple[float, float]:
    """Start and end of a clip, seconds.

    Raises:
        UserError: naming the line.
    """
    first, last = number_in(path, line, "start", start), number_in(path, line, "end", end)
    if last <= first:
        raise wrong(path, line, f"the end {last:g} does not come after the start {first:g}")
    return first, last


def without_repeats(path: Path, entries: Iterable[Entry], warnings: list[str]) -> list[Entry]:
    """The entries, each once. What is listed twice with the same classes is noted.

    Raises:
        UserError: an entry that is listed with other classes the second time: nobody could tell which are right.
    """
    seen: dict[str, Entry] = {}
    repeated = 0
    for entry in entries:
        first = seen.setdefault(entry.name, entry)
        if first is entry:
            continue
        if first.classes != entry.classes:
            raise wrong(
                path,
                entry.line,
                f"{entry.name} is of class {_told(entry.classes)}, in line {first.line} it was of class {_told(first.classes)}",
            )
        repeated += 1
    if repeated:
        warnings.append(f"{path} lists {repeated} entries twice; each is taken once")
    return list(seen.values())


def _told(classes: tuple[str, ...]) -> str:
    return ", ".join(classes) or "none"


def check_leak(dataset: DataSet, listing: Listing, warnings: list[str]) -> None:
    """Compare the two sides of a split.

    Raises:
        UserError: an entry on both sides. Such a list is not the official one, and accuracies on it would mean nothing.
    """
    other = {entry.name for entry in listing.elsewhere}
    both = [entry for entry in listing.entries if entry.name in other]
    if both:
        raise UserError(
            f"{len(both)} of {len(listing.entries)} entries of this split of {dataset.title} are in the other one too, such as "
            f"{both[0].name} (line {both[0].line}): training would see what is tested; take the official files from "
            f"{dataset.published}"
        )
    recordings = {entry.recording for entry in listing.elsewhere} - {""}
    shared = sum(entry.recording in recordings for entry in listing.entries)
    if shared:
        warnings.append(
            f"{shared} of {len(listing.entries)} entries were cut from recordings of which the other split of {dataset.title} "
            "holds parts as well: accuracies will look better than they are"
        )


class MediaIndex:
    """Media files below a folder, by their name without ending."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.names: dict[str, list[str]] = defaultdict(list)
        for name in sorted(media_names(root, MEDIA_SUFFIXES)):
            self.names[os.path.splitext(name.rsplit("/", 1)[-1])[0]].append(name)
        self.files = sum(map(len, self.names.values()))
        self.doubtful = 0  # entries for which several files were found

    def find(self, stems: Sequence[str], folder: str | None) -> str | None:
        """The file of the first of these names that is there; of several, the one in ``folder``, or the first."""
        for stem in stems:
            found = self.names.get(stem)
            if found:
                fitting = [name for name in found if folder is not None and folder in name.split("/")[:-1]] or found
                self.doubtful += len(fitting) > 1
                return fitting[0]
        return None


def assemble(dataset: DataSet, request: Request, listing: Listing) -> SourceSet:
    """The sources of a split: its entries, with their files.

    Raises:
        UserError: an entry that is on both sides of the split, or no file for any of them.
    """
    warnings = list(listing.warnings)
    check_leak(dataset, listing, warnings)
    if not listing.entries:
        raise UserError(
            f"the {request.split} split of {dataset.title} is empty; take the official files of {dataset.published}"
        )
    if dataset.classes and len(listing.classes) != dataset.classes:
        warnings.append(f"{len(listing.classes)} classes, where the official {dataset.title} has {dataset.classes}")
    media = MediaIndex(request.root)
    sources = [_source(entry, media) for entry in listing.entries]
    about = {"dataset": dataset.name, "split": request.split} | ({"fold": request.fold} if request.fold else {})
    found = SourceSet(sources, listing.classes, about, warnings)
    if not found.present:
        raise UserError(
            f"none of the {len(sources)} files of {dataset.title}'s {request.split} split lies below {request.root}, which "
            f"holds {media.files} media files; they are looked for as {dataset.media}, such as {listing.entries[0].name}"
        )
    taken: dict[str, str] = {}
    for source, entry in zip(sources, listing.entries, strict=True):
        if not source.missing and taken.setdefault(source.name, entry.name) != entry.name:
            raise UserError(
                f"{source.path} is the only file found for both {taken[source.name]} and {entry.name} of {dataset.title}; "
                "put their files into folders as the release has them"
            )
    share = len(found.missing) / len(sources)
    if share > MISSING_WARNING:
        warnings.append(
            f"{len(found.missing)} of {len(sources)} files of the split ({100 * share:.0f} %) are missing, such as "
            f"{found.missing[0].name}: numbers measured on the rest are not those of {dataset.title}"
        )
    if media.doubtful:
        warnings.append(f"{media.doubtful} entries have several files of their name; the first by path was taken")
    return found


def _source(entry: Entry, media: MediaIndex) -> Source:
    start: float | None = None
    end: float | None = None
    name = media.find(entry.stems, entry.folder)
    if name is None and entry.stem is None:
        name, start, end = media.find((entry.recording,), entry.folder), entry.start, entry.end
    if name is None:
        return Source(entry.name, str(media.root / entry.name), entry.classes, missing=True)
    path = media.root / name
    return Source(segment_name(name, start, end), str(path), entry.classes, start, end, file_size(path))
