"""What a data set's file is made of: its description, and where its annotation files are."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from xkd_fast.errors import UserError

IdFiles = Literal["auto", "clips", "videos"]  # what a file holds that is named by a YouTube id alone


@dataclass(frozen=True)
class Request:
    """What is asked of a data set."""

    root: Path  # folder of the media
    split: str
    fold: int  # from 1; 0 = the data set has none
    annotations: Path | None  # folder of the annotation files; None = the usual places in and beside ``root``
    subset: bool = False  # the lists were shortened on purpose
    id_files: IdFiles = "auto"


@dataclass(frozen=True, slots=True)  # there are 2 million of AudioSet's
class Entry:
    """A line of a list: what it is called, which files may hold it, and its classes."""

    name: str  # for the report where no file is found
    classes: tuple[str, ...]
    file: Path  # the list
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


class MissingAnnotation(UserError):
    """An annotation file that is not there."""

    def __init__(self, name: str, message: str) -> None:
        super().__init__(message)
        self.name = name


def alone(*parts: str) -> dict[str, tuple[str, ...]]:
    """The splits of a data set whose lists are used one by one."""
    return {part: (part,) for part in parts}


@dataclass(frozen=True)
class DataSet:
    """A data set that ``--dataset`` knows. Its lists are called parts; a split is one of them, or several together."""

    name: str  # on the command line
    title: str
    classes: int  # of the official release; 0 = any number
    splits: Mapping[str, tuple[str, ...]]  # their parts; the first split is the default
    read: Callable[[Annotations, str], Iterator[Entry]]  # the entries of a part, as its list has them
    annotations: tuple[str, ...]  # official names of the files that are read
    published: str  # where these are to be had
    order: Callable[[Annotations], list[str]] | None = None  # classes in their official order; None = sorted
    chosen: Callable[[Annotations, list[str]], list[str]] | None = None  # of these classes those that are taken; None = all
    # Entries by part and fold (0 = any), in each official edition; a part that is not here is not counted.
    sizes: Mapping[tuple[str, int], tuple[int, ...]] = field(default_factory=dict)
    together: tuple[str, ...] = ()  # parts that training may take all, so that no leak is looked for between them
    places: tuple[str, ...] = ()  # folders in or beside the media where the release has the annotation files
    folds: int = 0  # 0 = one split only
    media: str = ""  # how its files are named
    named_by_id: bool = False  # files may be named by a YouTube id alone
    options: Mapping[str, str] = field(default_factory=dict)  # options of prepare that differ from the usual default
    note: str = ""  # what its user should know

    def request(
        self,
        root: Path,
        split: str | None,
        fold: int | None,
        annotations: Path | None,
        *,
        subset: bool = False,
        id_files: IdFiles = "auto",
    ) -> Request:
        """Check what was asked for.

        Raises:
            UserError: a split or fold that the data set has not, a folder that is none, or a word on files that it has not.
        """
        split = next(iter(self.splits)) if split is None else split
        if split not in self.splits:
            raise UserError(f"--split {split} is none of {self.title}'s: {', '.join(self.splits)}")
        if fold is not None and not self.folds:
            raise UserError(f"--fold {fold}: {self.title} has one split only; leave --fold out")
        if fold is not None and not 1 <= fold <= self.folds:
            raise UserError(f"--fold {fold} must lie in 1-{self.folds} for {self.title}")
        for what, folder in (("SOURCE", root), ("--annotations", annotations)):
            if folder is not None and not folder.is_dir():
                raise UserError(f"{what} {folder} is not a folder; name the one that holds {self.title}")
        if id_files != "auto" and not self.named_by_id:
            raise UserError(f"--id-files {id_files}: files of {self.title} are not named by YouTube ids alone; leave it out")
        return Request(root, split, (fold or 1) if self.folds else 0, annotations, subset, id_files)

    def other_parts(self, split: str) -> list[str]:
        """Parts that may share nothing with a split."""
        own = self.splits[split]
        near = self.together if set(own) & set(self.together) else own
        parts = dict.fromkeys(part for several in self.splits.values() for part in several)
        return [part for part in parts if part not in own and part not in near]


@dataclass(frozen=True)
class Annotations:
    """The annotation files of a data set, as a request has them; and what there is to say of them."""

    dataset: DataSet
    request: Request
    warnings: list[str] = field(default_factory=list)
    shortened: list[str] = field(default_factory=list)  # lists that are shorter than the official ones, on purpose

    @property
    def fold(self) -> int:
        """Which fold is asked for; 0 = the data set has none."""
        return self.request.fold

    def folders(self) -> list[Path]:
        """Where annotation files are looked for, in this order."""
        given, places = self.request.annotations, self.dataset.places
        if given is not None:
            return [given, *(given / place for place in places)]
        bases = [self.request.root, Path(os.path.abspath(self.request.root)).parent]
        return [base / place for base in bases for place in ("", "annotations", *places)]

    def find(self, *names: str) -> Path | None:
        """An annotation file under one of its names, if it is there."""
        places = (folder / name for folder in self.folders() for name in names)
        return next((place for place in places if place.is_file()), None)

    def require(self, *names: str) -> Path:
        """An annotation file under one of its names, the first being the usual one.

        Raises:
            MissingAnnotation: naming the file, where it is published, and where it was looked for.
        """
        found = self.find(*names)
        if found is None:
            raise self.lacks(names[0])
        return found

    def lacks(self, name: str) -> MissingAnnotation:
        """The error for an annotation file that is not there."""
        looked = ", ".join(str(folder) for folder in dict.fromkeys(self.folders()))
        return MissingAnnotation(
            name,
            f"{name}, an annotation file of {self.dataset.title}, was not found in {looked}; it is published at "
            f"{self.dataset.published}: put it there, or name its folder with --annotations",
        )

    def is_short(self, what: str, found: str, expected: str) -> None:
        """Something is less than the official release has: noted where that is meant, refused where nobody said so.

        Raises:
            UserError: naming what was found and what was expected.
        """
        if not self.request.subset:
            raise UserError(
                f"{what} {found}, {expected}: it may have been cut off on its way here. Fetch it from "
                f"{self.dataset.published} again; or add --subset, if it was shortened on purpose"
            )
        self.shortened.append(what)
        self.warnings.append(f"{what} {found}, {expected}: a subset, as --subset says")
