"""The demo's data: rendered and prepared on first use, left alone ever after."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from xkd_fast.data.prepare import PrepareOptions, prepare
from xkd_fast.data.synthetic import render_dataset

if TYPE_CHECKING:
    from xkd_fast.config import Config

TEST_SEED_OFFSET = 1_000_003  # test clips come from another seed than training clips


def _show(progress: Progress, task: TaskID, done: int, total: int) -> None:
    if done < total:
        progress.start()  # not where all is there already
    progress.update(task, completed=done, total=total)


def ensure_rendered(config: Config, console: Console, *, workers: int) -> None:
    """Render the videos of ``config.data.demo`` and prepare their shards, as far as they are missing; nothing without one.

    Videos and shards that an earlier ``config.data.demo`` left there are replaced.

    The test split is of another seed: none of its clips is among the training clips.
    """
    demo = config.data.demo
    if demo is None:
        return
    splits = {
        "train": demo.render,
        "test": replace(demo.render, clips_per_class=demo.test_clips_per_class, seed=demo.render.seed + TEST_SEED_OFFSET),
    }
    for split, options in splits.items():
        videos, shards = Path(demo.videos) / split, Path(demo.shards) / split
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        progress = Progress(*columns, console=console)
        try:
            render_dataset(
                videos,
                options,
                workers=workers,
                replace=True,
                progress=partial(_show, progress, progress.add_task(f"rendering {split} videos")),
            )
        finally:
            progress.stop()
        prepare_options = PrepareOptions(
            codec="mjpeg", fps=config.data.fps, short_side=demo.short_side, sample_rate=config.data.sample_rate, workers=workers
        )
        prepare(videos, shards, prepare_options, replace=True, console=console)
