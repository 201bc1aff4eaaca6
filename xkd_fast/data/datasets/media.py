"""The media files of a split's entries."""

from __future__ import annotations

import contextlib
import heapq
import os
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from xkd_fast.data.datasets.dataset import DataSet, Entry, IdFiles, Request
from xkd_fast.data.datasets.listing import Listing
from xkd_fast.data.sources import MEDIA_SUFFIXES, Source, SourceSet, file_size, media_names, segment_name
from xkd_fast.data.workers import run_tasks
from xkd_fast.errors import UserError

MISSING_WARNING = 0.05  # share of a split without a file, above which the user is warned
LENGTHS = 12  # files named by an id alone whose length is looked at
LENGTH_SECONDS = 30.0  # time limit for one of them
CLEAR_START = 1.0  # seconds; a part that begins earlier does not tell a clip from the whole video


class MediaIndex:
    """Media files below a folder, by their name without ending."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.names: dict[str, list[str]] = defaultdict(list)
        for name in sorted(media_names(root, MEDIA_SUFFIXES)):
            self.names[os.path.splitext(name.rsplit("/", 1)[-1])[0]].append(name)
        self.files = sum(map(len, self.names.values()))

    def find(self, stems: Sequence[str], folder: str | None) -> Sequence[str]:
        """The files of the first of these names that is there; those in ``folder`` alone, if it holds any of them."""
        found = next((self.names[stem] for stem in stems if stem in self.names), None)
        if found is None:
            return ()
        if folder is None:
            return found
        return [name for name in found if folder in name.split("/")[:-1]] or found


def assemble(dataset: DataSet, request: Request, listing: Listing) -> SourceSet:
    """The sources of a split: its entries, with their files.

    Raises:
        UserError: no file for any of them, one file for two of them, or files of which it is not clear what they hold.
    """
    warnings = list(listing.warnings)
    media = MediaIndex(request.root)
    own = [media.find(entry.stems, entry.folder) for entry in listing.entries]
    by_id = [
        media.find((entry.recording,), entry.folder) if entry.stem is None and not names else ()
        for entry, names in zip(listing.entries, own, strict=True)
    ]
    cut = dataset.named_by_id and what_id_files_hold(request, listing.entries, by_id, warnings) == "clips"
    sources = [_source(request.root, *found, cut=cut) for found in zip(listing.entries, own, by_id, strict=True)]
    about = {"dataset": dataset.name, "split": request.split} | ({"fold": request.fold} if request.fold else {})
    found = SourceSet(sources, listing.classes, about | ({"subset": True} if listing.shortened else {}), warnings)
    if not found.present:
        raise UserError(
            f"none of the {len(sources)} files of {dataset.title}'s {request.split} split lies below {request.root}, which "
            f"holds {media.files} media files; they are looked for as {dataset.media}, such as {listing.entries[0].name}"
        )
    taken: dict[str, str] = {}
    for source, entry in zip(sources, listing.entries, strict=True):
        if not source.missing and taken.setdefault(source.name, entry.name) != entry.name:
            raise UserError(
                f"{source.path} is the only file found for both {taken[source.name]} and {entry.name} of {dataset.title}; "
                "name or place their files as the release has them"
            )
    share = len(found.missing) / len(sources)
    if share > MISSING_WARNING:
        warnings.append(
            f"{len(found.missing)} of {len(sources)} files of the split ({100 * share:.0f} %) are missing, such as "
            f"{found.missing[0].name}: numbers measured on the rest are not those of {dataset.title}"
        )
    doubtful = sum(len(names or others) > 1 for names, others in zip(own, by_id, strict=True))
    if doubtful:
        warnings.append(f"{doubtful} entries have several files of their name; the first by path was taken")
    return found


def _source(root: Path, entry: Entry, own: Sequence[str], by_id: Sequence[str], *, cut: bool) -> Source:
    """The source of an entry: a file of its own, else one named by its recording, which is cut already or is cut here."""
    if not own and not by_id:
        return Source(entry.name, str(root / entry.name), entry.classes, missing=True)
    name = (own or by_id)[0]
    start, end = (None, None) if own or cut else (entry.start, entry.end)
    return Source(segment_name(name, start, end), str(root / name), entry.classes, start, end, file_size(root / name))


def what_id_files_hold(request: Request, entries: list[Entry], by_id: Sequence[Sequence[str]], warnings: list[str]) -> IdFiles:
    """Whether files named by a YouTube id alone are the clips, cut out already, or the whole videos.

    Told by the lengths of a few whose part begins late: a clip is as long as its part, a video reaches at least to its end.

    Raises:
        UserError: their lengths do not agree, or cannot be read.
    """
    if request.id_files != "auto":
        return request.id_files
    late = ((entry, names[0]) for entry, names in zip(entries, by_id, strict=True) if names and entry.start >= CLEAR_START)
    tried = heapq.nlargest(LENGTHS, late, key=lambda pair: pair[0].start)
    if not tried:
        return "videos"  # which takes the beginning of each: of a clip all of it
    paths = [str(request.root / name) for _, name in tried]
    lengths: dict[int, float] = {}
    task = "xkd_fast.data.datasets.media:length"
    with contextlib.closing(run_tasks(task, paths, workers=1, seconds=LENGTH_SECONDS)) as outcomes:
        for outcome in outcomes:
            if outcome.result:
                lengths[outcome.index] = outcome.result
    votes: dict[IdFiles, list[int]] = {"clips": [], "videos": []}
    for index, seconds in lengths.items():
        entry = tried[index][0]
        votes["clips" if seconds < entry.end - entry.start + entry.start / 2 else "videos"].append(index)
    option = "say with --id-files clips or --id-files videos what they hold"
    if not lengths:
        raise UserError(f"files such as {paths[0]} are named by a YouTube id alone, and none tells its length; {option}")
    if votes["clips"] and votes["videos"]:
        clip, video = votes["clips"][0], votes["videos"][0]
        raise UserError(
            f"files named by a YouTube id alone are of two kinds: {len(votes['clips'])} of {len(lengths)} are as short as "
            f"their clip (such as {paths[clip]}, {lengths[clip]:.3g} s), the others reach further ({paths[video]}, "
            f"{lengths[video]:.3g} s); keep one kind below SOURCE, or {option}"
        )
    kind: IdFiles = "clips" if votes["clips"] else "videos"
    meaning = {"clips": "the clips, cut out already", "videos": "whole videos, of which the clip is cut out"}[kind]
    warnings.append(
        f"files named by a YouTube id alone are taken for {meaning}, by the lengths of {len(lengths)} of them; "
        f"--id-files {'videos' if kind == 'clips' else 'clips'} says otherwise"
    )
    return kind


def length(path: str) -> float | None:
    """Seconds of a file by its header; None where that does not say, or cannot be read. Runs in a worker process."""
    import av

    from xkd_fast.data.source_file import open_source, promise_of

    try:
        with open_source(path) as container:
            return promise_of(container).seconds or None
    except (av.error.FFmpegError, OSError, ValueError):
        return None
