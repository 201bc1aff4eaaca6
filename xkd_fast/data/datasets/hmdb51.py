"""HMDB51: 51 actions, three splits, a file for each class and split."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from xkd_fast.data.datasets.dataset import Annotations, DataSet, Entry, alone
from xkd_fast.data.datasets.rows import text_lines, wrong

SIDES = {"0": "neither", "1": "train", "2": "test"}


def _lists(files: Annotations) -> dict[str, Path]:
    """The list of each class, sorted by class.

    Raises:
        MissingAnnotation: there is none for this fold.
    """
    ending = f"_test_split{files.fold}.txt"
    for folder in files.folders():
        found = sorted(folder.glob(f"*{ending}"))
        if found:
            return {path.name.removesuffix(ending): path for path in found}
    raise files.lacks(f"CLASS{ending}")


def read(files: Annotations, part: str) -> Iterator[Entry]:
    """The videos of one side of a split."""
    for name, path in _lists(files).items():
        marks: dict[str, str] = {}
        for line, text in text_lines(path):
            file, _, mark = text.rpartition(" ")
            file = file.strip()
            if mark not in SIDES or not file:
                raise wrong(path, line, f"{text!r} is not a file's name and 0, 1 or 2")
            if marks.setdefault(file, mark) != mark:
                raise wrong(path, line, f"{file} has mark {mark}, further up it has {marks[file]}")
            if SIDES[mark] == part:
                yield Entry(f"{name}/{file}", (name,), path, line, os.path.splitext(file)[0], folder=name)


HMDB51 = DataSet(
    name="hmdb51",
    title="HMDB51",
    classes=51,
    splits=alone("train", "test"),
    folds=3,
    sizes={("train", 0): (51 * 70,), ("test", 0): (51 * 30,)},
    read=read,
    order=lambda files: list(_lists(files)),
    annotations=("CLASS_test_split1.txt",),
    published="serre.lab.brown.edu/hmdb51.html (test_train_splits)",
    places=("testTrainMulti_7030_splits", "test_train_splits", "test_train_splits/testTrainMulti_7030_splits"),
    media="the names of the split files, in class folders or not",
    options={"missing_audio": "keep-as-video-only"},
    note="few of its videos have sound: they are kept for video, as published accuracies count them; classes are sorted",
)
