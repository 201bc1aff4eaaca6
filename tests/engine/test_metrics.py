"""Metrics: the culprit of a NaN is named, entropies are right, logs survive an interruption."""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.tiny import random_batch, tiny_options
from xkd_fast.config import load_config
from xkd_fast.data.pipeline import DamagedSample
from xkd_fast.engine import log, metrics
from xkd_fast.engine.checkpoint import TrainState
from xkd_fast.engine.ema import Teachers
from xkd_fast.engine.health import collapse, entropy, probabilities
from xkd_fast.engine.loss_scale import LossScale
from xkd_fast.engine.memory import MemoryRecord
from xkd_fast.engine.reporter import NonFiniteLoss, Reporter, StepCost
from xkd_fast.engine.schedule import Schedule
from xkd_fast.engine.stragglers import Stragglers
from xkd_fast.errors import UserError
from xkd_fast.reference import XKD

START = TrainState(step=0, seed=0, samples=100, data_crc32=9, global_batch=8, world_size=1, zero_stage=0)
COST = StepCost(flops_per_clip=2e9, peak=1e12)


def engine_of(model, gradient_norm):
    """What a report asks of an engine, around a model without an optimiser."""
    optimizer = SimpleNamespace(gradient_norm=gradient_norm, clipped_gradient_norm=gradient_norm, watches_overflow=False)
    pairs = [(model.student(modality), model.teacher(modality)) for modality in ("video", "audio")]
    more = {"teachers": Teachers(*pairs), "stragglers": None, "own_parameters": lambda: list(model.parameters())}
    return SimpleNamespace(module=model, device=torch.device("cpu"), optimizer=optimizer, **more)


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
        collected.add(model(views, masks))
        collected.end_step(step)
        collected.begin_step()
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
    engine = engine_of(XKD(tiny_options()), lambda: torch.tensor(next(norms)))
    schedule = Schedule(config, steps_per_epoch=5)
    with Reporter(config, engine, START, schedule, COST) as reporter:
        for step in (1, 2, 3):
            views, masks = random_batch(tiny_options(), 2, dtype=torch.float32)
            reporter.add(engine.module(views, masks))
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
    engine = engine_of(XKD(tiny_options()), lambda: torch.ones(()))
    new = [DamagedSample(3, "key", "shard-000000.tar, sample key: CRC", 1, 7)]
    schedule = Schedule(config, steps_per_epoch=5)
    with Reporter(config, engine, START, schedule, COST) as reporter:
        for step in (1, 2):
            views, masks = random_batch(tiny_options(), 2, dtype=torch.float32)
            reporter.add(engine.module(views, masks))
            assert reporter.end_step(step, schedule.at(step - 1), lambda: [new.pop()] if new else [], is_last=True)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["damaged_samples"] for row in rows] == [1, 1]
    (listed,) = (json.loads(line) for line in (tmp_path / "damaged-00000.jsonl").read_text().splitlines())
    assert (listed["key"], listed["reason"]) == ("key", "shard-000000.tar, sample key: CRC")


def test_entropy_of_known_distributions() -> None:
    """Red if the temperature is dropped or the sign is wrong."""
    assert entropy(probabilities(torch.zeros(3, 50), 0.1)).tolist() == pytest.approx([math.log(50)] * 3)
    p = 1 / (1 + math.exp(-0.2 / 0.1))
    found = entropy(probabilities(torch.tensor([[0.0, 0.2]]), 0.1)).item()
    assert found == pytest.approx(-p * math.log(p) - (1 - p) * math.log(1 - p), rel=1e-5)
    assert entropy(torch.tensor([1.0, 0.0])).item() == 0.0


def test_a_row_tells_what_the_model_does(single_rank: None, tmp_path: Path) -> None:
    """Red if a mean leaves out a micro-batch, entropies are of other logits, distances or utilisation of wrong numbers."""
    config = load_config("demo", [f"output={tmp_path}", "log.progress=false", "log.tensorboard=false"])
    torch.manual_seed(0)
    model = XKD(tiny_options())
    for name in ("video", "audio"):
        model.get_buffer(f"{name}_centre").normal_()
    with torch.no_grad():
        for parameter in model.video_teacher.parameters():
            parameter.mul_(1.5)
    engine = engine_of(model, lambda: torch.tensor(3.0))
    schedule, losses = Schedule(config, steps_per_epoch=5), []
    with Reporter(config, engine, START, schedule, COST) as reporter:
        for seed in (1, 2):
            losses.append(model(*random_batch(tiny_options(), 3, seed=seed, dtype=torch.float32)))
            reporter.add(losses[-1])
        reporter.end_step(1, schedule.at(0), list, is_last=True)
    (row,) = (json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines())
    for term in ("total", "student_alignment"):
        assert row[term] == pytest.approx(sum(getattr(each, term).item() for each in losses) / 2, rel=1e-6)
    outputs, temperature = losses[-1].outputs, model.get_buffer("audio_teacher_temperature")
    taught = ((outputs.teacher_logits["audio"] - model.audio_centre) / temperature).softmax(dim=1).double()
    assert row["audio_teacher_entropy"] == pytest.approx(-(taught * taught.log()).sum(dim=1).mean().item(), rel=1e-4)
    mean = taught.mean(dim=0)
    assert row["audio_teacher_mean_entropy"] == pytest.approx(-(mean * mean.log()).sum().item(), rel=1e-4)
    assert row["audio_teacher_mean_entropy"] > row["audio_teacher_entropy"]
    said = (outputs.student_logits["video"] / 0.1).softmax(dim=1).double()
    assert row["video_student_entropy"] == pytest.approx(-(said * said.log()).sum(dim=1).mean().item(), rel=1e-4)
    assert row["video_teacher_distance"] == pytest.approx(0.5, rel=1e-5) and row["audio_teacher_distance"] == 0.0
    assert row["video_centre_norm"] == pytest.approx(model.video_centre.norm().item(), rel=1e-6)
    assert row["mfu"] == pytest.approx(row["clips_per_second"] * 2e9 / 1e12)
    assert row["gradient_norm"] == row["clipped_gradient_norm"] == 3.0


