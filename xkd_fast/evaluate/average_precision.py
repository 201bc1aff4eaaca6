"""Mean average precision of linear SVMs on frozen features, for samples of several classes (FSD50K, AudioSet).

One linear SVM a class tells its samples from all others. Several random clips of every training sample, each a row of its own,
train it; its scores of a few clips spread evenly over a test sample are averaged. A class's average precision is scikit-learn's
(no interpolation), and classes count alike: the mean is over those that have a test sample. C is chosen on held-out training
samples, one for all classes, so the test set has no say in it.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import average_precision_score
from sklearn.svm import LinearSVC
from sklearn.utils.parallel import Parallel, delayed

from xkd_fast.data.shards import ShardSet
from xkd_fast.data.storage import shown
from xkd_fast.evaluate.options import SvmOptions, read_arguments, require
from xkd_fast.evaluate.protocol import (
    MAX_ITERATIONS,
    Report,
    measure,
    notes_on_solvers,
    sweep_c,
    tell,
    write_report,
)
from xkd_fast.evaluate.samples import Rows, Samples, class_numbers, require_labels

FILE = "map.json"
NAMED = 8  # classes that a note names


@dataclass(frozen=True)
class MapTrial:
    """One C of the sweep. Means are over the classes that have a sample among those measured, 0-1."""

    c: float
    validation_map: float | None  # of SVMs trained without the validation samples; None if C had no rival
    test_map: float  # of SVMs trained on all training samples
    converged: bool


@dataclass(frozen=True)
class MapResult:
    """What one kind of features is worth."""

    c: float  # chosen on the validation samples
    map: float  # mean of the average precisions, 0-1
    best_on_test: float  # the best of the sweep on the test set, optimistic
    average_precision: list[float | None]  # of each class, 0-1; None where it has no test sample
    sweep: list[MapTrial]


@dataclass(frozen=True)
class MapReport(Report[MapResult]):
    """The result of :func:`evaluate_map`, as written to ``map.json``.

    Chance is the mean, over the classes that count, of their shares of the test samples.
    """

    @property
    def map(self) -> dict[str, float]:
        """Mean average precision by modality, 0-1, at the C chosen without the test set."""
        return {modality: result.map for modality, result in self.results.items()}

    def table(self) -> Table:
        """The report for a terminal, in per cent."""

        def values(found: MapResult) -> tuple[float | None, ...]:
            validation = next(row.validation_map for row in found.sweep if row.c == found.c)
            return validation, found.map, found.best_on_test

        return self.rows("Mean average precision of linear SVMs", ("validation", "mAP", "best on test"), values)


# ------------------------------------------------------------------------------------------------------------- the samples


def random_split(count: int, fraction: float, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Places of the samples kept and of those held out, ascending: ``fraction`` of ``count``, at least one of each of two."""
    places = np.random.default_rng(seed).permutation(count)
    held_out = min(max(round(count * fraction), 1), count - 1)
    return np.sort(places[held_out:]), np.sort(places[:held_out])


def open_samples(path: Path | str, classes: list[str] | None) -> tuple[Samples, list[str]]:
    """All samples of a shard folder, and the classes that their labels count into (``classes``, if given).

    Raises:
        UserError: samples without a class, or of one that is not among ``classes``.
    """
    shards = ShardSet.open(path)
    require_labels(shards, path)
    classes = list(shards.classes) if classes is None else classes
    numbers = class_numbers(shards, path, classes)
    labels = np.zeros((len(shards), len(classes)), dtype=bool)
    for sample, own in enumerate(shards.label_sets):
        labels[sample, numbers[list(own)]] = True
    return Samples(shards, np.arange(len(shards)), labels), classes


def train_and_test(options: SvmOptions) -> tuple[Samples, Samples, list[str]]:
    """Training samples, test samples and classes: of two folders, or of one split by sample.

    Raises:
        UserError: no class that some training samples have and others have not, or nothing to test on.
    """
    everything, classes = open_samples(options.data, None)
    if options.test_data is not None:
        train, test = everything, open_samples(options.test_data, classes)[0]
    else:
        require(
            len(everything.numbers) > 1, f"{shown(options.data)} holds one sample; name samples to test on with --test-data"
        )
        kept, held_out = random_split(len(everything.numbers), options.test_fraction, options.seed)
        train, test = everything.take(kept), everything.take(held_out)
    require(
        bool(told_apart(train.labels).any()),
        f"no class of {shown(options.data)} is told from others by the training samples: each is on all of them or on none",
    )
    return train, test, classes


