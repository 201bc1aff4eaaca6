"""VGGSound: ten-second parts of YouTube videos, 309 classes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from xkd_fast.data.datasets.dataset import DataSet, Entry, Listing, Request, number_in, without_repeats, wrong, youtube_id
from xkd_fast.data.sources import csv_rows, read_text

FILE = "vggsound.csv"
SECONDS = 10.0  # of every part


def _rows(path: Path) -> Iterator[tuple[str, Entry]]:
    for line, row in csv_rows(path, read_text(path, "an annotation file")):
        if len(row) != 4:
            raise wrong(path, line, f"{len(row)} cells where a YouTube id, the start, the class and train or test belong")
        video, name, split = youtube_id(path, line, row[0].strip()), row[2].strip(), row[3].strip()
        start = number_in(path, line, "start", row[1])
        if split not in ("train", "test"):
            raise wrong(path, line, f"split {split!r} must be train or test")
        if not name:
            raise wrong(path, line, "the class is empty")
        own = f"{video}_{round(start):06d}"
        yield split, Entry(own, (name,), line, start=start, end=start + SECONDS, recording=video)


def read(dataset: DataSet, request: Request) -> Listing:
    """The entries of a split; classes are sorted."""
    path, warnings = dataset.require(request, FILE), list[str]()
    rows = list(_rows(path))
    entries = without_repeats(path, (entry for split, entry in rows if split == request.split), warnings)
    elsewhere = [entry for split, entry in rows if split != request.split]
    return Listing(entries, sorted({name for _, entry in rows for name in entry.classes}), elsewhere, warnings)


VGGSOUND = DataSet(
    name="vggsound",
    title="VGGSound",
    classes=309,
    splits=("train", "test"),
    read=read,
    annotations=(FILE,),
    published="robots.ox.ac.uk/~vgg/data/vggsound",
    media="ID_SSSSSS.*, the start in whole seconds, or ID.* for a whole video, which is cut here",
    note="classes are sorted",
)