def test_collapsed_teachers_are_warned_of_once(single_rank: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Red if hours go by on teachers that say nothing, if a healthy one is warned of, or a warning comes with every row."""
    healthy = {f"{m}_{kind}": 3.0 for m in ("video", "audio") for kind in ("teacher_entropy", "teacher_mean_entropy")}
    assert collapse(healthy, 256, 32) is None
    uniform, alike = healthy | {"audio_teacher_entropy": 5.5}, healthy | {"video_teacher_mean_entropy": 0.1}
    assert "the audio teacher predicts all 256 prototypes alike (entropy 5.50 of ln 256 = 5.55)" in str(
        collapse(uniform, 256, 32)
    )
    assert "the video teacher predicts the same prototype for every clip" in str(collapse(alike, 256, 32))
    assert collapse(alike, 256, 1) is None, "a single clip always has one prediction"
    config = load_config("demo", [f"output={tmp_path}", "log.tensorboard=false", "log.jsonl=false", "model.head.prototypes=40"])
    model = XKD(tiny_options())
    model.set_teacher_temperatures(1e4, 1e4)
    engine, schedule = engine_of(model, lambda: torch.tensor(3.0)), Schedule(config, steps_per_epoch=5)
    with Reporter(config, engine, START, schedule, COST) as reporter:
        for step in (1, 2):
            reporter.add(model(*random_batch(tiny_options(), 3, dtype=torch.float32)))
            reporter.end_step(step, schedule.at(0), list, is_last=True)
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning:")]
    assert len(warnings) == 1 and "the video teacher predicts all 40 prototypes alike" in warnings[0]


def test_skipped_steps_leave_no_trace_but_their_count(single_rank: None, tmp_path: Path) -> None:
    """Red if an overflow stops training as a NaN would, or enters the next step's means."""
    config = load_config("demo", [f"output={tmp_path}", "log.progress=false", "log.tensorboard=false"])
    model = XKD(tiny_options())
    engine, schedule = engine_of(model, lambda: torch.tensor(3.0)), Schedule(config, steps_per_epoch=5)
    engine.optimizer.watches_overflow, engine.loss_scale = True, SimpleNamespace(value=512.0)
    with Reporter(config, engine, START, schedule, COST) as reporter:
        views, masks = random_batch(tiny_options(), 2, dtype=torch.float32)
        broken = model(views, masks)
        broken.total = torch.tensor(float("inf"))
        reporter.add(broken)
        reporter.skip_step()
        losses = model(views, masks)
        reporter.add(losses)
        reporter.end_step(1, schedule.at(0), list, is_last=True)
    (row,) = (json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert (row["loss_scale"], row["skipped_steps"]) == (512.0, 1)
    assert row["total"] == pytest.approx(losses.total.item(), rel=1e-6)


def test_loss_scale_halves_at_an_overflow_and_doubles_after_long_peace() -> None:
    """Red if it grows at once, never, or shrinks for ever without a word."""
    scale = LossScale.for_precision("float16")
    assert (scale.value, LossScale.for_precision("bfloat16").value) == (65536.0, 1.0)
    scale.update(overflowed=True)
    for _ in range(1999):
        scale.update(overflowed=False)
    assert scale.value == 32768.0
    scale.update(overflowed=False)
    assert (scale.value, scale.good_steps) == (65536.0, 0)
    with pytest.raises(UserError, match=r"gradients stay infinite .* lower optimizer\.lr"):
        for _ in range(40):
            scale.update(overflowed=True)


def test_stragglers_name_the_slowest_rank(single_rank: None) -> None:
    """Red if times leak into the next reading or nothing is measured."""
    stragglers = Stragglers(torch.device("cpu"))
    for _ in range(2):
        with stragglers:
            time.sleep(0.02)
    read = stragglers.read()
    assert 0.02 <= read["forward_seconds"] <= 0.2 and read["slowest_rank"] == 0
    assert read["slowest_forward_seconds"] == read["forward_seconds"]
    assert stragglers.read()["forward_seconds"] == 0.0


def test_a_memory_record_needs_a_gpu(single_rank: None, tmp_path: Path) -> None:
    """Red if an option that can do nothing is accepted in silence."""
    with pytest.raises(UserError, match=r"log\.memory_snapshot = 5 records a GPU's memory, but this run has none"):
        MemoryRecord(tmp_path, 5, torch.device("cpu"))
    with MemoryRecord(tmp_path, None, torch.device("cpu")) as record:
        record.after(5)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the allocator's record was asked to do, without a GPU."""
    met: list[str] = []
    memory = torch.cuda.memory
    monkeypatch.setattr(memory, "_record_memory_history", lambda enabled="all", **_: met.append("on" if enabled else "off"))
    monkeypatch.setattr(memory, "_dump_snapshot", lambda path: met.append(Path(path).name))
    return met


def test_a_memory_record_is_written_once(single_rank: None, tmp_path: Path, recorded: list[str]) -> None:
    """Red if running out of memory later replaces the snapshot by one without history, or before it writes none."""
    with pytest.raises(torch.OutOfMemoryError), MemoryRecord(tmp_path, 2, torch.device("cuda")) as record:
        record.expect(1, 3)
        for step in (1, 2, 3):
            record.after(step)
        raise torch.OutOfMemoryError
    assert recorded == ["on", "memory-00000.pickle", "off"]
    recorded.clear()
    with pytest.raises(torch.OutOfMemoryError), MemoryRecord(tmp_path, 2, torch.device("cuda")):
        raise torch.OutOfMemoryError
    assert recorded == ["on", "memory-00000.pickle", "off"]


@pytest.mark.parametrize(("first", "last"), [(6, 9), (1, 4)])
def test_a_memory_record_of_a_step_that_never_comes_is_refused(
    first: int, last: int, single_rank: None, tmp_path: Path, recorded: list[str]
) -> None:
    """Red if a resumed or a shorter run records to its end and writes nothing."""
    with MemoryRecord(tmp_path, 5, torch.device("cuda")) as record, pytest.raises(UserError) as error:
        record.expect(first, last)
    assert f"memory_snapshot = 5 is none of the steps that this run takes, {first} to {last}" in str(error.value)
    with MemoryRecord(tmp_path, None, torch.device("cuda")) as record:
        record.expect(first, last)


def test_the_norm_stays_where_it_is(single_rank: None) -> None:
    """Red if offloaded gradients' norm goes to the GPU at every step: the host would wait for the copy."""
    losses = SimpleNamespace(terms=lambda: {"total": torch.ones((), device="meta")})
    engine = SimpleNamespace(optimizer=SimpleNamespace(gradient_norm=lambda: torch.tensor(math.nan)))
    collected = metrics.StepMetrics(engine)
    moved: list[str] = []

    class Copies(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            if "copy" in function.overloadpacket.__name__ and torch.device((kwargs or {}).get("device", "cpu")).type != "cpu":
                moved.append(str(function))
            return function(*args, **(kwargs or {}))

    with Copies():
        for step in (1, 2):
            collected.add(losses)
            collected.end_step(step)
            collected.begin_step()
    assert not moved


def test_tensorboard_holds_what_was_logged(tmp_path: Path) -> None:
    """Red if TensorBoard's file cannot be read back, or its values stand at other steps."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = load_config("demo", ["log.jsonl=false"])
    written = log.MetricLog()
    written.open(tmp_path, config, resumed_at=0)
    for step in (10, 20):
        written.write({"step": step, "total": step / 8, "mfu": 0.5})
    written.close()
    read = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in read.Scalars("total")] == [(10, 1.25), (20, 2.5)]
    assert sorted(read.Tags()["scalars"]) == ["mfu", "total"]


def test_a_resumed_run_goes_on_in_the_same_run_of_weights_and_biases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Red if every resumption starts a new curve, or a new run goes on in an old one's."""
    asked: list[str | None] = []

    def init(**options: object) -> SimpleNamespace:
        asked.append(options["id"])  # type: ignore[arg-type]
        return SimpleNamespace(id=options["id"] or f"made-{len(asked)}", log=lambda *_, **__: None, finish=lambda: None)

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    config = load_config("demo", ["log.jsonl=false", "log.tensorboard=false", "log.wandb=true"])
    for resumed_at in (0, 5, 9, 0, 3):
        written = log.MetricLog()
        written.open(tmp_path, config, resumed_at=resumed_at)
        written.close()
    assert asked == [None, "made-1", "made-1", None, "made-4"]


def test_resumed_log_drops_later_and_torn_rows(tmp_path: Path) -> None:
    """Red if a resumed run's log holds a step twice."""
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": step}) + "\n" for step in (2, 4, 6)) + '{"step": 8, "tot')
    log.keep_rows(path, 4)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [2, 4]
    log.keep_rows(tmp_path / "absent.jsonl", 4)


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
