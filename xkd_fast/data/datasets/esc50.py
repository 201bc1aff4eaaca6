"""ESC-50: 50 kinds of sound without pictures, five folds."""

from __future__ import annotations

import os
from collections.abc import Iterator

from xkd_fast.data.datasets.dataset import Annotations, DataSet, Entry, alone
from xkd_fast.data.datasets.rows import one_of, table_rows, whole_number, wrong

FILE = "esc50.csv"
FOLDS = ("1", "2", "3", "4", "5")


def _rows(files: Annotations) -> Iterator[tuple[int, dict[str, str]]]:
    return table_rows(files.require(FILE), ("filename", "fold", "target", "category"), ("esc10", "src_file", "take"))


def _names(files: Annotations) -> list[str]:
    """The classes in the order of their targets, which have gaps in a part of the set such as ESC-10."""
    path, names = files.require(FILE), dict[int, str]()
    for line, row in _rows(files):
        target = whole_number(row["target"])
        if target < 0 or names.setdefault(target, row["category"]) != row["category"]:
            raise wrong(path, line, f"target {row['target']!r} and class {row['category']!r} do not go together")
    if len(set(names.values())) < len(names):
        raise wrong(path, 1, f"{len(names)} targets have {len(set(names.values()))} classes: two of them share one")
    return [names[number] for number in sorted(names)]


def read(files: Annotations, part: str) -> Iterator[Entry]:
    """The sounds of the fold (test), or of the four others (train)."""
    path = files.require(FILE)
    for line, row in _rows(files):
        held_out = one_of(path, line, "fold", row["fold"], FOLDS) == str(files.fold)
        if held_out == (part == "test"):
            stem = os.path.splitext(row["filename"])[0]
            yield Entry(row["filename"], (row["category"],), path, line, stem, recording=row.get("src_file", ""))


ESC50 = DataSet(
    name="esc50",
    title="ESC-50",
    classes=50,
    splits=alone("train", "test"),
    folds=len(FOLDS),
    sizes={("train", 0): (1600,), ("test", 0): (400,)},
    read=read,
    order=_names,
    annotations=(FILE,),
    published="the repository karolpiczak/ESC-50 on GitHub (meta)",
    places=("meta",),
    media="the names of esc50.csv, with any ending",
    options={"missing_video": "keep-as-audio-only"},
    note="sounds alone; --fold N --split test is fold N, --split train the other four",
)
