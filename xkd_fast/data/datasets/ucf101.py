"""UCF101: 101 actions, three splits."""

from __future__ import annotations

import re
from collections.abc import Iterator

from xkd_fast.data.datasets.dataset import Annotations, DataSet, Entry, alone
from xkd_fast.data.datasets.rows import text_lines, whole_number, wrong

CLASSES = "classInd.txt"
COUNTS = {  # videos by fold
    1: {"train": 9537, "test": 3783},
    2: {"train": 9586, "test": 3734},
    3: {"train": 9624, "test": 3696},
}


def _names(files: Annotations) -> list[str]:
    """The classes in the order of their numbers."""
    path, names = files.require(CLASSES), list[str]()
    for line, text in text_lines(path):
        number, _, name = text.partition(" ")
        if number != str(len(names) + 1) or not name or name in names:
            raise wrong(path, line, f"{text!r} is not number {len(names) + 1} and the name of another class")
        names.append(name)
    return names


def read(files: Annotations, part: str) -> Iterator[Entry]:
    """The videos of one side of a split."""
    classes, path = _names(files), files.require(f"{part}list{files.fold:02d}.txt")
    for line, text in text_lines(path):
        match = re.fullmatch(r"(?P<folder>[^/]+)/(?P<file>.+?)\.avi(?:\s+(?P<number>\d+))?", text)
        if match is None:
            raise wrong(path, line, f"{text!r} is not CLASS/v_CLASS_gNN_cNN.avi, in a training list with the class's number")
        folder, stem, number = match["folder"], match["file"], match["number"]
        if folder not in classes:
            raise wrong(path, line, f"class {folder!r} is not in {CLASSES}")
        if number is not None and classes.index(folder) + 1 != whole_number(number):
            raise wrong(path, line, f"class {folder} has number {number}, in {CLASSES} {classes.index(folder) + 1}")
        recording = re.sub(r"_c\d+$", "", stem) if re.search(r"_g\d+_c\d+$", stem) else ""
        yield Entry(f"{folder}/{stem}.avi", (folder,), path, line, stem, folder=folder, recording=recording)


UCF101 = DataSet(
    name="ucf101",
    title="UCF101",
    classes=101,
    splits=alone("train", "test"),
    folds=3,
    sizes={(part, fold): (count,) for fold, counts in COUNTS.items() for part, count in counts.items()},
    read=read,
    order=_names,
    annotations=(CLASSES, "trainlist01.txt", "testlist01.txt"),
    published="crcv.ucf.edu/data/UCF101.php (the train and test splits for action recognition)",
    places=("ucfTrainTestlist",),
    media="v_CLASS_gNN_cNN.*",
    options={"missing_audio": "keep-as-video-only"},
    note="half of its videos have no sound: they are kept for video, as published accuracies count them",
)
