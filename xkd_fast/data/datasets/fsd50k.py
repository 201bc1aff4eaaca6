"""FSD50K: sounds of Freesound without pictures, each with one or several of 200 classes."""

from __future__ import annotations

from collections.abc import Iterator

from xkd_fast.data.datasets.dataset import Annotations, DataSet, Entry, alone
from xkd_fast.data.datasets.rows import one_of, plain_rows, table_rows, wrong

VOCABULARY = "vocabulary.csv"
DEVELOPMENT = ("train", "val")


def _names(files: Annotations) -> list[str]:
    """The classes in the order of their numbers."""
    path, names = files.require(VOCABULARY), list[str]()
    for line, row in plain_rows(path, "a number, a class and its identifier", 3):
        if row[0] != str(len(names)) or row[1] in names:
            raise wrong(path, line, f"{','.join(row)!r} is not number {len(names)} and the name of another class")
        names.append(row[1])
    return names


def read(files: Annotations, part: str) -> Iterator[Entry]:
    """The sounds of a part: train and val of dev.csv, test of eval.csv."""
    known, evaluation = set(_names(files)), part == "test"
    path = files.require("eval.csv" if evaluation else "dev.csv")
    columns = ("fname", "labels") if evaluation else ("fname", "labels", "split")
    for line, row in table_rows(path, columns, ("mids",)):
        labels = tuple(dict.fromkeys(label.strip() for label in row["labels"].split(",") if label.strip()))
        unknown = [name for name in labels if name not in known]
        if unknown or not labels:
            raise wrong(path, line, f"label {unknown[0]!r} is not in {VOCABULARY}" if unknown else "there is no label")
        if evaluation or one_of(path, line, "split", row["split"], DEVELOPMENT) == part:
            folder = "FSD50K.eval_audio" if evaluation else "FSD50K.dev_audio"
            yield Entry(row["fname"], labels, path, line, row["fname"], folder=folder)


FSD50K = DataSet(
    name="fsd50k",
    title="FSD50K",
    classes=200,
    splits=alone(*DEVELOPMENT) | {"dev": DEVELOPMENT} | alone("test"),
    sizes={("train", 0): (36796,), ("val", 0): (4170,), ("test", 0): (10231,)},
    read=read,
    order=_names,
    annotations=(VOCABULARY, "dev.csv", "eval.csv"),
    published="zenodo.org/records/4060432 (FSD50K.ground_truth)",
    places=("FSD50K.ground_truth",),
    media="FNAME.wav, as in dev.csv and eval.csv",
    options={"missing_video": "keep-as-audio-only"},
    note="sounds alone, several classes per sample; dev is train and val together, test is eval.csv",
)
