"""The main job on real shards with two DeepSpeed processes: it trains, survives SIGKILL, and goes on exactly."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import IO

import psutil
import pytest

from tests.distributed import REPOSITORY
from xkd_fast.engine.launch import free_port
from xkd_fast.weights import read_safetensors

STEPS = 18
SMALL = [
    "data.demo.render.clips_per_class=6",
    "data.demo.test_clips_per_class=1",
    "model.encoder={width: 24, depth: 1, heads: 2}",
    "model.decoder={width: 16, depth: 1, heads: 2}",
    "model.head={hidden: 16, bottleneck: 8, prototypes: 32}",
    "train.epochs=3",
    "train.global_batch=8",
    "train.micro_batch=2",
    "train.threads=1",
    "optimizer.lr=8e-3",
    "optimizer.warmup_epochs=1",
    "log.every_steps=1",
    "log.tensorboard=false",
    "checkpoint.every_steps=4",
    "checkpoint.keep=2",
]


def command(output: Path, data: Path, *more: str) -> list[str]:
    """``deepspeed xkd_fast/train.py`` on two processes, as a user types it."""
    launcher = [str(Path(sys.executable).with_name("deepspeed")), "--num_accelerators", "2", "--master_port", str(free_port())]
    places = [f"output={output}", f"data.demo.videos={data}/videos", f"data.demo.shards={data}/shards"]
    return [*launcher, "xkd_fast/train.py", *SMALL, *places, *more]


def environment() -> dict[str, str]:
    """The environment's own bin folder first, as after activating it: DeepSpeed looks for ninja there."""
    return dict(os.environ, PATH=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", OMP_NUM_THREADS="1")


def run(arguments: list[str], code: int = 0) -> str:
    """Run to the end; returns what was printed."""
    done = subprocess.run(arguments, cwd=REPOSITORY, env=environment(), capture_output=True, text=True, timeout=900)
    output = done.stdout + done.stderr
    assert done.returncode == code, output[-5000:]
    if "--master_port" in arguments:
        assert not shared_buffers(arguments[arguments.index("--master_port") + 1])
    return output


def shared_buffers(port: str) -> list[Path]:
    """Shared memory that a run's ranks left behind."""
    return list(Path("/dev/shm").glob(f"deepspeed_*_{port}_*"))


def rows(output: Path) -> list[dict[str, float]]:
    """Metrics of a run; a torn last line is left out."""
    path = output / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def start(arguments: list[str], log: IO[str]) -> subprocess.Popen[bytes]:
    """Run in the background, heeding the signals that this process may ignore, as under ``nohup``."""

    def heed() -> None:
        for number in (signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)

    return subprocess.Popen(arguments, cwd=REPOSITORY, env=environment(), stdout=log, stderr=log, preexec_fn=heed)


@contextmanager
def training(arguments: list[str], output: Path, steps: int) -> Iterator[subprocess.Popen[bytes]]:
    """A run in the background that has logged ``steps``; what it prints is in ``OUTPUT.log``."""
    path = output.with_suffix(".log")
    with open(path, "w") as log:
        process = start(arguments, log)
        deadline = time.monotonic() + 600
        while len(rows(output)) < steps:
            assert process.poll() is None and time.monotonic() < deadline, path.read_text()[-4000:]
            time.sleep(0.02)
        try:
            yield process
        finally:
            if process.poll() is None:
                for member in [*psutil.Process(process.pid).children(recursive=True), process]:
                    member.kill()
                process.wait()


def start_and_kill(arguments: list[str], output: Path, steps: int) -> None:
    """Start a run and SIGKILL the launcher and every rank once ``steps`` are logged."""
    with training(arguments, output, steps) as launcher:
        for process in [launcher, *psutil.Process(launcher.pid).children(recursive=True)]:
            process.kill()
    assert not shared_buffers(arguments[arguments.index("--master_port") + 1])


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, str]:
    """A whole run; its data, rendered and prepared on first use, and what it printed."""
    folder = tmp_path_factory.mktemp("training")
    printed = run(command(folder / "whole", folder / "data"))
    return folder / "whole", folder / "data", printed


