"""Metrics: the culprit of a NaN is named, entropies are right, logs survive an interruption."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from tests.tiny import random_batch, tiny_options
from xkd_fast.config import load_config
from xkd_fast.data.pipeline import DamagedSample
from xkd_fast.engine import metrics
from xkd_fast.engine.launch import free_port
from xkd_fast.engine.reporter import NonFiniteLoss, Reporter
from xkd_fast.engine.schedule import Schedule
from xkd_fast.reference import XKD


@pytest.fixture
def single_rank():
    """A process group of one."""
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{free_port()}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_non_finite_loss_is_named_with_its_first_step(single_rank: None) -> None:
    """Red if a NaN passes unseen, is blamed on the sum, or on the step where it was noticed."""
    options = tiny_options()
    model = XKD(options)
    norm = torch.ones(())
    collected = metrics.StepMetrics(SimpleNamespace(module=model, optimizer=SimpleNamespace(gradient_norm=lambda: norm)))
    for step in (1, 2, 3):
        views, masks = random_batch(options, 2, seed=step, dtype=torch.float32)
        if step == 2:
            views.audio_global[0, 0, 0, 0] = norm = torch.tensor(float("nan"))
        collected.add(model(views, masks), step)
        collected.add_gradients(step)
        collected.end_step()
        if step == 1:
            assert collected.first_non_finite() is None
    bad = collected.first_non_finite()
    assert bad is not None
    names, step = bad
    assert step == 2 and "audio_reconstruction" in names
    assert not {"total", "gradient_norm", "video_reconstruction"} & set(names)


def test_gradients_that_are_not_finite_stop_training_before_a_checkpoint(single_rank: None, tmp_path: Path) -> None:
    """Red if weights that a NaN or infinite gradient has spoiled are saved, since the loss they came from was finite."""
    config = load_config("demo", [f"output={tmp_path}", "log.progress=false", "log.tensorboard=false", "log.every_steps=4"])
    norms = iter([1.0, float("inf"), 1.0])
    optimizer = SimpleNamespace(gradient_norm=lambda: torch.tensor(next(norms)))
    engine = SimpleNamespace(module=XKD(tiny_options()), device=torch.device("cpu"), optimizer=optimizer)
    schedule = Schedule(config, steps_per_epoch=5)
    with Reporter(config, engine, 0, schedule) as reporter:  # type: ignore[arg-type]
        for step in (1, 2, 3):
            views, masks = random_batch(tiny_options(), 2, dtype=torch.float32)
            reporter.add(engine.module(views, masks), step)
            assert not reporter.end_step(step, schedule.at(step - 1), list, is_last=False)
            if step == 1:
                reporter.check_finite()
        with pytest.raises(NonFiniteLoss, match=r"^gradient_norm became NaN or infinite at step 2\b.* no checkpoint was"):
            reporter.check_finite()
        (tmp_path / "checkpoints" / "step-00000001").mkdir(parents=True)
        with pytest.raises(NonFiniteLoss, match=r"step-00000001 is of a step before.* lower optimizer\.lr$"):
            reporter.check_finite()


def test_damaged_samples_are_listed_and_counted_once(single_rank: None, tmp_path: Path) -> None:
    """Red if what was replaced goes unlisted, or is counted again at every row."""
    config = load_config("demo", [f"output={tmp_path}", "log.progress=false", "log.tensorboard=false"])
    optimizer = SimpleNamespace(gradient_norm=lambda: torch.ones(()))
    engine = SimpleNamespace(module=XKD(tiny_options()), device=torch.device("cpu"), optimizer=optimizer)
    new = [DamagedSample(3, "key", "shard-000000.tar, sample key: CRC", 1, 7)]
    schedule = Schedule(config, steps_per_epoch=5)
    with Reporter(config, engine, 0, schedule) as reporter:  # type: ignore[arg-type]
        for step in (1, 2):
            views, masks = random_batch(tiny_options(), 2, dtype=torch.float32)
            reporter.add(engine.module(views, masks), step)
            assert reporter.end_step(step, schedule.at(step - 1), lambda: [new.pop()] if new else [], is_last=True)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["damaged_samples"] for row in rows] == [1, 1]
    (listed,) = (json.loads(line) for line in (tmp_path / "damaged-00000.jsonl").read_text().splitlines())
    assert (listed["key"], listed["reason"]) == ("key", "shard-000000.tar, sample key: CRC")


def test_entropy_of_known_distributions() -> None:
    """Red if the temperature is dropped or the sign is wrong."""
    assert metrics.entropy(torch.zeros(3, 50), 0.1).item() == pytest.approx(math.log(50))
    two = torch.tensor([[0.0, 0.2]])
    p = 1 / (1 + math.exp(-0.2 / 0.1))
    assert metrics.entropy(two, 0.1).item() == pytest.approx(-p * math.log(p) - (1 - p) * math.log(1 - p), rel=1e-5)


def test_resumed_log_drops_later_and_torn_rows(tmp_path: Path) -> None:
    """Red if a resumed run's log holds a step twice."""
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": step}) + "\n" for step in (2, 4, 6)) + '{"step": 8, "tot')
    metrics.keep_rows(path, 4)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [2, 4]
    metrics.keep_rows(tmp_path / "absent.jsonl", 4)


def test_speedometer_counts_clips_and_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Red if waiting is not a share of the same interval, or an interval leaks into the next."""
    clock = iter([0.0, 10.0, 10.0, 12.0, 12.0])
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: next(clock))
    speed = metrics.Speedometer(32)
    speed.step()
    speed.step()
    speed.waited(2.5)
    assert speed.read() == {"clips_per_second": 6.4, "data_wait_share": 0.25}
    speed.step()
    assert speed.read() == {"clips_per_second": 16.0, "data_wait_share": 0.0}
