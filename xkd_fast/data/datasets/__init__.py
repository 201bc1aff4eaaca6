"""The usual data sets: their official split and label files, and how their media files are named.

One file a data set, and one registry. A data set's `read` turns a list into entries, by `rows`. The rest is the same for all:
`listing` compares the lists with the official release and with each other, `media` finds the files.
"""

from __future__ import annotations

import os
from pathlib import Path

from xkd_fast.data.datasets.audioset import AUDIOSET
from xkd_fast.data.datasets.dataset import DataSet, IdFiles
from xkd_fast.data.datasets.esc50 import ESC50
from xkd_fast.data.datasets.fsd50k import FSD50K
from xkd_fast.data.datasets.hmdb51 import HMDB51
from xkd_fast.data.datasets.kinetics import KINETICS400, KINETICS_SOUND
from xkd_fast.data.datasets.listing import read_listing
from xkd_fast.data.datasets.media import assemble
from xkd_fast.data.datasets.ucf101 import UCF101
from xkd_fast.data.datasets.vggsound import VGGSOUND
from xkd_fast.data.sources import SourceSet
from xkd_fast.errors import UserError

DATASETS: dict[str, DataSet] = {
    dataset.name: dataset for dataset in (KINETICS400, KINETICS_SOUND, AUDIOSET, VGGSOUND, UCF101, HMDB51, ESC50, FSD50K)
}


def open_dataset(
    name: str,
    root: str | os.PathLike[str],
    *,
    split: str | None = None,
    fold: int | None = None,
    annotations: str | os.PathLike[str] | None = None,
    subset: bool = False,
    id_files: IdFiles = "auto",
) -> SourceSet:
    """The sources of one split of a data set.

    Args:
        name: a key of ``DATASETS``.
        root: folder of its media files; any folders below it.
        split: one of its splits; None = its first.
        fold: of those that have several splits, from 1; None = the first.
        annotations: folder of the annotation files; None = ``root``, its parent, and the places of the official release there.
        subset: take lists that are shorter than the official ones, which else are refused as cut off.
        id_files: what files named by a YouTube id alone hold; ``auto`` = as the lengths of some of them tell.

    Raises:
        UserError: an unknown data set, split or fold; an annotation file that is missing, malformed, shortened or no official
            one; an entry on both sides of the split; or no file for any entry.
    """
    if name not in DATASETS:
        raise UserError(f"--dataset {name} is not known; known are {', '.join(DATASETS)}, and --list FILE takes any other")
    dataset, folder = DATASETS[name], None if annotations is None else Path(annotations)
    request = dataset.request(Path(root), split, fold, folder, subset=subset, id_files=id_files)
    return assemble(dataset, request, read_listing(dataset, request))


def describe() -> str:
    """The data sets for a terminal: names, splits, annotation files, names of media."""
    lines = []
    for dataset in DATASETS.values():
        folds = f"; --fold 1-{dataset.folds}" if dataset.folds else ""
        lines.append(f"  {dataset.name:<15}--split {'|'.join(dataset.splits)}{folds}")
        lines.append(f"  {'':<15}annotations: {', '.join(dataset.annotations)}")
        lines.append(f"  {'':<15}media: {dataset.media}")
        lines.append(f"  {'':<15}{dataset.note}")
    return "\n".join(lines)
