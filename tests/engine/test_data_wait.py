"""Waiting for data: whichever stage of real batches is slowed, it is the one that is named, once, with what to do."""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.data.clip_shards import make, write_shards
from tests.data.http_server import Server, serving
from tests.engine.test_metrics import COST, START, engine_of
from tests.tiny import random_batch, tiny_options
from xkd_fast.config import load_config
from xkd_fast.data.http_folder import RemoteOptions
from xkd_fast.data.pipeline import ViewPipeline
from xkd_fast.data.shards import ShardSet
from xkd_fast.data.stage_times import STAGES, StageTimes
from xkd_fast.engine.data_wait import ADVICE, DataWait
from xkd_fast.engine.reporter import Reporter
from xkd_fast.engine.schedule import Schedule
from xkd_fast.reference import XKD
from xkd_fast.train import timed

SLOW = 0.15  # seconds that the slowed stage takes longer per batch
BATCH = 4  # clips


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    root = tmp_path_factory.mktemp("served")
    write_shards(root / "set")
    with serving(root) as running:
        yield running


def slowed(function: Callable[..., Any]) -> Callable[..., Any]:
    def slow(*arguments: Any, **named: Any) -> Any:
        time.sleep(SLOW)
        return function(*arguments, **named)

    return slow


def train(pipeline: ViewPipeline, tmp_path: Path, steps: int, step_seconds: float = 0.0) -> list[dict[str, float]]:
    """Steps of a tiny model at the pace of a real pipeline; returns the logged rows."""
    rows: list[dict[str, float]] = []
    options = [f"output={tmp_path}", "log.tensorboard=false", "log.jsonl=false", "log.every_steps=2", "train.global_batch=4"]
    config = load_config("demo", options)
    engine, schedule = engine_of(XKD(tiny_options()), lambda: torch.ones(())), Schedule(config, steps_per_epoch=3)
    losses = engine.module(*random_batch(tiny_options(), 2, dtype=torch.float32))
    with Reporter(config, engine, START, schedule, COST) as reporter:
        reporter._log.write = rows.append  # type: ignore[method-assign]
        reporter.watch(pipeline.times)
        for step, _ in enumerate(itertools.islice(timed(pipeline.batches(), reporter), steps), start=1):
            time.sleep(step_seconds)
            reporter.add(losses)
            reporter.end_step(step, schedule.at(0), list, is_last=False)
    return rows


@pytest.mark.parametrize("stage", STAGES)
def test_the_slow_stage_is_named_once(
    stage: str,
    server: Server,
    single_rank: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Red if another stage is blamed, its speed is wrong, the warning comes with every record or not at all."""
    shards = ShardSet.open(f"{server.url}/set", remote=RemoteOptions(5.0, 2))
    monkeypatch.setattr(server, "delay", 4 * SLOW if stage == "read" else 0.0)  # several at a time
    with make(shards, threads=4, prefetch=1) as pipeline:
        if stage == "decode":
            pipeline._maker.decoder = slowed(pipeline._maker.decoder)  # type: ignore[assignment]
        elif stage == "augment":
            monkeypatch.setattr(pipeline._maker, "views", slowed(pipeline._maker.views))
        elif stage == "copy":
            monkeypatch.setattr(pipeline._maker, "moved", slowed(pipeline._maker.moved))
        rows = train(pipeline, tmp_path, 8)
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: the step waited")]
    (warning,) = (line for line in warnings if f"the slow stage is {stage}, " in line)  # a busy machine may add another's
    found = re.search(r"for (\d+) % .*, at ([0-9.]+) clips/s where the step could take [0-9.]+: (.*)", warning)
    assert found is not None and int(found[1]) > 10 and found[3] == ADVICE[stage]  # type: ignore[index]
    assert float(found[2]) <= 2 * BATCH / SLOW  # an interval of two batches may hold the clips of one more than time of
    assert rows[-1][f"data_{stage}_ms"] >= 1000 * SLOW / BATCH / 2


def test_data_that_keeps_up_is_not_warned_of(
    server: Server, single_rank: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Red if the wait for the very first batch, or a stage that takes time while the step is busy, is an alarm."""
    with make(ShardSet.open(f"{server.url}/set", remote=RemoteOptions(5.0, 2)), prefetch=2) as pipeline:
        rows = train(pipeline, tmp_path, 6, step_seconds=0.5)
    assert "waited for its data" not in capsys.readouterr().out
    assert rows[-1]["data_wait_share"] < 0.1 and rows[-1]["data_decode_ms"] > 0


def test_the_threshold_and_off(single_rank: None) -> None:
    """Red if the alarm cannot be turned off or down, a second slow stage is passed over, or the interval's times leak into the
    next one."""
    times, off = StageTimes(), torch.device("cpu")
    quiet, half = DataWait(times, None, off), DataWait(times, 0.5, off)

    def interval(stage: str) -> None:
        with times.of(stage):  # type: ignore[arg-type]
            time.sleep(0.01)
        times.made(8)

    for _ in range(3):
        interval("read")
        assert quiet.read(0.9, 100.0)[1] is None
    said = []
    for stage, share in (("read", 0.9), ("read", 0.4), ("read", 0.6), ("read", 0.9), ("decode", 0.9), ("decode", 0.9)):
        interval(stage)
        metrics, warning = half.read(share, 100.0)
        assert metrics[f"data_{stage}_ms"] > 1 and sum(metrics.values()) == metrics[f"data_{stage}_ms"]
        said.append(warning and re.search(r"slow stage is (\w+)", warning)[1])  # type: ignore[index]
    assert said == [None, None, "read", None, "decode", None], "the first interval says nothing"
