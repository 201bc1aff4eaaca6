"""Kinetics-400, and Kinetics-Sound: its classes that are heard as well as seen."""

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
    text_lines,
    without_repeats,
    wrong,
    youtube_id,
)
from xkd_fast.errors import UserError

SPLITS = ("train", "val", "test")
FILES = {split: [f"{split}.csv", f"kinetics_400_{split}.csv"] for split in SPLITS}
FILES["val"] += ["validate.csv"]  # DeepMind's name for it
COLUMNS = ("youtube_id", "time_start", "time_end")
SOUND_CLASSES = "kinetics_sound_classes.txt"


def _entries(path: Path, split: str) -> Iterator[Entry]:
    for line, row in table_rows(path, COLUMNS, ("label", "split")):
        video = youtube_id(path, line, row["youtube_id"])
        start, end = span(path, line, row["time_start"], row["time_end"])
        if row.get("split") and not row["split"].startswith(split[:3]):  # val is called validate, validation or val
            raise wrong(path, line, f"split {row['split']!r} in the file of {split}")
        name = f"{video}_{round(start):06d}_{round(end):06d}"
        classes = (row["label"],) if row.get("label") else ()
        yield Entry(name, classes, line, name, recording=video)


def read(dataset: DataSet, request: Request) -> Listing:
    """The entries of a split; classes are those of all split files that are there, sorted."""
    path, warnings = dataset.require(request, *FILES[request.split]), list[str]()
    entries = without_repeats(path, _entries(path, request.split), warnings)
    elsewhere: list[Entry] = []
    for split in SPLITS:
        other = dataset.find(request, *FILES[split])
        if split != request.split and other is not None:
            elsewhere += _entries(other, split)
    classes = sorted({name for entry in (*entries, *elsewhere) for name in entry.classes})
    return Listing(entries, classes, elsewhere, warnings)


def read_sound(dataset: DataSet, request: Request) -> Listing:
    """The entries of a split whose class is in the user's list; classes are sorted.

    Raises:
        UserError: no such list, or a line of it that is no class of Kinetics-400.
    """
    path = dataset.find(request, SOUND_CLASSES)
    if path is None:
        looked = ", ".join(str(folder) for folder in dict.fromkeys(dataset.folders(request)))
        raise UserError(
            f"{SOUND_CLASSES} was not found in {looked}; published lists of Kinetics-Sound's classes differ (31 to 34 of "
            "Kinetics-400's), so write it yourself: the classes of the work that you compare with, one a line"
        )
    everything = read(dataset, request)
    chosen: list[str] = []
    for line, name in text_lines(path):
        if name in chosen:
            raise wrong(path, line, f"class {name!r} is listed twice")
        if name not in everything.classes:
            raise wrong(path, line, f"{name!r} is no class of Kinetics-400")
        chosen.append(name)
    kept, elsewhere = (
        [entry for entry in side if set(entry.classes) <= set(chosen) and entry.classes]
        for side in (everything.entries, everything.elsewhere)
    )
    return Listing(kept, sorted(chosen), elsewhere, everything.warnings)


KINETICS400 = DataSet(
    name="kinetics400",
    title="Kinetics-400",
    classes=400,
    splits=SPLITS,
    read=read,
    annotations=("train.csv", "val.csv", "test.csv"),
    published="the CVD Foundation's repository kinetics-dataset on GitHub (k400/annotations)",
    places=("kinetics400", "k400/annotations"),
    media="ID_SSSSSS_EEEEEE.*, start and end in whole seconds, in class folders or not",
    note="clips are those of the CVD Foundation; classes are sorted",
)

KINETICS_SOUND = DataSet(
    name="kinetics-sound",
    title="Kinetics-Sound",
    classes=0,
    splits=SPLITS,
    read=read_sound,
    annotations=("train.csv", "val.csv", "test.csv", SOUND_CLASSES),
    published=KINETICS400.published,
    places=KINETICS400.places,
    media=KINETICS400.media,
    note=f"published lists of its classes differ (31 to 34), so {SOUND_CLASSES} is yours to write: one a line",
)
