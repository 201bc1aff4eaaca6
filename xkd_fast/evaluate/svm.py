"""Linear SVMs on frozen features, the quick measure of what pretraining has learnt (XKD.md section 10).

Several random clips of every training sample, each a row of its own, train scikit-learn's one-vs-rest linear SVM; the scores of
a few clips spread evenly over a test sample are averaged. Features are used as they come out of the encoder's last norm,
not standardised; ``both`` is video and audio, each L2-normalised, side by side.

C is chosen on held-out training samples, so the test set has no say in it. The released protocol picks the best C on the
test set; that number is reported beside ours as ``best on test``, and is not ours.
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
from sklearn.svm import LinearSVC

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

FILE = "svm.json"


@dataclass(frozen=True)
class CResult:
    """One C of the sweep. Accuracies are shares of samples, 0-1."""

    c: float
    validation_top1: float | None  # of an SVM trained without the validation samples; None if C had no rival
    test_top1: float  # of an SVM trained on all training samples
    converged: bool


@dataclass(frozen=True)
class ModalityResult:
    """What one kind of features is worth. Accuracies are shares of test samples, 0-1."""

    c: float  # chosen on the validation samples
    top1: float
    top5: float | None  # None with 5 classes or fewer
    best_on_test: float  # the best of the sweep on the test set: the released protocol, optimistic
    sweep: list[CResult]
    confusion: list[list[int]]  # [true class][predicted class], test samples


@dataclass(frozen=True)
class SvmReport(Report[ModalityResult]):
    """The result of :func:`evaluate_svm`, as written to ``svm.json``; chance is 1 / number of classes taught."""

    @property
    def top1(self) -> dict[str, float]:
        """Top-1 accuracy by modality, 0-1, at the C chosen without the test set."""
        return {modality: result.top1 for modality, result in self.results.items()}

    def table(self) -> Table:
        """The report for a terminal, in per cent."""

        def values(found: ModalityResult) -> tuple[float | None, ...]:
            validation = next(row.validation_top1 for row in found.sweep if row.c == found.c)
            return validation, found.top1, found.top5, found.best_on_test

        return self.rows("Linear SVM", ("validation", "top-1", "top-5", "best on test"), values)


# ------------------------------------------------------------------------------------------------------------- the samples


def stratified_split(labels: NDArray[np.int64], fraction: float, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Places of the samples kept and of those held out, ascending.

    ``fraction`` of every class is held out (rounded; at least one, and at least one kept); a class of one sample is kept.
    """
    generator = np.random.default_rng(seed)
    held_out: list[NDArray[np.int64]] = [np.empty(0, np.int64)]
    for label in np.unique(labels):
        places = generator.permutation(np.flatnonzero(labels == label))
        count = min(max(round(len(places) * fraction), 1), len(places) - 1)
        held_out.append(places[:count])
    out = np.sort(np.concatenate(held_out))
    return np.setdiff1d(np.arange(len(labels)), out), out


def open_samples(path: Path | str, classes: list[str] | None) -> tuple[Samples, list[str]]:
    """All samples of a shard folder, and the classes their labels count into (``classes``, if given).

    Raises:
        UserError: samples without a label, of several classes, or of a class that is not among ``classes``.
    """
    shards = ShardSet.open(path)
    several = sum(len(found) > 1 for found in shards.label_sets)
    require(
        several == 0,
        f"{several} of {len(shards)} samples in {shown(path)} have several classes, and an SVM tells one from another; "
        "measure such a set with `xkd-fast evaluate map`",
    )
    require_labels(shards, path)
    labels = np.asarray(shards.labels, dtype=np.int64)
    if classes is None:
        return Samples(shards, np.arange(len(labels)), labels), list(shards.classes)
    return Samples(shards, np.arange(len(labels)), class_numbers(shards, path, classes)[labels]), classes


def train_and_test(options: SvmOptions) -> tuple[Samples, Samples, list[str]]:
    """Training samples, test samples and classes: of two folders, or of one split by sample.

    Raises:
        UserError: fewer than two classes to tell apart, or nothing to test on.
    """
    everything, classes = open_samples(options.data, None)
    if options.test_data is not None:
        train, test = everything, open_samples(options.test_data, classes)[0]
    else:
        kept, held_out = stratified_split(everything.labels, options.test_fraction, options.seed)
        train, test = everything.take(kept), everything.take(held_out)
    taught = len(np.unique(train.labels))
    require(taught >= 2, f"{shown(options.data)} holds samples of {taught} class; an SVM needs at least two to tell apart")
    require(
        len(test.numbers) > 0,
        f"no class of {shown(options.data)} has a second sample to test on; name test samples with --test-data",
    )
    unseen = sorted(
        {classes[label] for label in np.unique(test.labels)} - {classes[label] for label in np.unique(train.labels)}
    )
    require(not unseen, f"the test data have classes without a training sample in {shown(options.data)}: {', '.join(unseen)}")
    return train, test, classes


