"""What evaluations by linear SVMs share: from a checkpoint and shards to the features of each modality, and the choice of C."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from xkd_fast.data.plain_clips import clips
from xkd_fast.data.storage import shown
from xkd_fast.errors import UserError
from xkd_fast.evaluate.features import ClipFeatures, TrainedModel, extract_features, load_model
from xkd_fast.evaluate.options import SvmOptions
from xkd_fast.evaluate.samples import Rows, Samples, check_clips, present_modalities
from xkd_fast.files import write_aside

MAX_ITERATIONS = 5000  # of a solver
PACKAGES = ("xkd-fast", "torch", "numpy", "scikit-learn", "nvidia-dali-cuda130", "nvidia-dali-cuda120")


class _HasC(Protocol):
    @property
    def c(self) -> float: ...


Result = TypeVar("Result", bound=_HasC)
Prediction = TypeVar("Prediction")


@dataclass(frozen=True)
class Report(Generic[Result]):
    """What an evaluation by linear SVMs came to, as its file holds it."""

    chance: float  # what features that tell nothing come to, 0-1
    classes: list[str]
    results: dict[str, Result]  # by modality
    samples: dict[str, int]  # training and test samples
    settings: dict[str, Any]
    model: dict[str, Any]  # file, step, seed, options
    versions: dict[str, str]
    seconds: float
    notes: list[str] = field(default_factory=list)

    def rows(self, title: str, measures: Sequence[str], values: Callable[[Result], Sequence[float | None]]) -> Table:
        """A table for a terminal, in per cent: features, C, then ``measures``, whose ``values`` a result has, and chance."""
        network = f"{self.settings['network']}, " + (
            "untrained" if self.settings["untrained"] else f"step {self.model['step']}"
        )
        table = Table(title=f"{title} on frozen features ({network}), {self.samples['test']} test samples, %")
        for heading in ("features", "C", *measures, "chance"):
            table.add_column(heading, justify="left" if heading == "features" else "right")
        for modality, result in self.results.items():
            cells = ["–" if value is None else f"{100 * value:.1f}" for value in (*values(result), self.chance)]
            table.add_row(modality, f"{result.c:g}", *cells)
        return table


@dataclass(frozen=True)
class Measured(Generic[Result]):
    """What an evaluation came to, and what its report says of how."""

    results: dict[str, Result]  # by modality
    classes: list[str]
    train: Samples
    test: Samples
    left_out: list[str]  # sentences on modalities that not every sample has
    about: dict[str, Any]  # samples, settings, model, versions, seconds: fields of a report


def measure(
    options: SvmOptions,
    divide: Callable[[SvmOptions], tuple[Samples, Samples, list[str]]],
    evaluate: Callable[[Rows, Rows, int, SvmOptions, str], Result],
    report: str,
    console: Console | None,
) -> Measured[Result]:
    """Extract features, and evaluate those of each modality.

    Args:
        options: what is evaluated.
        divide: opens training samples, test samples and classes.
        evaluate: (training rows, test rows, number of classes, options, modality) → result.
        report: name of the file that will be written into ``options.output``.
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
                f"--output {options.output} cannot be made a folder ({error.strerror}); name another one for {report}"
            ) from error
    trained = load_model(options.checkpoint, untrained=options.untrained)
    train, test, classes = divide(options)
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
            results[modality] = evaluate(*rows, len(classes), options, modality)
            progress.advance(task)
    config = trained.config
    places = {"data": shown(options.data), "test_data": None if options.test_data is None else shown(options.test_data)}
    about = {
        "samples": {"train": len(train.numbers), "test": len(test.numbers)},
        "settings": json.loads(json.dumps(asdict(options), default=str)) | places,
        "model": {"file": str(trained.file), "step": trained.step, "seed": config.seed, "options": config.as_dict()["model"]},
        "versions": installed_versions(),
        "seconds": round(time.perf_counter() - start, 1),
    }
    return Measured(results, classes, train, test, left_out, about)


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


class Trial(NamedTuple):
    """What one C is worth, by the protocol's own measure."""

    c: float
    validation: float | None  # of SVMs trained without the validation samples; None if C had no rival
    test: float  # of SVMs trained on all training samples
    converged: bool


def sweep_c(
    c_values: tuple[float, ...],
    train: Rows,
    kept: Rows,
    held_out: Rows,
    test: Rows,
    fit: Callable[[Rows, float], tuple[Callable[[Rows], Prediction], bool]],
    worth: Callable[[Prediction], float],
) -> tuple[list[Trial], Trial, dict[float, Prediction]]:
    """Try every C; returns the trials, the one that validation chooses (the smallest C of equals), and test predictions by C.

    Args:
        c_values: ascending; with one alone nothing is held out.
        train: all training clips.
        kept: those of them that C is chosen by training on,
        held_out: and by measuring.
        test: clips of the test samples, which have no say in the choice.
        fit: (rows, C) → what predicts of rows, and whether the solvers converged.
        worth: of predictions; more is better.
    """
    trials, predictions = [], {}
    for c in c_values:
        validation = worth(fit(kept, c)[0](held_out)) if len(c_values) > 1 else None
        predict, converged = fit(train, c)
        predictions[c] = predict(test)
        trials.append(Trial(c, validation, worth(predictions[c]), converged))
    return trials, max(trials, key=lambda trial: trial.validation or 0.0), predictions


def notes_on_solvers(trials: dict[str, list[tuple[float, bool]]]) -> list[str]:
    """Sentences on solvers that did not converge, by modality and C."""
    notes = []
    for modality, tried in trials.items():
        stuck = [f"{c:g}" for c, converged in tried if not converged]
        if stuck:
            notes.append(f"{modality}: the solver stopped after {MAX_ITERATIONS} iterations at C = {', '.join(stuck)}")
    return notes


def progress_bar(console: Console | None) -> Progress:
    """A bar with counts and the time left."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console or Console(quiet=True), disable=console is None)


def installed_versions() -> dict[str, str]:
    """Versions of what computed the numbers."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


def write_report(report: dict[str, Any], path: Path) -> None:
    """Write a report as JSON, replacing ``path`` in one step."""
    write_aside(path, json.dumps(report, indent=2).encode())


def tell(report: Any, written: Path | None) -> None:
    """Print a report's table and notes, and where it was written."""
    console = Console()
    console.print(report.table())
    for note in report.notes:
        console.print(f"note: {note}")
    if written is not None:
        console.print(f"written: {written}")
