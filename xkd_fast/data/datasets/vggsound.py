"""VGGSound: ten-second parts of YouTube videos, 309 classes."""

from __future__ import annotations

from collections.abc import Iterator

from xkd_fast.data.datasets.dataset import Annotations, DataSet, Entry, alone
from xkd_fast.data.datasets.rows import number_in, one_of, plain_rows, wrong, youtube_id

FILE = "vggsound.csv"
COLUMNS = "a YouTube id, the start, the class and train or test"
SECONDS = 10.0  # of every part


def read(files: Annotations, part: str) -> Iterator[Entry]:
    """The rows of one side."""
    path = files.require(FILE)
    for line, (identity, first, label, side) in plain_rows(path, COLUMNS, 4):
        video, start = youtube_id(path, line, identity), number_in(path, line, "start", first)
        if not label:
            raise wrong(path, line, "the class is empty")
        if one_of(path, line, "split", side, ("train", "test")) == part:
            own = f"{video}_{round(start):06d}"
            yield Entry(own, (label,), path, line, start=start, end=start + SECONDS, recording=video)


VGGSOUND = DataSet(
    name="vggsound",
    title="VGGSound",
    classes=309,
    splits=alone("train", "test"),
    # Two editions of the file are published, by the project's page and by its repository hche11/VGGSound.
    sizes={("train", 0): (183730, 183971), ("test", 0): (15446, 15496)},
    read=read,
    annotations=(FILE,),
    published="robots.ox.ac.uk/~vgg/data/vggsound",
    media="ID_SSSSSS.*, the start in whole seconds, or ID.*, as --id-files says",
    named_by_id=True,
    note="classes are sorted",
)
