"""HMDB51: 51 actions, three splits, a file for each class and split."""

from __future__ import annotations

import os

from xkd_fast.data.datasets.dataset import DataSet, Entry, Listing, Request, text_lines, without_repeats, wrong

SIDES = {"0": "neither", "1": "train", "2": "test"}


def read(dataset: DataSet, request: Request) -> Listing:
    """The entries of one side of a split; classes are sorted."""
    ending = f"_test_split{request.fold}.txt"
    folder = next((at for at in dataset.folders(request) if at.is_dir() and any(at.glob(f"*{ending}"))), None)
    if folder is None:
        raise dataset.lacks(request, f"CLASS{ending}")
    sides: dict[str, list[Entry]] = {side: [] for side in SIDES.values()}
    warnings: list[str] = []
    classes = sorted(path.name.removesuffix(ending) for path in folder.glob(f"*{ending}"))
    for name in classes:
        path, marks = folder / f"{name}{ending}", dict[str, str]()
        listed: dict[str, list[Entry]] = {side: [] for side in SIDES.values()}
        for line, text in text_lines(path):
            file, _, mark = text.rpartition(" ")
            if mark not in SIDES or not file.strip():
                raise wrong(path, line, f"{text!r} is not a file's name and 0, 1 or 2")
            file = file.strip()
            if marks.setdefault(file, mark) != mark:
                raise wrong(path, line, f"{file} has mark {mark}, further up it has {marks[file]}")
            stem = os.path.splitext(file)[0]
            listed[SIDES[mark]].append(Entry(f"{name}/{file}", (name,), line, stem, folder=name))
        for side, entries in listed.items():
            sides[side] += without_repeats(path, entries, warnings)
    other = "test" if request.split == "train" else "train"
    return Listing(sides[request.split], classes, sides[other], warnings)


HMDB51 = DataSet(
    name="hmdb51",
    title="HMDB51",
    classes=51,
    splits=("train", "test"),
    folds=3,
    read=read,
    annotations=("CLASS_test_split1.txt",),
    published="serre.lab.brown.edu/hmdb51.html (test_train_splits)",
    places=("testTrainMulti_7030_splits", "test_train_splits", "test_train_splits/testTrainMulti_7030_splits"),
    media="the names of the split files, in class folders or not",
    options={"missing_audio": "keep-as-video-only"},
    note="few of its videos have sound: they are kept for video, as published accuracies count them; classes are sorted",
)