def test_whole_run_trains_and_logs(uninterrupted: tuple[Path, Path, str]) -> None:
    """Red if the job does not train, log every step, checkpoint, or keep only the newest checkpoints."""
    output, _, printed = uninterrupted
    logged = rows(output)
    assert [row["step"] for row in logged] == list(range(1, STEPS + 1))
    assert sum(row["reconstruction"] for row in logged[-4:]) < 0.95 * sum(row["reconstruction"] for row in logged[:4])
    assert logged[0]["learning_rate"] == 0 and max(row["learning_rate"] for row in logged) == pytest.approx(8e-3 * 8 / 32)
    assert sorted(path.name for path in (output / "checkpoints").glob("step-*")) == ["step-00000016", "step-00000018"]
    assert "2 × cpu" in printed and "clips/s" in printed and "data wait" in printed


def test_killed_run_resumes_exactly(uninterrupted: tuple[Path, Path, str]) -> None:
    """Red if anything a step depends on is not restored: weights, moments, teachers, centres, schedules, data position."""
    whole, data, _ = uninterrupted
    output = whole.parent / "killed"
    start_and_kill(command(output, data), output, steps=10)
    assert len(rows(output)) < STEPS
    printed = run(command(output, data, "--resume", "auto"))
    assert "resumed from" in printed
    expected, actual = rows(whole), rows(output)
    assert [row["step"] for row in actual] == list(range(1, STEPS + 1))
    timed = ("clips_per_second", "mfu", "data_", "host_memory_gib")
    names = [name for name in expected[0] if not name.startswith(timed)]
    for before, after in zip(expected, actual, strict=True):
        for name in names:
            assert after[name] == pytest.approx(before[name], rel=1e-5, abs=1e-7), f"step {before['step']}: {name}"


def test_a_run_that_is_done_has_nothing_to_do(uninterrupted: tuple[Path, Path, str]) -> None:
    """Red if resuming a finished run trains on."""
    output, data, _ = uninterrupted
    before = rows(output)
    run(command(output, data, "--resume", "auto"))
    assert rows(output) == before


def test_resuming_with_another_batch_is_one_clear_error(uninterrupted: tuple[Path, Path, str]) -> None:
    """Red if a run goes on in another order of clips, or dies with a traceback."""
    output, data, _ = uninterrupted
    single = [sys.executable, *command(output, data, "--resume", "auto", "train.global_batch=4")[5:]]
    printed = run(single, code=2)
    assert "train.global_batch = 8" in printed and "Traceback" not in printed


def test_a_fresh_run_in_a_used_folder_is_refused(uninterrupted: tuple[Path, Path, str]) -> None:
    """Red if a second run overwrites the first one's metrics, or prunes its own checkpoints beside the older, later ones."""
    output, data, _ = uninterrupted
    before = rows(output)
    printed = run([sys.executable, *command(output, data)[5:]], code=2)
    assert "--resume auto" in printed and "Traceback" not in printed
    assert rows(output) == before


def test_resuming_with_other_options_names_them(uninterrupted: tuple[Path, Path, str]) -> None:
    """Red if a run goes on with another learning rate unnoticed."""
    output, data, _ = uninterrupted
    more = ["--resume", "auto", "optimizer.lr=5.0", "log.every_steps=2"]
    printed = run(command(output, data, *more), code=2)
    errors = [line for line in printed.splitlines() if line.startswith("error:")]
    assert errors and all("optimizer.lr = 0.008 (now 5.0)" in line and "every_steps" not in line for line in errors)


ONE_RANK = ["train.stop_after_steps=2", "train.global_batch=4", "train.micro_batch=4", "checkpoint.every_steps=1"]


