"""The samples of an evaluation: which train, which test, and the features of their clips."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from xkd_fast.data.shards import ShardSet
from xkd_fast.data.storage import shown
from xkd_fast.evaluate.features import ClipFeatures, TrainedModel
from xkd_fast.evaluate.options import require

LEFT_OUT = {"video": "video", "audio": "audio", "both": "both together"}


@dataclass(frozen=True)
class Samples:
    """Some samples of a shard set, with labels that count into the report's classes."""

    shards: ShardSet
    numbers: NDArray[np.int64]
    labels: NDArray  # [samples] int64 class numbers, or [samples, classes] bool where samples have several

    def take(self, places: NDArray[np.int64]) -> Samples:
        """The samples at ``places``."""
        return Samples(self.shards, self.numbers[places], self.labels[places])


@dataclass(frozen=True)
class Rows:
    """Features of clips, and the sample (by its place among the labels) that each is of."""

    values: NDArray[np.float32]  # [clips, width]
    samples: NDArray[np.int64]  # [clips]
    labels: NDArray  # [samples] int64, or [samples, classes] bool

    @classmethod
    def of(cls, features: ClipFeatures, modality: str, samples: Samples) -> Rows:
        """Features of the clips of ``samples``; clips are told apart by sample number, so their order does not matter."""
        order = np.argsort(samples.numbers)
        places = order[np.searchsorted(samples.numbers, features.samples, sorter=order)]
        return cls(features.of(modality), places, samples.labels)

    def only(self, places: NDArray[np.int64]) -> Rows:
        """The clips of the samples at ``places``."""
        chosen = np.isin(self.samples, places)
        return Rows(self.values[chosen], self.samples[chosen], self.labels)

    def averaged(self, scores: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Samples that there are clips of (ascending places), and the means of their clips' scores, [samples, classes].

        Args:
            scores: [clips, classes], of these clips.
        """
        found, place = np.unique(self.samples, return_inverse=True)
        sums = np.zeros((len(found), scores.shape[1]))
        np.add.at(sums, place, scores)
        return found, sums / np.bincount(place)[:, None]


def require_labels(shards: ShardSet, path: Path | str) -> None:
    """Refuse shards of which a sample has no class.

    Raises:
        UserError: naming the first.
    """
    missing = [number for number, labels in enumerate(shards.label_sets) if not labels]
    require(
        not missing,
        f"{len(missing)} of {len(shards)} samples in {shown(path)} have no label"
        + (f" (the first is {shards.record(missing[0]).key})" if missing else "")
        + "; an SVM needs one for each: prepare videos from folders named by class",
    )


def class_numbers(shards: ShardSet, path: Path | str, classes: Sequence[str]) -> NDArray[np.int64]:
    """Places in ``classes`` of the set's own classes, by their numbers; -1 for those that no sample has.

    Raises:
        UserError: samples of a class that is not among them.
    """
    own = list(shards.classes)
    used = {label for labels in shards.label_sets for label in labels}
    unknown = sorted({own[label] for label in used} - set(classes))
    require(
        not unknown,
        f"{shown(path)} holds classes that the training data lacks: {', '.join(unknown)}; "
        "an SVM cannot name what it was not taught",
    )
    places = {name: place for place, name in enumerate(classes)}
    return np.array([places.get(name, -1) for name in own], dtype=np.int64)


def present_modalities(asked: Sequence[str], train: Samples, test: Samples) -> tuple[tuple[str, ...], list[str]]:
    """The kinds of features that every sample has, of those asked for; and sentences on the others.

    Raises:
        UserError: none is left.
    """
    both = [train, test]
    count = sum(len(samples.numbers) for samples in both)
    silent = sum(int((~samples.shards.has_audio[samples.numbers]).sum()) for samples in both)
    blind = sum(int((~samples.shards.has_video[samples.numbers]).sum()) for samples in both)
    lacking = {"video": blind, "audio": silent, "both": max(blind, silent)}
    kept = tuple(name for name in asked if not lacking[name])
    *others, last = [LEFT_OUT[name] for name in asked if lacking[name]] or [""]
    told = [
        f"{number} of {count} samples {'has' if number == 1 else 'have'} no {what}"
        for what, number in (("sound", silent), ("picture", blind))
        if number
    ]
    reason = f"{', '.join(others)}{' and ' if others else ''}{last} cannot be evaluated, because {' and '.join(told)}"
    require(bool(kept), f"{reason}; ask for others with --modalities, or prepare samples that have both")
    return kept, [reason] if last else []


def check_clips(trained: TrainedModel, shards: ShardSet) -> None:
    """Refuse shards of another frame rate or sample rate than the model was trained on.

    Raises:
        UserError: naming both, and what to do.
    """
    data = trained.config.data
    for name, unit, stored, expected in (
        ("fps", "frames/s", shards.fps, data.fps),
        ("sample-rate", "audio samples/s", shards.sample_rate, data.sample_rate),
    ):
        require(
            stored == expected,
            f"the shards hold {stored:g} {unit}, but {trained.file} was trained on {expected:g}; "
            f"prepare them again with --{name} {expected:g}",
        )
