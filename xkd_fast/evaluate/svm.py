"""Linear SVMs on frozen features, the quick measure of what pretraining has learnt (XKD.md section 10).

Several random clips of every training sample, each a row of its own, train scikit-learn's one-vs-rest linear SVM; the scores of
a few clips spread evenly over a test sample are averaged. Features are used as they come out of the encoder's last norm,
not standardised; ``both`` is video and audio, each L2-normalised, side by side.

C is chosen on held-out training samples, so the test set has no say in it. The released protocol picks the best C on the
test set; that number is reported beside ours as ``best on test``, and is not ours.
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from sklearn.exceptions import ConvergenceWarning
from sklearn.svm import LinearSVC

from xkd_fast.data.pipeline import clips
from xkd_fast.data.shards import ShardSet, shard_place
from xkd_fast.data.storage import shown
from xkd_fast.errors import UserError
from xkd_fast.evaluate.features import ClipFeatures, Role, TrainedModel, extract_features, load_model
from xkd_fast.files import write_aside

Features = Literal["video", "audio", "both"]
MODALITIES: tuple[Features, ...] = get_args(Features)
DEFAULT_C: dict[str, tuple[float, ...]] = {
    "video": (1e-3, 1e-2, 1e-1, 1.0),
    "audio": (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0),
    "both": (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0),
}
DEVICES = ("auto", "cpu", "cuda")
MAX_ITERATIONS = 5000
PACKAGES = ("xkd-fast", "torch", "numpy", "scikit-learn", "nvidia-dali-cuda130", "nvidia-dali-cuda120")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


def _resolved(place: Path | str) -> str:
    return place.rstrip("/") if isinstance(place, str) else str(place.resolve())


@dataclass(frozen=True)
class SvmOptions:
    """What is evaluated, and how.

    Raises:
        UserError: naming a value, the rule it breaks and the argument to change.
    """

    checkpoint: Path  # a checkpoint's folder, its model.safetensors, or a run's folder
    data: Path | str  # shards to train the SVM on, and to test it on where test_data is None; an address is a str
    test_data: Path | str | None = None
    network: Role = "teacher"  # whose encoder
    modalities: tuple[str, ...] = MODALITIES
    train_clips: int = 25  # random clips per training sample
    test_clips: int = 3  # clips per test sample, evenly spaced, scores averaged
    svm_c: tuple[float, ...] | None = None  # None = the sweep of DEFAULT_C
    test_fraction: float = 0.25  # share of each class's samples tested where test_data is None
    validation_fraction: float = 0.2  # share of each class's training samples on which C is chosen
    seed: int = 0  # of the splits, the random clips and the solver
    untrained: bool = False  # the same model as its run began with it
    output: Path | None = None  # folder for svm.json; None = write nothing
    batch: int = 16  # clips encoded at a time
    device: str = "auto"  # auto = a GPU where there is one

    def __post_init__(self) -> None:
        _require(self.network in get_args(Role), f"--network {self.network} must be one of {', '.join(get_args(Role))}")
        unknown = [name for name in self.modalities if name not in MODALITIES]
        _require(
            bool(self.modalities) and not unknown,
            f"--modalities {shlex.quote(','.join(self.modalities))} must name some of {', '.join(MODALITIES)}, "
            "separated by commas",
        )
        for name in ("train_clips", "test_clips", "batch"):
            value = getattr(self, name)
            _require(value >= 1, f"--{name.replace('_', '-')} {value} must be 1 or more")
        for name in ("test_fraction", "validation_fraction"):
            value = getattr(self, name)
            _require(0 < value < 1, f"--{name.replace('_', '-')} {value} must lie between 0 and 1")
        _require(
            self.svm_c is None or (len(self.svm_c) > 0 and all(0 < c < float("inf") for c in self.svm_c)),
            f"--svm-c {','.join(f'{c:g}' for c in self.svm_c or ())} must be finite numbers above 0, such as 1e-3,1e-2,1e-1,1",
        )
        _require(self.device in DEVICES, f"--device {self.device} must be one of {', '.join(DEVICES)}")
        _require(
            self.device != "cuda" or torch.cuda.is_available(),
            "--device cuda needs a GPU, and torch sees none here; use auto or cpu",
        )
        _require(0 <= self.seed < 2**32, f"--seed {self.seed} must lie in 0-{2**32 - 1}")
        _require(
            self.test_data is None or _resolved(self.test_data) != _resolved(self.data),
            f"--test-data {shown(self.data)} is the same folder as --data; leave it out to split --data into training and test",
        )

    def c_values(self, modality: str) -> tuple[float, ...]:
        """The C sweep of a modality, ascending."""
        return tuple(sorted(set(self.svm_c or DEFAULT_C[modality])))


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
class SvmReport:
    """The result of :func:`evaluate_svm`, as written to ``svm.json``."""

    chance: float  # 1 / number of classes taught
    classes: list[str]
    results: dict[str, ModalityResult]  # by modality
    samples: dict[str, int]  # training and test samples
    settings: dict[str, Any]
    model: dict[str, Any]  # file, step, seed, width
    versions: dict[str, str]
    seconds: float
    notes: list[str] = field(default_factory=list)

    @property
    def top1(self) -> dict[str, float]:
        """Top-1 accuracy by modality, 0-1, at the C chosen without the test set."""
        return {modality: result.top1 for modality, result in self.results.items()}

    def table(self) -> Table:
        """The report for a terminal, in per cent."""
        kind = f"{self.settings['network']}, {'untrained' if self.settings['untrained'] else 'step ' + str(self.model['step'])}"
        table = Table(title=f"Linear SVM on frozen features ({kind}), {self.samples['test']} test samples, %")
        for heading in ("features", "C", "validation", "top-1", "top-5", "best on test", "chance"):
            table.add_column(heading, justify="left" if heading == "features" else "right")
        for modality, result in self.results.items():
            validation = next(row.validation_top1 for row in result.sweep if row.c == result.c)
            numbers = (validation, result.top1, result.top5, result.best_on_test, self.chance)
            table.add_row(modality, f"{result.c:g}", *("–" if x is None else f"{100 * x:.1f}" for x in numbers))
        return table


# ------------------------------------------------------------------------------------------------------------- the samples


@dataclass(frozen=True)
class Samples:
    """Some samples of a shard set, with labels that count into the report's classes."""

    shards: ShardSet
    numbers: NDArray[np.int64]
    labels: NDArray[np.int64]

    def take(self, places: NDArray[np.int64]) -> Samples:
        """The samples at ``places``."""
        return Samples(self.shards, self.numbers[places], self.labels[places])


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
        UserError: samples without a label, or of a class that is not among ``classes``.
    """
    shards = ShardSet.open(path)
    labels = np.asarray(shards.labels, dtype=np.int64)
    several = sum(len(found) > 1 for found in shards.label_sets)
    _require(
        several == 0,
        f"{several} of {len(labels)} samples in {shown(path)} have several classes, and an "
        "SVM tells one from another; evaluate on a set with one class a sample",
    )
    missing = np.flatnonzero(labels < 0)
    _require(
        len(missing) == 0,
        f"{len(missing)} of {len(labels)} samples in {shown(path)} have no label"
        + (f" (the first is {shards.record(int(missing[0])).key})" if len(missing) else "")
        + "; an SVM needs one for each: prepare videos from folders named by class",
    )
    own = list(shards.classes)
    if classes is None:
        return Samples(shards, np.arange(len(labels)), labels), own
    unknown = sorted({own[label] for label in np.unique(labels)} - set(classes))
    _require(
        not unknown,
        f"{shown(path)} holds classes that the training data lacks: {', '.join(unknown)}; "
        "an SVM cannot name what it was not taught",
    )
    table = np.array([classes.index(name) if name in classes else -1 for name in own], dtype=np.int64)
    return Samples(shards, np.arange(len(labels)), table[labels]), classes


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
    _require(taught >= 2, f"{shown(options.data)} holds samples of {taught} class; an SVM needs at least two to tell apart")
    _require(
        len(test.numbers) > 0,
        f"no class of {shown(options.data)} has a second sample to test on; name test samples with --test-data",
    )
    unseen = sorted(
        {classes[label] for label in np.unique(test.labels)} - {classes[label] for label in np.unique(train.labels)}
    )
    _require(not unseen, f"the test data have classes without a training sample in {shown(options.data)}: {', '.join(unseen)}")
    return train, test, classes


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
    told = [f"{number} of {count} samples have no {what}" for what, number in (("sound", silent), ("picture", blind)) if number]
    left_out = [name for name in asked if lacking[name]]
    reason = f"{' and '.join(left_out)} cannot be evaluated: {' and '.join(told)}"
    _require(bool(kept), f"{reason}; ask for others with --modalities, or prepare samples that have both")
    return kept, [reason] if left_out else []


# ------------------------------------------------------------------------------------------------------------------ the SVM


@dataclass(frozen=True)
class Rows:
    """Features of clips, and the sample (by its place among the labels) that each is of."""

    values: NDArray[np.float32]  # [clips, width]
    samples: NDArray[np.int64]  # [clips]
    labels: NDArray[np.int64]  # [samples]

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
    found, place = np.unique(rows.samples, return_inverse=True)
    sums = np.zeros((len(found), scores.shape[1]))
    np.add.at(sums, place, scores)
    return found, sums / np.bincount(place)[:, None]


def predicted_classes(classifier: LinearSVC, rows: Rows) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """True labels [samples], and classes [samples, classes] by falling score."""
    found, scores = sample_scores(classifier, rows)
    return rows.labels[found], classifier.classes_[np.argsort(-scores, axis=1, kind="stable")]


def top_k(truth: NDArray[np.int64], ranked: NDArray[np.int64], k: int) -> float:
    """Share of samples whose class is among the ``k`` best."""
    return float((ranked[:, :k] == truth[:, None]).any(axis=1).mean())


def _places(options: SvmOptions) -> dict[str, str | None]:
    """Where the samples are, as a report may tell it."""
    return {"data": shown(options.data), "test_data": None if options.test_data is None else shown(options.test_data)}


def evaluate_rows(train: Rows, test: Rows, classes: int, options: SvmOptions, modality: str) -> ModalityResult:
    """Sweep C, choose it on held-out training samples, and report the test samples.

    Raises:
        UserError: more than one C, but no class with a second training sample to choose on.
    """
    c_values = options.c_values(modality)
    kept, held_out = stratified_split(train.labels, options.validation_fraction, options.seed + 1)
    _require(
        len(c_values) == 1 or len(held_out) > 0,
        f"C cannot be chosen: no class of {shown(options.data)} has a second training sample to hold out; "
        "give one value with --svm-c",
    )
    sweep, ranked_by_c = [], {}
    for c in c_values:
        validation = None
        if len(c_values) > 1:
            classifier, _ = fit_svm(train.only(kept), c, options.seed)
            validation = top_k(*predicted_classes(classifier, train.only(held_out)), 1)
        classifier, converged = fit_svm(train, c, options.seed)
        truth, ranked_by_c[c] = predicted_classes(classifier, test)
        sweep.append(CResult(c, validation, top_k(truth, ranked_by_c[c], 1), converged))
    best = max(sweep, key=lambda row: row.validation_top1 or 0.0)  # the smallest C of equals
    ranked = ranked_by_c[best.c]
    confusion = np.zeros((classes, classes), dtype=int)
    np.add.at(confusion, (truth, ranked[:, 0]), 1)
    return ModalityResult(
        c=best.c,
        top1=best.test_top1,
        top5=top_k(truth, ranked, 5) if ranked.shape[1] > 5 else None,
        best_on_test=max(row.test_top1 for row in sweep),
        sweep=sweep,
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
    start = time.perf_counter()
    if options.output is not None:
        try:
            options.output.mkdir(parents=True, exist_ok=True)  # what cannot be written is better known before the work
        except OSError as error:
            raise UserError(
                f"--output {options.output} cannot be made a folder ({error.strerror}); name another one for svm.json"
            ) from error
    trained = load_model(options.checkpoint, untrained=options.untrained)
    train, test, classes = train_and_test(options)
    for samples in (train, test):
        check_clips(trained, samples.shards)
    modalities, left_out = present_modalities(options.modalities, train, test)
    options = replace(options, modalities=modalities)
    with progress_bar(console) as progress:
        train_features = features_of(trained, train, options, progress, "training clips", random=True)
        test_features = features_of(trained, test, options, progress, "test clips", random=False)
        results, task = {}, progress.add_task("SVMs", total=len(options.modalities))
        for modality in options.modalities:
            rows = (Rows.of(train_features, modality, train), Rows.of(test_features, modality, test))
            results[modality] = evaluate_rows(*rows, len(classes), options, modality)
            progress.advance(task)
    config = trained.config
    report = SvmReport(
        chance=1 / len(np.unique(train.labels)),
        classes=classes,
        results=results,
        samples={"train": len(train.numbers), "test": len(test.numbers)},
        settings=json.loads(json.dumps(asdict(options), default=str)) | _places(options),
        model={"file": str(trained.file), "step": trained.step, "seed": config.seed, "options": config.as_dict()["model"]},
        versions=installed_versions(),
        seconds=round(time.perf_counter() - start, 1),
        notes=left_out + notes_on(results, train, classes),
    )
    if options.output is not None:
        write_report(report, options.output / "svm.json")
    return report


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
        _require(
            stored == expected,
            f"the shards hold {stored:g} {unit}, but {trained.file} was trained on {expected:g}; "
            f"prepare them again with --{name} {expected:g}",
        )


def features_of(
    trained: TrainedModel, samples: Samples, options: SvmOptions, progress: Progress, title: str, *, random: bool
) -> ClipFeatures:
    """Features of ``train_clips`` random clips or ``test_clips`` uniform clips of every sample."""
    per_sample = options.train_clips if random else options.test_clips
    device = options.device if options.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    task = progress.add_task(title, total=per_sample * len(samples.numbers))
    config = trained.config
    modalities = [name for name in ("video", "audio") if name in options.modalities or "both" in options.modalities]
    batches = clips(
        samples.shards,
        config.model,
        config.mel,
        config.data,
        per_sample=per_sample,
        batch_size=options.batch,
        random=random,
        seed=options.seed,
        samples=samples.numbers.tolist(),
        modalities=modalities,
    )
    return extract_features(
        trained.model.to(device),
        options.network,
        modalities,
        batches,
        device=device,
        progress=lambda count: progress.advance(task, count),
    )


def progress_bar(console: Console | None) -> Progress:
    """A bar with counts and the time left."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console or Console(quiet=True), disable=console is None)