@pytest.fixture(scope="module")
def two_checkpoints(uninterrupted: tuple[Path, Path, str]) -> Path:
    """A run of one rank with a checkpoint after each of its two steps."""
    whole, data, _ = uninterrupted
    run([sys.executable, *command(whole.parent / "good", data, *ONE_RANK)[5:]])
    return whole.parent / "good"


@pytest.mark.parametrize(
    "name",
    [
        "random-00000.pt",
        "zero_pp_rank_0_mp_rank_00_optim_states.pt",
        pytest.param("model.safetensors", marks=pytest.mark.slow),
        pytest.param("state.json", marks=pytest.mark.slow),
    ],
)
def test_a_damaged_checkpoint_is_one_clear_error(
    uninterrupted: tuple[Path, Path, str], two_checkpoints: Path, name: str
) -> None:
    """Red if a torn file gives a traceback, is read as if it were whole, or nobody says that an older checkpoint is there."""
    output = two_checkpoints.with_name(f"damaged-{name}")
    shutil.copytree(two_checkpoints, output)
    (output / "checkpoints" / "step-00000002" / name).write_bytes(b"hello")
    resumed = [sys.executable, *command(output, uninterrupted[1], *ONE_RANK, "--resume")[5:]]
    printed = run([*resumed, "auto"], code=2)
    (error,) = {line for line in printed.splitlines() if line.startswith("error:")}
    assert f"{output}/checkpoints/step-00000002 is damaged or incomplete" in error, error
    assert error.endswith(f"resume from the one before, checkpoint.resume={output}/checkpoints/step-00000001")
    assert "Traceback" not in printed
    if name.startswith("zero"):
        run([*resumed, f"{output}/checkpoints/step-00000001"])


def test_a_rank_saves_its_share_alone(uninterrupted: tuple[Path, Path, str]) -> None:
    """Red if the optimiser's files hold the whole model's weights once per rank: hundreds of gigabytes on many GPUs."""
    checkpoint = uninterrupted[0] / "checkpoints" / "step-00000018"
    state = read_safetensors(checkpoint / "model.safetensors")
    trained = sum(tensor.numel() for name, tensor in state.items() if "_student." in name or "_decoder." in name)
    files = [path.stat().st_size for path in checkpoint.glob("zero_pp_rank_*")]
    assert len(files) == 2
    for size in files:
        assert 12 * trained / 2 < size < 1.05 * 12 * trained / 2 + 100_000  # weights and two moments in float32


def test_an_output_that_cannot_be_written_is_one_clear_error(uninterrupted: tuple[Path, Path, str]) -> None:
    """Red if it gives a traceback, or is found out after training."""
    whole, data, _ = uninterrupted
    (whole.parent / "file").write_text("")
    printed = run([sys.executable, *command(whole.parent / "file" / "run", data)[5:]], code=2)
    assert "cannot be written" in printed and "Traceback" not in printed


@pytest.mark.parametrize(
    ("stage", "precision"),
    [(0, "float32"), (1, "float16"), pytest.param(2, "bfloat16", marks=pytest.mark.slow), (3, "bfloat16")],
)
def test_plain_python_trains_and_resumes(uninterrupted: tuple[Path, Path, str], stage: int, precision: str) -> None:
    """Red if the job needs a launcher, autocast breaks it, a stage's checkpoint lacks something that the next step needs, or a
    step that is not taken moves the schedules on."""
    whole, data, _ = uninterrupted
    more = [f"train.precision={precision}", f"train.zero_stage={stage}"]
    straight, halved = (whole.parent / f"{name}-{stage}" for name in ("straight", "halved"))
    run([sys.executable, *command(straight, data, *more, "train.stop_after_steps=6")[5:]])
    run([sys.executable, *command(halved, data, *more, "train.stop_after_steps=3")[5:]])
    run([sys.executable, *command(halved, data, *more, "train.stop_after_steps=6", "--resume", "auto")[5:]])
    if precision == "float16":  # the first scale is too large: clips are spent on steps that are not taken
        last = rows(straight)[-1]
        assert last["skipped_steps"] > 0 and last["loss_scale"] == 65536 / 2 ** last["skipped_steps"]
    else:
        assert rows(straight)[2]["total"] == pytest.approx(rows(whole)[2]["total"], rel=0.05)
    extra = ("skipped_steps", "loss_scale") if precision == "float16" else ()
    for name in ("total", "gradient_norm", "video_teacher_entropy", *extra):
        assert [row[name] for row in rows(halved)] == pytest.approx([row[name] for row in rows(straight)], rel=1e-6), name
    for name in ("learning_rate", "video_ema_momentum", "audio_ema_momentum"):  # steps not taken do not move them on
        assert [row[name] for row in rows(straight)] == [row[name] for row in rows(whole)[:6]], name


