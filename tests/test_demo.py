"""What the demo refuses and leaves alone, and that it compares what it says. The whole of it runs as `make demo`."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from tests.evaluate.tiny_run import tiny_config, trained_model, write_checkpoint
from xkd_fast.config import DemoData, TrainOptions, load_config
from xkd_fast.data.prepare import PrepareOptions, prepare
from xkd_fast.data.synthetic import SyntheticOptions, render_dataset
from xkd_fast.demo import NETWORK, SVM_C, TRAIN_CLIPS, evaluate, finished_checkpoint, results_rows, results_table
from xkd_fast.engine.checkpoint import TrainState
from xkd_fast.errors import UserError
from xkd_fast.evaluate.svm import CResult, ModalityResult, SvmReport
from xkd_fast.train import make_ready


def stopped_at(output: Path, step: int) -> None:
    """A checkpoint of the demo's run after ``step`` steps: its state alone."""
    folder = output / "checkpoints" / f"step-{step:08d}"
    folder.mkdir(parents=True, exist_ok=True)
    state = TrainState(step=step, seed=0, samples=100, data_crc32=0, global_batch=32, world_size=2, zero_stage=1)
    (folder / "state.json").write_text(json.dumps(asdict(state)))


def test_a_half_trained_model_is_not_evaluated(tmp_path: Path) -> None:
    """Red if a run that a SIGTERM stopped early passes for the demo's result."""
    config = load_config("demo", [f"output={tmp_path}", "train.epochs=4"])  # 4 epochs of 3 steps
    stopped_at(tmp_path, 11)
    with pytest.raises(UserError, match=r"stopped after 11 of 12 steps; the same command again"):
        finished_checkpoint(config)
    stopped_at(tmp_path, 12)
    assert finished_checkpoint(config).name == "step-00000012"
    short = load_config("demo", [f"output={tmp_path}", "train.epochs=40", "train.stop_after_steps=12"])
    assert finished_checkpoint(short).name == "step-00000012"


def test_nothing_is_rendered_for_a_run_on_data_of_ones_own(tmp_path: Path) -> None:
    """Red if a run that names its shards still spends minutes on the demo's."""
    places = [f"data.demo.videos={tmp_path}/videos", f"data.demo.shards={tmp_path}/shards"]
    config = load_config("demo", [*places, f"output={tmp_path}/run", "data.train=[somewhere]"])
    make_ready(config, config.model)
    assert not list(tmp_path.iterdir())


def report(chance: float, **top1: float) -> SvmReport:
    """A report of these accuracies by modality; all that is beside them is one more."""
    results = {
        modality: ModalityResult(0.1, accuracy, 0.99, 0.98, [CResult(0.1, 0.97, 0.96, True)], [[1]])
        for modality, accuracy in top1.items()
    }
    return SvmReport(chance, [], results, {"train": 8, "test": 4}, {}, {}, {}, 1.0)


REPORTS = {
    "untrained": report(0.5, both=0.31, audio=0.21, video=0.11),
    "pretrained": report(0.125, audio=0.6249, both=0.83, video=0.72),
}
ROWS = [
    ["video", "72.0", "11.0", "12.5"],
    ["audio", "62.5", "21.0", "12.5"],
    ["both", "83.0", "31.0", "12.5"],
]


def test_rows_hold_the_right_model_and_modality() -> None:
    """Red if the models or modalities are swapped, shares pass for per cent, or the best on the test set for the chosen."""
    assert results_rows(REPORTS) == ROWS


def test_table_heads_each_column_with_what_it_holds() -> None:
    """Red if a heading stands above another column's numbers."""
    shown = StringIO()
    Console(file=shown, width=80).print(results_table(REPORTS))
    table = [line.split() for line in shown.getvalue().replace("│", " ").replace("┃", " ").splitlines()]
    headings = ["features", "pretrained", "untrained", "chance"]
    assert [line for line in table if line and line[0] in ("features", "video", "audio", "both")] == [headings, *ROWS]


def shards_of(folder: Path, clips_per_class: int, seed: int) -> None:
    """Shards of a few rendered clips of two classes."""
    videos = folder.with_name(f"{folder.name}_videos")
    options = SyntheticOptions(clips_per_class, ("bounce", "flash"), (1.0, 1.2), 8, 32, 32, seed=seed)
    render_dataset(videos, options)
    prepare(videos, folder, PrepareOptions(fps=8, short_side=24, workers=1), console=Console(quiet=True))


def test_the_pretrained_and_the_untrained_model_are_told_apart(tmp_path: Path) -> None:
    """Red if the models or the two folders of shards are swapped, or something else is evaluated than the page says."""
    shards_of(tmp_path / "train", 4, seed=0)
    shards_of(tmp_path / "test", 2, seed=1)
    config = replace(
        tiny_config(),
        output=str(tmp_path / "run"),
        data=replace(tiny_config().data, demo=DemoData(shards=str(tmp_path))),
        train=TrainOptions(stop_after_steps=12),
    )
    write_checkpoint(tmp_path / "run" / "checkpoints" / "step-00000012", config, trained_model(config), step=12)
    stopped_at(tmp_path / "run", 12)

    reports = evaluate(config, Console(quiet=True))

    assert {name: (found.model["step"], found.settings["untrained"]) for name, found in reports.items()} == {
        "pretrained": (12, False),
        "untrained": (0, True),
    }
    for name, found in reports.items():
        assert found.samples == {"train": 8, "test": 4}
        assert list(found.results) == ["video", "audio", "both"]
        assert tuple(row.c for row in found.results["both"].sweep) == SVM_C
        assert (found.settings["network"], found.settings["train_clips"]) == (NETWORK, TRAIN_CLIPS)
        written = json.loads((tmp_path / "run" / "svm" / name / "svm.json").read_text())
        assert (written["model"], written["top1"]) == (found.model, found.top1)
