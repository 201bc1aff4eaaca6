"""UCF101: 101 actions, three splits."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from xkd_fast.data.datasets.dataset import DataSet, Entry, Listing, Request, text_lines, without_repeats, wrong

CLASSES = "classInd.txt"


def _classes(path: Path) -> list[str]:
    names: list[str] = []
    for line, text in text_lines(path):
        number, _, name = text.partition(" ")
        if number != str(len(names) + 1) or not name or name in names:
            raise wrong(path, line, f"{text!r} is not number {len(names) + 1} and the name of another class")
        names.append(name)
    return names


def _entries(path: Path, classes: list[str]) -> Iterator[Entry]:
    for line, text in text_lines(path):
        match = re.fullmatch(r"(?P<folder>[^/]+)/(?P<file>.+?)\.avi(?:\s+(?P<number>\d+))?", text)
        if match is None:
            raise wrong(path, line, f"{text!r} is not CLASS/v_CLASS_gNN_cNN.avi, in a training list with the class's number")
        folder, stem, number = match["folder"], match["file"], match["number"]
        if folder not in classes:
            raise wrong(path, line, f"class {folder!r} is not in {CLASSES}")
        if number is not None and classes.index(folder) + 1 != int(number):
            raise wrong(path, line, f"class {folder} has number {number}, in {CLASSES} {classes.index(folder) + 1}")
        recording = re.sub(r"_c\d+$", "", stem) if re.search(r"_g\d+_c\d+$", stem) else ""
        yield Entry(f"{folder}/{stem}.avi", (folder,), line, stem, folder=folder, recording=recording)


def read(dataset: DataSet, request: Request) -> Listing:
    """The entries of one side of a split, classes in the official order."""
    classes, warnings = _classes(dataset.require(request, CLASSES)), list[str]()
    path = dataset.require(request, f"{request.split}list{request.fold:02d}.txt")
    other = dataset.find(request, f"{'test' if request.split == 'train' else 'train'}list{request.fold:02d}.txt")
    entries = without_repeats(path, _entries(path, classes), warnings)
    return Listing(entries, classes, list(_entries(other, classes)) if other is not None else [], warnings)


UCF101 = DataSet(
    name="ucf101",
    title="UCF101",
    classes=101,
    splits=("train", "test"),
    folds=3,
    read=read,
    annotations=(CLASSES, "trainlist01.txt", "testlist01.txt"),
    published="crcv.ucf.edu/data/UCF101.php (the train and test splits for action recognition)",
    places=("ucfTrainTestlist",),
    media="v_CLASS_gNN_cNN.*",
    options={"missing_audio": "keep-as-video-only"},
    note="half of its videos have no sound: they are kept for video, as published accuracies count them",
)