# ------------------------------------------------------------------------------------------------------------------ the SVM


def fit_svm(rows: Rows, c: float, seed: int) -> tuple[LinearSVC, bool]:
    """A linear SVM on every clip, and whether its solver converged."""
    classifier = LinearSVC(C=c, dual="auto", max_iter=MAX_ITERATIONS, random_state=seed)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        classifier.fit(rows.values, rows.labels[rows.samples])
    return classifier, not any(issubclass(warning.category, ConvergenceWarning) for warning in caught)


def sample_scores(classifier: LinearSVC, rows: Rows) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Samples that ``rows`` holds clips of (ascending places), and their scores [samples, classes], averaged over clips."""
    scores = classifier.decision_function(rows.values)
    if scores.ndim == 1:  # two classes: one score, for the second
        scores = np.stack([-scores, scores], axis=1)
    return rows.averaged(scores)


def predicted_classes(classifier: LinearSVC, rows: Rows) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """True labels [samples], and classes [samples, classes] by falling score."""
    found, scores = sample_scores(classifier, rows)
    return rows.labels[found], classifier.classes_[np.argsort(-scores, axis=1, kind="stable")]


def top_k(truth: NDArray[np.int64], ranked: NDArray[np.int64], k: int) -> float:
    """Share of samples whose class is among the ``k`` best."""
    return float((ranked[:, :k] == truth[:, None]).any(axis=1).mean())


def evaluate_rows(train: Rows, test: Rows, classes: int, options: SvmOptions, modality: str) -> ModalityResult:
    """Sweep C, choose it on held-out training samples, and report the test samples.

    Raises:
        UserError: more than one C, but no class with a second training sample to choose on.
    """
    c_values = options.c_values(modality)
    kept, held_out = stratified_split(train.labels, options.validation_fraction, options.seed + 1)
    require(
        len(c_values) == 1 or len(held_out) > 0,
        f"C cannot be chosen: no class of {shown(options.data)} has a second training sample to hold out; "
        "give one value with --svm-c",
    )

    def fit(rows: Rows, c: float) -> tuple[Callable[[Rows], Any], bool]:
        classifier, converged = fit_svm(rows, c, options.seed)
        return lambda others: predicted_classes(classifier, others), converged

    trials, best, predictions = sweep_c(
        c_values, train, train.only(kept), train.only(held_out), test, fit, lambda found: top_k(found[0], found[1], 1)
    )
    truth, ranked = predictions[best.c]
    confusion = np.zeros((classes, classes), dtype=int)
    np.add.at(confusion, (truth, ranked[:, 0]), 1)
    return ModalityResult(
        c=best.c,
        top1=best.test,
        top5=top_k(truth, ranked, 5) if ranked.shape[1] > 5 else None,
        best_on_test=max(trial.test for trial in trials),
        sweep=[CResult(*trial) for trial in trials],
        confusion=confusion.tolist(),
    )


# ----------------------------------------------------------------------------------------------------------------- the report


def evaluate_svm(options: SvmOptions, *, console: Console | None = None) -> SvmReport:
    """Extract features, train the SVMs, and report; writes ``svm.json`` into ``options.output``, if given.

    Args:
        options: what is evaluated.
        console: where the progress bar is shown; None = nowhere.

    Raises:
        UserError: an unusable checkpoint, data that do not fit it or hold nothing to tell apart, or a wrong option.
    """
    measured = measure(options, train_and_test, evaluate_rows, FILE, console)
    report = SvmReport(
        chance=1 / len(np.unique(measured.train.labels)),
        classes=measured.classes,
        results=measured.results,
        notes=measured.left_out + notes_on(measured.results, measured.train, measured.classes),
        **measured.about,
    )
    if options.output is not None:
        write_report(asdict(report) | {"top1": report.top1}, options.output / FILE)
    return report


def notes_on(results: dict[str, ModalityResult], train: Samples, classes: list[str]) -> list[str]:
    """What a reader of the numbers should know."""
    counts = np.bincount(train.labels, minlength=len(classes))
    single = [name for name, count in zip(classes, counts, strict=True) if count == 1]
    notes = [f"classes with one training sample, so with none to choose C on: {', '.join(single)}"] if single else []
    return notes + notes_on_solvers({name: [(row.c, row.converged) for row in found.sweep] for name, found in results.items()})


def run(args: argparse.Namespace) -> int:
    """``xkd-fast evaluate svm``: evaluate, print the table, write the JSON; returns the exit code."""
    report = evaluate_svm(read_arguments(args), console=Console(stderr=True))
    tell(report, None if args.output is None else args.output / FILE)
    return 0
