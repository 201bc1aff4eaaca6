"""The demo: render videos, prepare shards, pretrain with DeepSpeed, evaluate, and show what pretraining was worth."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rich.console import Console
from rich.table import Table

from xkd_fast.config import Config, load_config
from xkd_fast.errors import UserError
from xkd_fast.files import write_aside

if TYPE_CHECKING:
    from xkd_fast.analysis.report import Section
    from xkd_fast.evaluate.svm import SvmReport

MODALITIES = ("video", "audio", "both")
SHOWN_CLIPS = 8
TRAIN_CLIPS = 1  # random clips per training sample
NETWORK: Literal["student"] = "student"  # in a run this short the teachers are still far behind
SVM_C = (1e-2, 1e-1, 1.0, 10.0, 100.0)


METHOD = (
    f"Linear SVMs on frozen features of the {NETWORK}s, trained on {TRAIN_CLIPS} random clip per training video with C of "
    f"{', '.join(f'{c:g}' for c in SVM_C)}, tested on unseen videos."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``xkd-fast demo``."""
    parser.add_argument("--config", default="demo", help="configuration with a data.demo section (default: demo)")
    parser.add_argument("--processes", type=int, default=2, help="training processes on this machine (default: 2)")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="options that differ from the file")


def run(args: argparse.Namespace) -> int:
    """Run the demo from start to report; a second call goes on where the first one stopped."""
    config = load_config(args.config, args.overrides)
    if config.data.demo is None:
        raise UserError(f"--config {args.config} has no data.demo section, so there is nothing to render; use the shipped demo")
    if config.data.train:
        raise UserError(
            f"data.train = {list(config.data.train)}: the demo trains and evaluates on what it renders; leave it out"
        )
    if args.processes < 1:
        raise UserError(f"--processes {args.processes} must be 1 or more")
    config.train.accumulation(args.processes)
    from xkd_fast.analysis.provenance import provenance
    from xkd_fast.data.dali import require_dali
    from xkd_fast.data.rendered import ensure_rendered
    from xkd_fast.engine.checkpoint import Checkpoints

    require_dali()
    console, start, origin = Console(), time.perf_counter(), provenance()
    is_continued = Path(config.output).exists()
    begun: dict[str, float] = {}

    def stage(title: str) -> None:
        begun[title] = time.perf_counter() - start
        console.rule(f"{title}  [dim]{begun[title]:.0f} s", align="left")

    stage("1  Render videos and prepare shards")
    ensure_rendered(config, console, workers=os.cpu_count() or 1)
    stage(f"2  Pretrain {config.model.variant.upper()} on {args.processes} processes")
    stopped = pretrain(args.config, args.overrides, args.processes)
    if stopped is not None:
        saved = Checkpoints.from_config(config).found()
        place = f"from {saved[-1]}" if saved else "with the training's first step"
        print(f"stopped by {signal.Signals(stopped).name}; the same command again goes on {place}", file=sys.stderr)
        return 128 + stopped
    stage("3  Evaluate frozen features with linear SVMs")
    reports = evaluate(config, console)
    stage("4  Report")
    page = Path(config.output) / "report.html"
    write_demo_report(page, config, reports)
    console.print(results_table(reports))
    console.print(f"Pictures and curves: {page}   Finished in {time.perf_counter() - start:.0f} s")
    summary = {
        **origin,
        "processes": args.processes,
        "threads_per_process": config.train.threads or max(1, (os.cpu_count() or 1) // args.processes),
        "is_continued": is_continued,  # then the seconds are those of the last call alone
        "began_at_seconds": begun,
        "seconds": time.perf_counter() - start,
        "evaluation": {"network": NETWORK, "train_clips": TRAIN_CLIPS, "svm_c": SVM_C},
        "config": config.as_dict(),
    }
    write_aside(Path(config.output) / "demo.json", (json.dumps(summary, indent=2) + "\n").encode())
    return 0


def pretrain(config: str, overrides: list[str], processes: int) -> int | None:
    """Train under the ``deepspeed`` launcher, resuming where an earlier run stopped.

    Returns:
        The signal that stopped it early; None if it ended by itself.

    Raises:
        UserError: if training fails; its own message stands above.
    """
    import torch

    from xkd_fast.engine.launcher import launcher_command, run_launcher

    goes_on = [] if any(override.startswith("checkpoint.resume=") for override in overrides) else ["--resume", "auto"]
    arguments = ["--config", config, *goes_on, *overrides]
    command = launcher_command(processes, Path(__file__).with_name("train.py"), arguments)
    environment = dict(os.environ, PATH=f"{Path(command[0]).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    if not torch.cuda.is_available():
        environment["DS_ACCELERATOR"] = "cpu"
    code, stopped = run_launcher(command, environment)
    if code and stopped is None:
        raise UserError(f"training ended with exit code {code}; its message stands above. The command was: {' '.join(command)}")
    return stopped


def finished_checkpoint(config: Config) -> Path:
    """The checkpoint at the end of the run.

    Raises:
        UserError: if the run was stopped before its end.
    """
    from xkd_fast.engine.checkpoint import Checkpoints, read_state

    checkpoint = Checkpoints.from_config(config).found()[-1]
    state = read_state(checkpoint)
    steps = config.train.epochs * state.steps_per_epoch
    last = min(steps, config.train.stop_after_steps or steps)
    if state.step < last:
        raise UserError(f"training was stopped after {state.step} of {last} steps; the same command again goes on from there")
    return checkpoint


def evaluate(config: Config, console: Console) -> dict[str, SvmReport]:
    """SVM reports of the pretrained model and of the same model at initialisation."""
    from xkd_fast.evaluate.svm import SvmOptions, evaluate_svm

    assert config.data.demo is not None
    shards = Path(config.data.demo.shards)
    checkpoint = finished_checkpoint(config)
    reports = {}
    for name, untrained in (("pretrained", False), ("untrained", True)):
        console.print(f"{name} model")
        options = SvmOptions(
            checkpoint=checkpoint,
            data=shards / "train",
            test_data=shards / "test",
            untrained=untrained,
            network=NETWORK,
            train_clips=TRAIN_CLIPS,
            svm_c=SVM_C,
            output=Path(config.output) / "svm" / name,
        )
        reports[name] = evaluate_svm(options, console=console)
    return reports


def results_rows(reports: dict[str, SvmReport]) -> list[list[str]]:
    """Top-1 in per cent: modality, pretrained, untrained, chance."""
    chance = f"{100 * reports['pretrained'].chance:.1f}"
    columns = [{m: f"{100 * reports[name].top1[m]:.1f}" for m in MODALITIES} for name in ("pretrained", "untrained")]
    return [[m, *(column[m] for column in columns), chance] for m in MODALITIES]


def results_table(reports: dict[str, SvmReport]) -> Table:
    """The demo's result as a table for the terminal."""
    table = Table(title="Linear SVM on frozen features, top-1 % on unseen clips")
    for heading in ("features", "pretrained", "untrained", "chance"):
        table.add_column(heading, justify="left" if heading == "features" else "right")
    for row in results_rows(reports):
        table.add_row(*row)
    return table


def write_demo_report(page: Path, config: Config, reports: dict[str, SvmReport]) -> None:
    """``report.html`` of the demo: results, curves and pictures."""
    from xkd_fast.analysis.report import Section, curve_section, read_metrics, summary_section, table, write_report

    rows = read_metrics(Path(config.output) / "metrics.jsonl")
    text = f"{METHOD} The untrained model is the same one at initialisation."
    results = Section(
        "Top-1 accuracy, %", text, table(("features", "pretrained", "untrained", "chance"), results_rows(reports))
    )
    sections = [results, summary_section(config, rows), curve_section(config, rows), pictures(config)]
    write_report(page, "xkd_fast demo", sections)


def pictures(config: Config) -> Section:
    """Some unseen clips of different classes, masked and restored by the pretrained model."""
    import torch

    from xkd_fast.analysis.report import reconstruction_section
    from xkd_fast.data.plain_clips import clips
    from xkd_fast.data.shards import ShardSet
    from xkd_fast.evaluate.features import load_model

    assert config.data.demo is not None
    shards = ShardSet.open(Path(config.data.demo.shards) / "test")
    first_of_class = [int((shards.labels == label).argmax()) for label in range(len(shards.classes))][:SHOWN_CLIPS]
    options = (shards, config.model, config.mel, config.data)
    batch = next(clips(*options, per_sample=1, batch_size=len(first_of_class), samples=first_of_class))
    model = load_model(finished_checkpoint(config)).model.eval()
    torch.manual_seed(0)
    titles = [shards.classes[shards.labels[sample]] for sample in batch.samples]
    return reconstruction_section(config, model, batch.views, model.draw_masks(batch.views), titles)