def test_a_log_that_cannot_be_written_is_told_of_once(uninterrupted: tuple[Path, Path, str]) -> None:
    """Red if the other ranks show the traceback of a lost connection, or a missing package is found out after rendering."""
    whole, data, _ = uninterrupted
    output = whole.parent / "no-log"
    (output / "metrics.jsonl").mkdir(parents=True)
    printed = run(command(output, data), code=2)
    (error,) = (line for line in printed.splitlines() if line.startswith("error:"))
    assert f"{output}/metrics.jsonl cannot be written (Is a directory)" in error and "Traceback" not in printed
    if find_spec("wandb") is None:
        unused = whole.parent / "unrendered"
        printed = run(command(whole.parent / "no-wandb", unused, "log.wandb=true"), code=2)
        (error,) = (line for line in printed.splitlines() if line.startswith("error:"))
        assert "pip install wandb" in error and "Traceback" not in printed and not unused.exists()


def test_torchrun_takes_the_same_steps(uninterrupted: tuple[Path, Path, str]) -> None:
    """Red if ranks are only found under DeepSpeed's launcher, or the steps depend on which one it is."""
    whole, data, _ = uninterrupted
    output = whole.parent / "torchrun"
    launcher = [str(Path(sys.executable).with_name("torchrun")), "--nproc_per_node", "2", "--master_port", str(free_port())]
    run([*launcher, *command(output, data, "train.stop_after_steps=3")[5:]])
    expected, actual = rows(whole)[:3], rows(output)
    assert [row["total"] for row in actual] == pytest.approx([row["total"] for row in expected], rel=1e-6)
    assert len(list((output / "checkpoints").glob("step-*"))) == 1


def test_the_console_command_trains(uninterrupted: tuple[Path, Path, str]) -> None:
    """Red if ``xkd-fast train`` reads its arguments otherwise than ``train.py``, or needs a launcher."""
    whole, data, _ = uninterrupted
    output = whole.parent / "console"
    program = str(Path(sys.executable).with_name("xkd-fast"))
    printed = run([program, "train", *command(output, data, "train.stop_after_steps=2", "train.micro_batch=null")[6:]])
    assert "8 clips per step = 1 ranks × 8 × 1 accumulated" in printed
    assert [row["step"] for row in rows(output)] == [1, 2]
    for actual, expected in zip(rows(output), rows(whole)[:2], strict=True):  # the MMD alone compares a micro-batch's rows
        for name in ("reconstruction", "distillation"):
            assert actual[name] == pytest.approx(expected[name], rel=1e-4)


