"""ESC-50: 50 kinds of sound without pictures, five folds."""

from __future__ import annotations

import os

from xkd_fast.data.datasets.dataset import DataSet, Entry, Listing, Request, table_rows, without_repeats, wrong

FILE = "esc50.csv"


def read(dataset: DataSet, request: Request) -> Listing:
    """The entries of the fold (test) or of the four others (train), classes by their target."""
    path, warnings = dataset.require(request, FILE), list[str]()
    names: dict[int, str] = {}
    rows: list[tuple[bool, Entry]] = []
    for line, row in table_rows(path, ("filename", "fold", "target", "category"), ("esc10", "src_file", "take")):
        if row["fold"] not in [str(fold) for fold in range(1, dataset.folds + 1)]:
            raise wrong(path, line, f"fold {row['fold']!r} must lie in 1-{dataset.folds}")
        if not row["target"].isdecimal() or names.setdefault(int(row["target"]), row["category"]) != row["category"]:
            raise wrong(path, line, f"target {row['target']!r} and class {row['category']!r} do not go together")
        stem = os.path.splitext(row["filename"])[0]
        entry = Entry(row["filename"], (row["category"],), line, stem, recording=row.get("src_file", ""))
        rows.append((int(row["fold"]) == request.fold, entry))
    if len(set(names.values())) < len(names):  # targets with gaps are those of a part of the set, such as ESC-10
        raise wrong(path, 1, f"{len(names)} targets have {len(set(names.values()))} classes: two of them share one")
    tested = request.split == "test"
    entries = without_repeats(path, (entry for held_out, entry in rows if held_out == tested), warnings)
    elsewhere = [entry for held_out, entry in rows if held_out != tested]
    return Listing(entries, [names[number] for number in sorted(names)], elsewhere, warnings)


ESC50 = DataSet(
    name="esc50",
    title="ESC-50",
    classes=50,
    splits=("train", "test"),
    folds=5,
    read=read,
    annotations=(FILE,),
    published="the repository karolpiczak/ESC-50 on GitHub (meta)",
    places=("meta",),
    media="the names of esc50.csv, with any ending",
    options={"missing_video": "keep-as-audio-only"},
    note="sounds alone; --fold N --split test is fold N, --split train the other four",
)
