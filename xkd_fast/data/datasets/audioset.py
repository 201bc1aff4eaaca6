"""AudioSet: ten-second parts of YouTube videos, each with one or several of 527 classes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from xkd_fast.data.datasets.dataset import (
    DataSet,
    Entry,
    Listing,
    Request,
    span,
    table_rows,
    without_repeats,
    wrong,
    youtube_id,
)
from xkd_fast.data.sources import csv_rows, read_text

LABELS = "class_labels_indices.csv"
FILES = {
    "balanced_train": ("balanced_train_segments.csv",),
    "unbalanced_train": ("unbalanced_train_segments.csv",),
    "train": ("balanced_train_segments.csv", "unbalanced_train_segments.csv"),
    "eval": ("eval_segments.csv",),
}


def _classes(path: Path) -> dict[str, str]:
    """Names of classes by their identifier, in the order of their numbers."""
    names: dict[str, str] = {}
    for place, (line, row) in enumerate(table_rows(path, ("index", "mid", "display_name"))):
        if row["index"] != str(place):
            raise wrong(path, line, f"index {row['index']!r} where {place} follows")
        if row["mid"] in names or row["display_name"] in names.values():
            raise wrong(path, line, f"class {row['display_name']!r} is listed twice")
        names[row["mid"]] = row["display_name"]
    return names


def _entries(path: Path, names: dict[str, str]) -> Iterator[Entry]:
    shared: dict[tuple[str, ...], tuple[str, ...]] = {}  # one tuple for all entries of the same classes
    for line, row in csv_rows(path, read_text(path, "an annotation file"), skip_spaces=True):
        if row[0].startswith("#"):
            continue
        if len(row) != 4:
            raise wrong(path, line, f"{len(row)} cells where YTID, start_seconds, end_seconds and positive_labels belong")
        video = youtube_id(path, line, row[0].strip())
        start, end = span(path, line, row[1], row[2])
        identifiers = [part.strip() for part in row[3].split(",")]
        unknown = [identifier for identifier in identifiers if identifier not in names]
        if unknown:
            raise wrong(path, line, f"label {unknown[0]!r} is not in {LABELS}")
        classes = tuple(dict.fromkeys(names[identifier] for identifier in identifiers))
        yield Entry(f"{video}_{start:g}", shared.setdefault(classes, classes), line, start=start, end=end, recording=video)


def read(dataset: DataSet, request: Request) -> Listing:
    """The entries of a split, numbered as in the official list of classes."""
    names, warnings = _classes(dataset.require(request, LABELS)), list[str]()
    entries: list[Entry] = []
    for file in FILES[request.split]:
        path = dataset.require(request, file)
        entries += without_repeats(path, _entries(path, names), warnings)
    elsewhere: list[Entry] = []
    for file in FILES["train" if request.split == "eval" else "eval"]:
        other = dataset.find(request, file)
        if other is not None:
            elsewhere += _entries(other, names)
    return Listing(entries, list(names.values()), elsewhere, warnings)


AUDIOSET = DataSet(
    name="audioset",
    title="AudioSet",
    classes=527,
    splits=("balanced_train", "unbalanced_train", "train", "eval"),
    read=read,
    annotations=(LABELS, *FILES["train"], *FILES["eval"]),
    published="research.google.com/audioset/download.html",
    places=("metadata", "csv"),
    media="ID_START.* for a part that was cut out already, or ID.* for a whole video, which is cut here",
    note="several classes per sample; train is both training files; a file named ID.* counts as the whole video",
)