def told_apart(labels: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """[classes]: whether some of the samples have a class and others have not."""
    return np.logical_and(labels.any(axis=0), np.logical_not(labels.all(axis=0)))


# ----------------------------------------------------------------------------------------------------------------- the SVMs


@dataclass(frozen=True)
class LinearScores:
    """A linear score for each class; 0 for those that the training samples do not tell from others."""

    weights: NDArray[np.float64]  # [classes, width]
    biases: NDArray[np.float64]  # [classes]

    def of(self, rows: Rows) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
        """Classes and scores, averaged over clips, of the samples that there are clips of: [samples, classes] each."""
        found, scores = rows.averaged(rows.values @ self.weights.T + self.biases)
        return rows.labels[found], scores


def fit_each(rows: Rows, c: float, seed: int) -> tuple[LinearScores, bool]:
    """A linear SVM for every class, on every clip, over all processors; and whether all solvers converged."""
    values = rows.values.astype(np.float64)  # once, not once for each class
    labels = rows.labels[rows.samples]

    def fit(number: int) -> LinearSVC:
        # The dual solver draws from one generator for the whole process, so with threads it would not repeat itself.
        return LinearSVC(C=c, dual=False, max_iter=MAX_ITERATIONS, random_state=seed).fit(values, labels[:, number])

    numbers = np.flatnonzero(told_apart(labels))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # noted by what the solvers say of their iterations
        fitted = Parallel(n_jobs=-1, prefer="threads")(delayed(fit)(int(number)) for number in numbers)
    weights, biases = np.zeros((labels.shape[1], values.shape[1])), np.zeros(labels.shape[1])
    for number, classifier in zip(numbers, fitted, strict=True):
        weights[number], biases[number] = classifier.coef_[0], classifier.intercept_[0]
    return LinearScores(weights, biases), all(classifier.n_iter_ < MAX_ITERATIONS for classifier in fitted)


def average_precisions(truth: NDArray[np.bool_], scores: NDArray[np.float64]) -> list[float | None]:
    """Average precision of each class; None where no sample has it.

    Args:
        truth, scores: [samples, classes].
    """
    return [
        float(average_precision_score(truth[:, number], scores[:, number])) if truth[:, number].any() else None
        for number in range(truth.shape[1])
    ]


def mean_average_precision(truth: NDArray[np.bool_], scores: NDArray[np.float64]) -> float:
    """The mean over the classes that a sample has."""
    return float(np.mean([value for value in average_precisions(truth, scores) if value is not None]))


def evaluate_rows(train: Rows, test: Rows, classes: int, options: SvmOptions, modality: str) -> MapResult:
    """Sweep C, choose it on held-out training samples, and report the test samples.

    Raises:
        UserError: more than one C, but no class left to choose it on.
    """
    c_values = options.c_values(modality)
    kept, held_out = random_split(len(train.labels), options.validation_fraction, options.seed + 1)
    require(
        len(c_values) == 1 or bool((told_apart(train.labels[kept]) & train.labels[held_out].any(axis=0)).any()),
        f"C cannot be chosen: no class of {shown(options.data)} has training samples on both sides when "
        f"{len(held_out)} of {len(train.labels)} are held out; give one value with --svm-c",
    )

    def fit(rows: Rows, c: float) -> tuple[Callable[[Rows], Any], bool]:
        scores, converged = fit_each(rows, c, options.seed)
        return scores.of, converged

    trials, best, predictions = sweep_c(
        c_values,
        train,
        train.only(kept),
        train.only(held_out),
        test,
        fit,
        lambda found: mean_average_precision(*found),
    )
    return MapResult(
        c=best.c,
        map=best.test,
        best_on_test=max(trial.test for trial in trials),
        average_precision=average_precisions(*predictions[best.c]),
        sweep=[MapTrial(*trial) for trial in trials],
    )


# ----------------------------------------------------------------------------------------------------------------- the report


def evaluate_map(options: SvmOptions, *, console: Console | None = None) -> MapReport:
    """Extract features, train the SVMs, and report; writes ``map.json`` into ``options.output``, if given.

    Args:
        options: what is evaluated; samples may have one class or several.
        console: where the progress bar is shown; None = nowhere.

    Raises:
        UserError: an unusable checkpoint, data that do not fit it or hold nothing to tell apart, or a wrong option.
    """
    measured = measure(options, train_and_test, evaluate_rows, FILE, console)
    shares = measured.test.labels.mean(axis=0)
    report = MapReport(
        chance=float(shares[shares > 0].mean()),
        classes=measured.classes,
        results=measured.results,
        notes=measured.left_out + notes_on(measured.results, measured.train, measured.test, measured.classes),
        **measured.about,
    )
    if options.output is not None:
        write_report(asdict(report) | {"map": report.map}, options.output / FILE)
    return report


def notes_on(results: dict[str, MapResult], train: Samples, test: Samples, classes: list[str]) -> list[str]:
    """What a reader of the numbers should know."""
    tested = set(np.flatnonzero(test.labels.any(axis=0)).tolist())
    guessed = tested - set(np.flatnonzero(told_apart(train.labels)).tolist())
    notes = []
    for names, text in (
        ([name for number, name in enumerate(classes) if number not in tested], "have no test sample and are not counted"),
        (
            [classes[number] for number in sorted(guessed)],
            "are not told from others by the training samples, and count as a guess does",
        ),
    ):
        if names:
            more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
            notes.append(f"{len(names)} of {len(classes)} classes {text}: {', '.join(names[:NAMED])}{more}")
    return notes + notes_on_solvers({name: [(row.c, row.converged) for row in found.sweep] for name, found in results.items()})


def run(args: argparse.Namespace) -> int:
    """``xkd-fast evaluate map``: evaluate, print the table, write the JSON; returns the exit code."""
    report = evaluate_map(read_arguments(args), console=Console(stderr=True))
    tell(report, None if args.output is None else args.output / FILE)
    return 0
