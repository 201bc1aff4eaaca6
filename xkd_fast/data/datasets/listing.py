"""A split from its lists: entries and classes, and whether these are what the official release has."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from xkd_fast.data.datasets.dataset import Annotations, DataSet, Entry, MissingAnnotation, Request
from xkd_fast.data.datasets.rows import wrong
from xkd_fast.errors import UserError


@dataclass(frozen=True)
class Listing:
    """What a data set's annotation files say of a split."""

    entries: list[Entry]
    classes: list[str]  # in the order of their numbers
    warnings: list[str] = field(default_factory=list)
    shortened: bool = False  # a list has fewer entries or classes than the official one, on purpose


def read_listing(dataset: DataSet, request: Request) -> Listing:
    """Read the lists of a split, and those of what may share nothing with it.

    Raises:
        UserError: a list that is missing, malformed, shorter than the official one (but with ``request.subset``) or empty; or
            an entry that is on both sides of the split.
    """
    files = Annotations(dataset, request)
    parts = {part: _part(files, part) for part in dataset.splits[request.split]}
    absent: dict[str, None] = {}  # names, each once
    for part in dataset.other_parts(request.split):
        try:
            parts[part] = _part(files, part)
        except MissingAnnotation as missing:
            absent[missing.name] = None
    if dataset.order is not None:
        classes = dataset.order(files)
    else:
        classes = sorted({name for entries in parts.values() for entry in entries for name in entry.classes})
    check_classes(files, classes)
    if dataset.chosen is not None:
        classes = dataset.chosen(files, classes)
        parts = {part: [entry for entry in entries if set(entry.classes) & set(classes)] for part, entries in parts.items()}
    own = dataset.splits[request.split]
    entries = without_repeats((entry for part in own for entry in parts[part]), files.warnings)
    elsewhere = [entry for part in parts if part not in own for entry in parts[part]]
    if not entries:
        raise UserError(
            f"the {request.split} split of {dataset.title} is empty; take the official files of {dataset.published}"
        )
    check_leak(files, entries, elsewhere)
    if absent:
        files.warnings.append(
            f"{' and '.join(absent)} of {dataset.title} {'was' if len(absent) == 1 else 'were'} not found, so nobody has "
            f"checked that the {request.split} split shares nothing with what is listed there"
        )
    return Listing(entries, classes, files.warnings, bool(files.shortened))


def _part(files: Annotations, part: str) -> list[Entry]:
    """The entries of a part, counted."""
    entries = list(files.dataset.read(files, part))
    official = files.dataset.sizes.get((part, files.fold), files.dataset.sizes.get((part, 0), ()))
    if official and len(entries) not in official:
        lists = dict.fromkeys(entry.file for entry in entries)
        where = str(next(iter(lists))) if len(lists) == 1 else f"the {part} part of {files.dataset.title}"
        found = f"lists {len(entries)} {'entry' if len(entries) == 1 else 'entries'} of {part}"
        expected = f"the official release {' or '.join(map(str, official))}"
        if len(entries) < max(official):
            files.is_short(where, found, expected)
        else:
            files.warnings.append(f"{where} {found}, {expected}: it is of another edition")
    return entries


def check_classes(files: Annotations, classes: list[str]) -> None:
    """Compare the number of classes with the official one; lists without any classes have no say.

    Raises:
        UserError: fewer of them, without a word that this is meant.
    """
    expected = files.dataset.classes
    if not classes or not expected or len(classes) == expected:
        return
    found = f"{len(classes)} {'class' if len(classes) == 1 else 'classes'}"
    if len(classes) < expected:
        files.is_short(f"what was found of {files.dataset.title}", f"has {found}", f"the official release {expected}")
    else:
        files.warnings.append(f"{found} of {files.dataset.title}, where the official release has {expected}")


def without_repeats(entries: Iterable[Entry], warnings: list[str]) -> list[Entry]:
    """The entries, each once. What is listed twice with the same classes is noted.

    Raises:
        UserError: an entry that is listed with other classes the second time: nobody could tell which are right.
    """
    seen: dict[str, Entry] = {}
    repeated: list[Entry] = []
    for entry in entries:
        first = seen.setdefault(entry.name, entry)
        if first is entry:
            continue
        if first.classes != entry.classes:
            before = f"line {first.line}" if first.file == entry.file else f"{first.file}, line {first.line}"
            problem = f"{entry.name} is of class {_told(entry.classes)}, in {before} it was of class {_told(first.classes)}"
            raise wrong(entry.file, entry.line, problem)
        repeated.append(entry)
    if repeated:
        warnings.append(f"{repeated[0].file} lists {len(repeated)} entries twice; each is taken once")
    return list(seen.values())


def _told(classes: tuple[str, ...]) -> str:
    return ", ".join(classes) or "none"


def check_leak(files: Annotations, entries: list[Entry], elsewhere: list[Entry]) -> None:
    """Compare the two sides of a split.

    Raises:
        UserError: an entry on both sides. Such a list is not the official one, and accuracies on it would mean nothing.
    """
    title, published = files.dataset.title, files.dataset.published
    other = {entry.name for entry in elsewhere}
    both = [entry for entry in entries if entry.name in other]
    if both:
        raise UserError(
            f"{len(both)} of {len(entries)} entries of this split of {title} are in the other one too, such as "
            f"{both[0].name} (line {both[0].line}): training would see what is tested; take the official files from {published}"
        )
    recordings = {entry.recording for entry in elsewhere} - {""}
    shared = sum(entry.recording in recordings for entry in entries)
    if shared:
        files.warnings.append(
            f"{shared} of {len(entries)} entries were cut from recordings of which the other split of {title} holds parts as "
            "well: accuracies will look better than they are"
        )