def notes_on(results: dict[str, ModalityResult], train: Samples, classes: list[str]) -> list[str]:
    """What a reader of the numbers should know."""
    counts = np.bincount(train.labels, minlength=len(classes))
    single = [name for name, count in zip(classes, counts, strict=True) if count == 1]
    notes = [f"classes with one training sample, so with none to choose C on: {', '.join(single)}"] if single else []
    for modality, result in results.items():
        stuck = [f"{row.c:g}" for row in result.sweep if not row.converged]
        if stuck:
            notes.append(f"{modality}: the solver stopped after {MAX_ITERATIONS} iterations at C = {', '.join(stuck)}")
    return notes


def installed_versions() -> dict[str, str]:
    """Versions of what computed the numbers."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


def write_report(report: SvmReport, path: Path) -> None:
    """Write the report as JSON, replacing ``path`` in one step."""
    write_aside(path, json.dumps(asdict(report) | {"top1": report.top1}, indent=2).encode())


# ------------------------------------------------------------------------------------------------------------ command line


def parse_c(text: str) -> tuple[float, ...]:
    """``1e-3,1e-2`` as numbers.

    Raises:
        UserError: if it is no list of numbers.
    """
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"--svm-c {shlex.quote(text)} must be numbers separated by commas, such as 1e-3,1e-2,1e-1,1") from None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``xkd-fast evaluate svm``."""
    add, default = parser.add_argument, SvmOptions(Path("checkpoint"), Path("data"))
    add("--checkpoint", type=Path, required=True, metavar="PATH", help="a checkpoint, its model.safetensors, or a run's folder")
    add("--data", type=shard_place, required=True, metavar="SHARDS",
        help="labelled shards to train the SVM on: a folder, or an http(s):// address of one")  # fmt: skip
    add("--test-data", type=shard_place, metavar="SHARDS", help="shards to test on (default: a part of --data)")
    add("--network", choices=get_args(Role), default=default.network, help=f"whose encoder (default: {default.network})")
    add("--modalities", default=",".join(MODALITIES), metavar="LIST", help="of video, audio, both (default: all three)")
    add(
        "--train-clips",
        type=int,
        default=default.train_clips,
        metavar="N",
        help="random clips per training sample (default: 25)",
    )
    add("--test-clips", type=int, default=default.test_clips, metavar="N", help="uniform clips per test sample (default: 3)")
    add("--svm-c", metavar="LIST", help="values of C to choose from (default: 1e-3,1e-2,1e-1,1; audio and both from 1e-5)")
    add("--test-fraction", type=float, default=default.test_fraction, metavar="X",
        help="share of --data's samples tested on, without --test-data (default: 0.25)")  # fmt: skip
    add("--validation-fraction", type=float, default=default.validation_fraction, metavar="X",
        help="share of the training samples on which C is chosen (default: 0.2)")  # fmt: skip
    add("--seed", type=int, default=default.seed, metavar="N", help="of splits and random clips (default: 0)")
    add("--untrained", action="store_true", help="evaluate the same model at initialisation, the baseline")
    add("--batch", type=int, default=default.batch, metavar="N", help="clips encoded at a time (default: 16)")
    add("--device", choices=DEVICES, default=default.device, help="auto, cpu or cuda (default: auto)")
    add("--output", type=Path, metavar="DIR", help="write svm.json there (default: the table is printed, nothing is written)")


def run(args: argparse.Namespace) -> int:
    """``xkd-fast evaluate svm``: evaluate, print the table, write the JSON; returns the exit code."""
    given = {name: getattr(args, name) for name in SvmOptions.__dataclass_fields__}
    given["modalities"] = tuple(dict.fromkeys(name.strip() for name in args.modalities.split(",")))
    given["svm_c"] = None if args.svm_c is None else parse_c(args.svm_c)
    report = evaluate_svm(SvmOptions(**given), console=Console(stderr=True))
    console = Console()
    console.print(report.table())
    for note in report.notes:
        console.print(f"note: {note}")
    if args.output is not None:
        console.print(f"written: {args.output / 'svm.json'}")
    return 0