@pytest.mark.parametrize("cadence", ("log.every_steps=1", "checkpoint.every_steps=1"))
def test_a_run_that_diverges_stops_and_saves_nothing_spoiled(uninterrupted: tuple[Path, Path, str], cadence: str) -> None:
    """Red if training goes on with NaN, if a checkpoint of such weights is written, or nobody is told what became NaN."""
    whole, data, _ = uninterrupted
    output = whole.parent / f"diverged-{cadence.partition('.')[0]}"
    rarely = ["log.every_steps=1000", "checkpoint.every_steps=1000"]
    more = ["optimizer.lr=1e30", *(option for option in rarely if option.split("=")[0] != cadence.split("=")[0]), cadence]
    printed = run(command(output, data, *more), code=2)
    (error,) = (line for line in printed.splitlines() if line.startswith("error:"))
    assert "became NaN or infinite at step" in error and "lower optimizer.lr" in error and "Traceback" not in printed
    saved = sorted((output / "checkpoints").glob("step-*"))
    for checkpoint in saved:
        tensors = read_safetensors(checkpoint / "model.safetensors").values()
        assert all(tensor.isfinite().all() for tensor in tensors)
    if cadence.startswith("checkpoint"):
        assert f"{saved[-1]} is of a step before" in error
    else:
        assert "no checkpoint was written before" in error and not saved


def test_a_rank_that_cannot_write_is_told_of_once(uninterrupted: tuple[Path, Path, str]) -> None:
    """Red if the other ranks wait for ever, or tell of a lost connection in place of the reason."""
    whole, data, _ = uninterrupted
    output = whole.parent / "full-rank"
    size = (whole / "checkpoints" / "step-00000018" / "model.safetensors").stat().st_size // 1024 - 8
    largest = max(path.stat().st_size for path in (whole / "checkpoints" / "step-00000018").glob("zero_*")) // 1024
    assert largest < size  # so that the first rank alone, which writes the model, comes to the limit
    limited = " ".join(shlex.quote(argument) for argument in command(output, data))
    printed = run(["bash", "-c", f"ulimit -f {size}; exec {limited}"], code=2)
    (error,) = (line for line in printed.splitlines() if line.startswith("error:"))
    assert "step-00000004 cannot be written" in error and "no checkpoint was written before" in error
    assert "onnection" not in error and "Traceback" not in printed and not list((output / "checkpoints").iterdir())


def test_resuming_with_other_data_is_refused(uninterrupted: tuple[Path, Path, str]) -> None:
    """Red if a run goes on with as many clips of another data set, or is bound to the place of its own."""
    whole, data, _ = uninterrupted
    output = whole.parent / "moved"
    shutil.copytree(whole, output)
    other = whole.parent / "other"
    prepare = [sys.executable, "-m", "xkd_fast.cli", "prepare", f"{data}/videos/train", str(other)]
    run([*prepare, "--short-side", "32", "--seed", "1"])
    shutil.copytree(data / "shards" / "train", whole.parent / "same")
    more = ["--resume", "auto", f"data.train=[{whole.parent}/same]"]
    run(command(output, data, *more))
    printed = run(command(output, data, *more[:2], f"data.train=[{other}]"), code=2)
    assert "data.train (the checksum of the samples, in their order)" in printed and "Traceback" not in printed


@pytest.mark.parametrize("number", (signal.SIGTERM, signal.SIGINT))
def test_a_request_to_stop_leaves_a_checkpoint(uninterrupted: tuple[Path, Path, str], number: signal.Signals) -> None:
    """Red if a scheduler's warning or Ctrl-C costs the work since the last checkpoint."""
    whole, data, _ = uninterrupted
    output = whole.parent / number.name
    arguments = [sys.executable, *command(output, data, "checkpoint.every_steps=0", "train.epochs=50")[5:]]
    with training(arguments, output, steps=3) as process:
        process.send_signal(number)
        assert process.wait(timeout=300) == 0
    (checkpoint,) = (output / "checkpoints").glob("step-*")
    assert int(checkpoint.name.removeprefix("step-")) == rows(output)[-1]["step"] < 300
    assert "asked to stop" in output.with_suffix(".log").read_text()


