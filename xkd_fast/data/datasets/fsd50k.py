"""FSD50K: sounds of Freesound without pictures, each with one or several of 200 classes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from xkd_fast.data.datasets.dataset import DataSet, Entry, Listing, Request, table_rows, without_repeats, wrong
from xkd_fast.data.sources import csv_rows, read_text

VOCABULARY = "vocabulary.csv"


def _classes(path: Path) -> list[str]:
    names: list[str] = []
    for line, row in csv_rows(path, read_text(path, "an annotation file")):
        if len(row) != 3 or row[0].strip() != str(len(names)) or row[1] in names:
            raise wrong(
                path, line, f"{','.join(row)!r} is not number {len(names)}, the name of another class, and its identifier"
            )
        names.append(row[1].strip())
    return names


def _entries(path: Path, classes: list[str], *, development: bool) -> Iterator[tuple[str, Entry]]:
    known, folder = set(classes), "FSD50K.dev_audio" if development else "FSD50K.eval_audio"
    for line, row in table_rows(path, ("fname", "labels", "split") if development else ("fname", "labels"), ("mids",)):
        labels = tuple(dict.fromkeys(part.strip() for part in row["labels"].split(",") if part.strip()))
        unknown = [name for name in labels if name not in known]
        if unknown or not labels:
            raise wrong(path, line, f"label {unknown[0]!r} is not in {VOCABULARY}" if unknown else "there is no label")
        split = row["split"] if development else "test"
        if development and split not in ("train", "val"):
            raise wrong(path, line, f"split {split!r} must be train or val")
        yield split, Entry(row["fname"], labels, line, row["fname"], folder=folder)


def read(dataset: DataSet, request: Request) -> Listing:
    """The entries of a split, classes in the order of the vocabulary."""
    classes, warnings = _classes(dataset.require(request, VOCABULARY)), list[str]()
    sides = {}
    for file in ("dev.csv", "eval.csv"):
        path = dataset.find(request, file)
        if path is None and (file == "eval.csv") == (request.split == "test"):
            raise dataset.lacks(request, file)
        sides[file] = list(_entries(path, classes, development=file == "dev.csv")) if path is not None else []
    wanted = {"train": ("train",), "val": ("val",), "dev": ("train", "val"), "test": ("test",)}[request.split]
    everything = sides["dev.csv"] + sides["eval.csv"]
    file = "eval.csv" if request.split == "test" else "dev.csv"
    chosen = (entry for split, entry in everything if split in wanted)
    entries = without_repeats(dataset.require(request, file), chosen, warnings)
    return Listing(entries, classes, [entry for split, entry in everything if split not in wanted], warnings)


FSD50K = DataSet(
    name="fsd50k",
    title="FSD50K",
    classes=200,
    splits=("train", "val", "dev", "test"),
    read=read,
    annotations=(VOCABULARY, "dev.csv", "eval.csv"),
    published="zenodo.org/records/4060432 (FSD50K.ground_truth)",
    places=("FSD50K.ground_truth",),
    media="FNAME.wav, as in dev.csv and eval.csv",
    options={"missing_video": "keep-as-audio-only"},
    note="sounds alone, several classes per sample; dev is train and val together, test is eval.csv",
)
