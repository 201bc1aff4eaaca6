"""Kinetics-400, and Kinetics-Sound: its classes that are heard as well as seen."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from xkd_fast.data.datasets.dataset import Annotations, DataSet, Entry, alone
from xkd_fast.data.datasets.rows import span, table_rows, text_lines, wrong, youtube_id
from xkd_fast.errors import UserError

SPLITS = ("train", "val", "test")
FILES = {split: [f"{split}.csv", f"kinetics_400_{split}.csv"] for split in SPLITS}
FILES["val"] += ["validate.csv"]  # DeepMind's name for it
COLUMNS = ("youtube_id", "time_start", "time_end")
SOUND_FILE = "kinetics_sound_classes.txt"

# As XKD's first author lists them for his experiments (github.com/pritamqu/CrissCross, issue 4). The 31 of AdaMML
# (github.com/IBM/AdaMML, issue 3) are these without "strumming guitar".
SOUND_CLASSES = (
    "blowing nose", "blowing out candles", "bowling", "chopping wood", "dribbling basketball", "laughing", "mowing lawn",
    "playing accordion", "playing bagpipes", "playing bass guitar", "playing clarinet", "playing drums", "playing guitar",
    "playing harmonica", "playing keyboard", "playing organ", "playing piano", "playing saxophone", "playing trombone",
    "playing trumpet", "playing violin", "playing xylophone", "ripping paper", "shoveling snow", "shuffling cards", "singing",
    "stomping grapes", "strumming guitar", "tap dancing", "tapping guitar", "tapping pen", "tickling",
)  # fmt: skip


def read(files: Annotations, part: str) -> Iterator[Entry]:
    """The clips of a list; DeepMind's test list has no classes."""
    path = files.require(*FILES[part])
    for line, row in table_rows(path, COLUMNS, ("label", "split")):
        video = youtube_id(path, line, row["youtube_id"])
        start, end = span(path, line, row["time_start"], row["time_end"])
        if row.get("split") and not row["split"].startswith(part[:3]):  # val is called validate, validation or val
            raise wrong(path, line, f"split {row['split']!r} in the file of {part}")
        name = f"{video}_{round(start):06d}_{round(end):06d}"
        classes = (row["label"],) if row.get("label") else ()
        yield Entry(name, classes, path, line, name, recording=video)


def _sound_classes(files: Annotations, known: list[str]) -> list[str]:
    """The classes of the user's own list, if there is one, else those above; sorted.

    Raises:
        UserError: a line of the user's list that repeats another, or is none of the known classes; or no line at all.
    """
    path = files.find(SOUND_FILE)
    if path is None:
        return list(SOUND_CLASSES)
    chosen: list[str] = []
    for line, name in text_lines(path):
        if name in chosen:
            raise wrong(path, line, f"class {name!r} is listed twice")
        if name not in known:
            raise wrong(path, line, f"{name!r} is no class of Kinetics-400")
        chosen.append(name)
    if not chosen:
        raise UserError(f"{path} names no class; write one a line, or remove it to take {len(SOUND_CLASSES)} usual ones")
    return sorted(chosen)


KINETICS400 = DataSet(
    name="kinetics400",
    title="Kinetics-400",
    classes=400,
    splits=alone(*SPLITS),
    # Test: the CVD Foundation's list, and DeepMind's.
    sizes={("train", 0): (246534,), ("val", 0): (19906,), ("test", 0): (39805, 38685)},
    read=read,
    annotations=("train.csv", "val.csv", "test.csv"),
    published="the CVD Foundation's repository kinetics-dataset on GitHub (k400/annotations)",
    places=("kinetics400", "k400/annotations"),
    media="ID_SSSSSS_EEEEEE.*, start and end in whole seconds, in class folders or not",
    note="clips are those of the CVD Foundation; classes are sorted",
)

KINETICS_SOUND = replace(
    KINETICS400,
    name="kinetics-sound",
    title="Kinetics-Sound",
    chosen=_sound_classes,
    note=f"the {len(SOUND_CLASSES)} classes of XKD's first author, or those of {SOUND_FILE}, one a line, beside the lists",
)