def test_ending_the_demo_ends_its_training_too(uninterrupted: tuple[Path, Path, str]) -> None:
    """Red if ranks train on unattended, lose their work, or let a second run into their folder."""
    whole, data, _ = uninterrupted
    output = whole.parent / "demo"
    more = command(output, data, "checkpoint.every_steps=0", "train.epochs=50")[6:]
    with training([sys.executable, "-m", "xkd_fast.cli", "demo", *more], output, steps=3) as process:
        family = psutil.Process(process.pid).children(recursive=True)
        second = run([sys.executable, "xkd_fast/train.py", *more, "--resume", "auto"], code=2)
        assert f"output = {output}: another run is training there" in second and "Traceback" not in second
        process.terminate()
        assert process.wait(timeout=300) == 128 + signal.SIGTERM
    assert not psutil.wait_procs(family, timeout=30)[1]
    (checkpoint,) = (output / "checkpoints").glob("step-*")
    assert int(checkpoint.name.removeprefix("step-")) == rows(output)[-1]["step"] < 300
    printed = output.with_suffix(".log").read_text()
    assert f"goes on from {checkpoint}" in printed and "Traceback" not in printed


def words(process: psutil.Process) -> str:
    """The command of a process; nothing of one that has ended meanwhile."""
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


@pytest.mark.parametrize("number", (signal.SIGINT, signal.SIGHUP))
def test_ending_the_demo_before_a_rank_runs_ends_the_launcher(
    uninterrupted: tuple[Path, Path, str], number: signal.Signals
) -> None:
    """Red if a request that comes while the launcher still starts is lost, and training goes on to its end."""
    whole, data, _ = uninterrupted
    output = whole.parent / f"early-{number.name}"
    more = command(output, data, "train.epochs=5000")[6:]
    with open(whole.parent / "early.log", "w+") as log:
        demo = start([sys.executable, "-m", "xkd_fast.cli", "demo", *more], log)
        family: list[psutil.Process] = []
        while not any("deepspeed" in words(process) for process in family):
            assert demo.poll() is None
            time.sleep(0.05)
            family = psutil.Process(demo.pid).children()
        demo.send_signal(number)
        assert demo.wait(timeout=120) == 128 + number
        assert not psutil.wait_procs(family, timeout=30)[1]
        log.seek(0)
        printed = log.read()
    assert "stopping: " in printed and f"stopped by {number.name}; the same command again goes on" in printed


def test_a_launcher_that_is_killed_leaves_no_rank_training(uninterrupted: tuple[Path, Path, str]) -> None:
    """Red if ranks train on unattended once their launcher was killed, or lose what they did."""
    whole, data, _ = uninterrupted
    output = whole.parent / "orphans"
    with training(command(output, data, "checkpoint.every_steps=0", "train.epochs=50"), output, steps=3) as launcher:
        family = psutil.Process(launcher.pid).children(recursive=True)
        launcher.kill()
        assert not psutil.wait_procs(family, timeout=120)[1]
    (checkpoint,) = (output / "checkpoints").glob("step-*")
    assert int(checkpoint.name.removeprefix("step-")) == rows(output)[-1]["step"] < 300


def test_a_checkpoint_that_cannot_be_written_is_one_clear_error(uninterrupted: tuple[Path, Path, str]) -> None:
    """Red if a disk that fills up shows a traceback, or its half-written checkpoint keeps it full."""
    whole, data, _ = uninterrupted
    output = whole.parent / "full"
    limit = f"ulimit -f 20; exec {sys.executable} xkd_fast/train.py " + " ".join(
        shlex.quote(argument) for argument in command(output, data, "train.global_batch=4", "train.micro_batch=4")[6:]
    )
    printed = run(["bash", "-c", limit], code=2)
    assert "step-00000004 cannot be written" in printed and "no checkpoint was written before" in printed
    assert "Traceback" not in printed and not list((output / "checkpoints").iterdir())


def test_a_run_that_cannot_start_leaves_no_folder(uninterrupted: tuple[Path, Path, str]) -> None:
    """Red if a wrong option leaves a run's folder behind."""
    whole, data, _ = uninterrupted
    output = whole.parent / "unstarted"
    printed = run([sys.executable, *command(output, data, f"data.train=[{whole.parent}/nowhere]")[5:]], code=2)
    assert "nowhere" in printed and not output.exists()
