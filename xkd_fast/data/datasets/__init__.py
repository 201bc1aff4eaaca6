"""The usual data sets: their official split and label files, and how their media files are named.

One file a data set, and one registry. A data set's `read` parses its annotation files into entries; finding their media,
leaks between the sides of a split and missing files are the same for all (`xkd_fast.data.datasets.dataset`).
"""

from __future__ import annotations

import os
from pathlib import Path

from xkd_fast.data.datasets.audioset import AUDIOSET
from xkd_fast.data.datasets.dataset import DataSet, assemble
from xkd_fast.data.datasets.esc50 import ESC50
from xkd_fast.data.datasets.fsd50k import FSD50K
from xkd_fast.data.datasets.hmdb51 import HMDB51
from xkd_fast.data.datasets.kinetics import KINETICS400, KINETICS_SOUND
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
) -> SourceSet:
    """The sources of one split of a data set.

    Args:
        name: a key of ``DATASETS``.
        root: folder of its media files; any folders below it.
        split: one of its splits; None = its first.
        fold: of those that have several splits, from 1; None = the first.
        annotations: folder of the annotation files; None = ``root``, its parent, and the places of the official release there.

    Raises:
        UserError: an unknown data set, split or fold; an annotation file that is missing, malformed or no official one; an
            entry on both sides of the split; or no file for any entry.
    """
    if name not in DATASETS:
        raise UserError(f"--dataset {name} is not known; known are {', '.join(DATASETS)}, and --list FILE takes any other")
    dataset = DATASETS[name]
    request = dataset.request(Path(root), split, fold, None if annotations is None else Path(annotations))
    return assemble(dataset, request, dataset.read(dataset, request))


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
