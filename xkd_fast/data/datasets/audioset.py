"""AudioSet: ten-second parts of YouTube videos, each with one or several of 527 classes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import takewhile

from xkd_fast.data.datasets.dataset import Annotations, DataSet, Entry, alone
from xkd_fast.data.datasets.rows import plain_rows, span, table_rows, text_lines, wrong, youtube_id

LABELS = "class_labels_indices.csv"
TRAIN = ("balanced_train", "unbalanced_train")
COLUMNS = "YTID, start_seconds, end_seconds and positive_labels"


def _names(files: Annotations) -> dict[str, str]:
    """Names of classes by their identifier, in the order of their numbers."""
    path, names = files.require(LABELS), dict[str, str]()
    for place, (line, row) in enumerate(table_rows(path, ("index", "mid", "display_name"))):
        if row["index"] != str(place):
            raise wrong(path, line, f"index {row['index']!r} where {place} follows")
        if row["mid"] in names or row["display_name"] in names.values():
            raise wrong(path, line, f"class {row['display_name']!r} is listed twice")
        names[row["mid"]] = row["display_name"]
    return names


def read(files: Annotations, part: str) -> Iterator[Entry]:
    """The segments of a list, as many as its header says."""
    names, path, count = _names(files), files.require(f"{part}_segments.csv"), 0
    shared: dict[tuple[str, ...], tuple[str, ...]] = {}  # one tuple for all entries of the same classes
    for line, (identity, first, last, labels) in plain_rows(path, COLUMNS, 4, skip_spaces=True):
        video, (start, end) = youtube_id(path, line, identity), span(path, line, first, last)
        identifiers = [label.strip() for label in labels.split(",")]
        unknown = [identifier for identifier in identifiers if identifier not in names]
        if unknown:
            raise wrong(path, line, f"label {unknown[0]!r} is not in {LABELS}")
        classes = tuple(dict.fromkeys(names[identifier] for identifier in identifiers))
        name, count = f"{video}_{start:g}", count + 1
        yield Entry(name, shared.setdefault(classes, classes), path, line, start=start, end=end, recording=video)
    heading = " ".join(text for _, text in takewhile(lambda numbered: numbered[1].startswith("#"), text_lines(path)))
    match = re.search(r"num_segs=(\d{1,9})\b", heading)
    promised = int(match[1]) if match else None
    if promised is not None and count < promised:
        files.is_short(str(path), f"lists {count} segments", f"its own header {promised}")
    if promised is None and (part, 0) not in AUDIOSET.sizes:
        files.warnings.append(
            f"{path} does not say how many segments it holds (num_segs= in its header), so nobody can tell if it is whole"
        )


AUDIOSET = DataSet(
    name="audioset",
    title="AudioSet",
    classes=527,
    splits=alone(*TRAIN) | {"train": TRAIN} | alone("eval"),
    together=TRAIN,
    # Of the csv files; the page that offers them speaks of some more. The largest one is held to its own header.
    sizes={("balanced_train", 0): (22160,), ("eval", 0): (20371,)},
    read=read,
    order=lambda files: list(_names(files).values()),
    annotations=(LABELS, *(f"{part}_segments.csv" for part in (*TRAIN, "eval"))),
    published="research.google.com/audioset/download.html",
    places=("metadata", "csv"),
    media="ID_START.* for a part that was cut out already, or ID.*, as --id-files says",
    named_by_id=True,
    note="several classes per sample; train is both training files",
)
