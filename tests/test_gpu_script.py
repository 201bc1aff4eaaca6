"""`benchmarks/gpu.sh` runs anywhere at tiny sizes, so that it does not fail first on the machine it is for."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import media, memory, race, record, table, test_feeding
from benchmarks.contestants import Contestant, Fast, FewLaunches, Released
from benchmarks.readme_data import feeding_paragraph
from benchmarks.test_step import model_options, named_batches
from xkd_fast.model.build import build_model

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
CPU = torch.device("cpu")
# all that `pip install xkd-fast` brings but torch and Triton; numpy is left, which Triton's interpreter needs in place of a GPU
ABSENT = ("av", "deepspeed", "hypothesis", "joblib", "matplotlib", "nvidia.dali", "pydantic", "rich", "safetensors", "sklearn")
ABSENT += ("tensorboard", "yaml")
ALSO_RUN_HERE = ("fast_model", "fp8", "graphs")  # model tests that the script begins with: imported, and left to the tests
UNUSED_BY_DATA = ("deepspeed", "joblib", "matplotlib", "psutil", "sklearn", "tensorboard")


def times() -> dict[Path, int]:
    """When each committed result was written."""
    return {path: path.stat().st_mtime_ns for path in RESULTS.iterdir()}


def without(folder: Path, packages: tuple[str, ...]) -> dict[str, str]:
    """An environment in which Python cannot import some packages."""
    folder.mkdir(exist_ok=True)
    (folder / "sitecustomize.py").write_text(f"import sys\nsys.modules.update(dict.fromkeys({packages!r}))\n")
    chosen = {"PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(folder)}
    return {**os.environ, **chosen, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}


def test_gpu_script_runs_to_its_end_without_a_gpu(tmp_path: Path) -> None:
    """Red if it needs more than torch, Triton and pytest, a test or benchmark fails, or the table is not of this run alone."""
    before = times()
    environment = without(tmp_path, ABSENT)
    environment["PYTEST_ADDOPTS"] = " ".join(f"--deselect tests/model/test_{name}.py" for name in ALSO_RUN_HERE)
    command = ["bash", "benchmarks/gpu.sh", "--smoke"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert done.stdout.count(" passed") == 5 and "peak memory" in done.stdout and "bias_gelu, small, backward: " in done.stdout
    rows = [line for line in done.stdout.splitlines() if " tiny, " in line and "× reference" in line and "× strong" in line]
    assert len(rows) == 6 and done.stdout.rstrip().endswith(rows[-1])
    assert times() == before


def test_gpu_script_with_a_gpu(tmp_path: Path) -> None:
    """Red if it then leaves out the kernels, measures at tiny sizes, sets no deadline, or hides a failure."""
    stub = tmp_path / "python"
    stub.write_text('#!/bin/bash\necho "$XKD_BENCHMARK_SECONDS|$XKD_BENCHMARK_TUNE|$*"\n[[ $* != *test_graphs* ]]\n')
    stub.chmod(0o755)
    environment = {name: value for name, value in os.environ.items() if name != "XKD_BENCHMARK_SECONDS"}
    built = {"XKD_NATIVE": str(tmp_path)}  # compiling takes seconds off the measurements
    command, environment = ["bash", "benchmarks/gpu.sh"], {**environment, **built, "PYTHON": str(stub)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    tests, *benches, engine, further, last = done.stdout.splitlines()[2:]
    assert done.returncode == 1, done.stderr
    assert "tests/kernels" in tests and "tests/model/test_attention.py" in tests and "--benchmark" not in tests
    assert "-m not further tests/" in tests and "-x -m further tests/kernels " in further and "--benchmark" not in further
    assert "-k on_gpu tests/engine/test_engine.py" in engine
    assert all(390 < int(bench.split("|")[0]) <= 410 and "--benchmark" in bench for bench in benches)
    step, kernels, rest = (bench.split("|")[2] for bench in benches)
    assert step.split("benchmarks/")[1:] == ["test_step.py -k xkd-bfloat16 --benchmark"]
    others = ["test_kernels.py ", "test_optimizer.py ", "test_attention.py ", "test_objectives.py --benchmark"]
    assert kernels.split("benchmarks/")[1:] == others
    assert rest.split("benchmarks/")[1:] == ["test_step.py -k not xkd-bfloat16 --benchmark"]
    assert "-m benchmarks.table 1" in last
    done = subprocess.run([*command, "--tune"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    tests, left_out, bench = done.stdout.splitlines()[2:]
    assert "left out" in left_out
    assert done.returncode == 0 and "tests/kernels" in tests and "test_graphs" not in tests
    assert "|1|" in bench and "benchmarks/test_kernels.py --benchmark" in bench
    done = subprocess.run([*command, "--ablate"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    tests, bench = done.stdout.splitlines()[2:]
    assert done.returncode == 0 and "tests/model/test_fast_model.py" in tests
    assert "benchmarks/test_ablation.py --benchmark" in bench
    done = subprocess.run([*command, "--data"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    tests, *benches = done.stdout.splitlines()[2:]
    assert done.returncode == 0 and "tests/data/test_gpu_data.py" in tests and " tests/kernels" not in tests
    assert [bench.split("benchmarks/")[1] for bench in benches] == [
        "test_feeding.py -k concurrency --benchmark",
        "test_data.py -k source_files --benchmark",
        "test_feeding.py -k not concurrency --benchmark",
    ]
    assert all(390 < int(bench.split("|")[0]) <= 410 for bench in benches)
    done = subprocess.run([*command, "--kernels"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    tests, bench = done.stdout.splitlines()[2:]
    assert done.returncode == 0 and "tests/model/test_fast_model.py" in tests and " tests/kernels" not in tests
    assert bench.split("benchmarks/")[1:] == others


def test_gpu_script_feeds_steps_without_a_gpu(tmp_path: Path) -> None:
    """Red if ``--data`` needs more than what decodes and prepares, fails first on the machine it is for, or measures others."""
    before, environment = times(), without(tmp_path, UNUSED_BY_DATA)
    command = ["bash", "benchmarks/gpu.sh", "--data"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert "demo, float32, 2 clips, mosaic by the cpu: " in done.stdout and " of synthetic" in done.stdout
    assert "bias_gelu" not in done.stdout and "DALI decodes H.264 on a GPU alone" in done.stdout
    assert times() == before


def test_gpu_script_names_what_data_lacks(tmp_path: Path) -> None:
    """Red if a missing package shows as errors of imports, if the wrong one is named, or if the rest begins without it."""
    environment = without(tmp_path, ("nvidia.dali", "hypothesis"))
    command = ["bash", "benchmarks/gpu.sh", "--data"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.count("\n") == 1 and ": hypothesis, NVIDIA DALI; pip install" in done.stderr


def test_steps_that_time_does_not_allow_are_listed(tmp_path: Path) -> None:
    """Red if feeding begins behind the deadline, or does not say what it left out."""
    environment = {**without(tmp_path, UNUSED_BY_DATA), "XKD_BENCHMARK_SECONDS": "0", "XKD_BENCHMARK_RESULTS": str(tmp_path)}
    command = [sys.executable, "-m", "pytest", "-qs", "-p", "no:cacheprovider", "-o", "addopts=", "benchmarks/test_feeding.py"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "demo, float32, 2 clips, mosaic by the cpu: left out, the time is up" in done.stdout
    assert not list(tmp_path.glob("*.json"))


def test_every_row_is_written_when_it_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Red if an interruption costs figures that were there, or a row that fails costs those after it, or is no failure."""
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    table, file = test_feeding.Table("feeding_x", ["a", "b", "c", "d"], {"about": 1}), tmp_path / "feeding_x.json"

    def refused() -> dict[str, Any]:
        raise RuntimeError("NVDEC refuses it")

    table.add("a", lambda: {"figure": 1}, str)
    written = json.loads(file.read_text())
    assert written["rows"] == [{"title": "a", "figure": 1}] and written["left_out"] == ["b", "c", "d"] and written["about"] == 1
    table.add("b", refused, str)
    table.add("c", lambda: {"figure": 3}, str)
    monkeypatch.setenv("XKD_BENCHMARK_SECONDS", "0")
    table.add("d", lambda: {"figure": 4}, str)
    written = json.loads(file.read_text())
    assert [row["title"] for row in written["rows"]] == ["a", "c"] and written["left_out"] == ["d"]
    assert written["failed"] == {"b": "RuntimeError: NVDEC refuses it"}
    with pytest.raises(RuntimeError, match="NVDEC refuses it"):
        table.close()
    assert "d: left out, the time is up" in capsys.readouterr().out


def test_time_that_runs_out_between_codecs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Red if feeding goes on behind the deadline, loses what it has, or a step's clips are fewer than its files' names."""

    def write_and_be_late(name: str, result: dict[str, Any], write: Callable[..., Path] = record.write) -> Path:
        monkeypatch.setenv("XKD_BENCHMARK_SECONDS", "0")
        return write(name, result)

    monkeypatch.setattr(record, "RESULTS", tmp_path)
    monkeypatch.setattr(record, "write", write_and_be_late)
    case, by = test_feeding.Case("demo", "float32", 4, 1, 2), [("mosaic", "cpu"), ("mjpeg", "cpu")]
    pile = test_feeding.Pile(tmp_path / "pile", replace(media.TINY, seconds=4.5), names=4, rendered=1)
    test_feeding.feed(test_feeding.Table("feeding_x", [case.title(*way) for way in by]), [case], by, pile)
    (row,) = (written := json.loads((tmp_path / "feeding_x.json").read_text()))["rows"]
    assert row["codec"] == "mosaic" and row["shards_against_synthetic"]["runs"] == 2
    assert written["left_out"] == [case.title("mjpeg", "cpu")]
    assert (
        not (tmp_path / "pile" / "mjpeg-64").exists() and len({path.stat().st_ino for path in pile.sources.rglob("*.mp4")}) == 1
    )


def test_benchmarks_need_no_numpy(tmp_path: Path) -> None:
    """Red if what a GPU's bare checkout runs imports it, or anything else that is not there."""
    environment = {**without(tmp_path, (*ABSENT, "numpy")), "XKD_BENCHMARK_SECONDS": "0"}
    environment["TRITON_INTERPRET"] = "0"  # as with a GPU: it is the interpreter that needs numpy
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-rs",
        "-p",
        "no:cacheprovider",
        "-o",
        "addopts=",
        "benchmarks/test_step.py",
    ]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "6 skipped" in done.stdout, done.stdout[-3000:]
    assert "mats float32 4 clips: not reached" in done.stdout


def test_gpu_script_refuses_what_it_does_not_know() -> None:
    """Red if a mistyped argument starts a measurement."""
    wrong = subprocess.run(["bash", "benchmarks/gpu.sh", "--fast"], cwd=ROOT, capture_output=True, timeout=120)
    assert wrong.returncode == 2 and b"unknown arguments --fast" in wrong.stderr


def test_gpu_script_tells_what_it_is_and_what_it_lacks(tmp_path: Path) -> None:
    """Red if ``--help`` is an error, or a torch that does not load passes for one that is not installed."""
    told = subprocess.run(["bash", "benchmarks/gpu.sh", "--help"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert told.returncode == 0 and "--ablate" in told.stdout and "XKD_BENCHMARK_SECONDS" in told.stdout
    assert not re.search(r"^#|set -euo", told.stdout, re.MULTILINE)
    stub = tmp_path / "python"
    stub.write_text('#!/bin/bash\necho "Traceback" >&2\necho "ImportError: libcudart.so.13: cannot open it" >&2\nexit 1\n')
    stub.chmod(0o755)
    environment = {**os.environ, "PYTHON": str(stub)}
    done = subprocess.run(["bash", "benchmarks/gpu.sh"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr == f"error: {stub} needs torch, Triton and pytest: ImportError: libcudart.so.13: cannot open it\n"


def test_gpu_script_begins_no_benchmark_behind_the_deadline(tmp_path: Path) -> None:
    """Red if one that nobody has time for is begun, cut off a second later, and passes for a failed one."""
    for name, text in {
        "python": 'echo "$*"; [[ $* != *"-s -rs"* ]] || sleep 30',
        "date": f"echo $(($(cat {tmp_path}/now) + 1)) >{tmp_path}/now; echo $((150 * $(cat {tmp_path}/now)))",  # of its own
    }.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "now").write_text("0")
    chosen = {"XKD_NATIVE": str(tmp_path), "PYTHON": "python", "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    environment = {**os.environ, **chosen, "XKD_BENCHMARK_SECONDS": "200"}
    done = subprocess.run(["bash", "benchmarks/gpu.sh"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "--benchmark" not in done.stdout, done.stdout
    assert "benchmarks/test_step.py -k xkd-bfloat16: not reached" in done.stdout
    assert "benchmarks/test_step.py -k not xkd-bfloat16: not reached" in done.stdout
    assert "the engine with NCCL: not reached" in done.stdout and "-m further" not in done.stdout


class Greedy(FewLaunches):
    """A contestant that does not fit; the error comes wrapped, as from a recording."""

    name = "greedy"

    def step(self, *_: object) -> torch.Tensor:
        try:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        except torch.OutOfMemoryError as error:
            raise RuntimeError("capture failed") from error


def case(kinds: dict[str, type[Contestant]]) -> tuple[race.Race, list[race.Row]]:
    """A tiny case with its final row."""
    contest = race.Race(model_options("mats", tiny=True), CPU, torch.float32, 2)
    return contest, list(contest.run(dict(kinds), rounds=2))


def test_too_little_memory_is_a_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Red if it ends the run, or costs the other contestants their figures."""
    contest, _ = case({"greedy": Greedy, "reference": Released})
    row = contest.row
    assert row["seconds"]["greedy"] == {"out_of_memory": True}
    assert row["fast_against"].keys() == {"reference"} and row["clips_per_second"].keys() == {"reference", "fast"}
    assert row["costs"].keys() == {"reference", "strong", "fast"}
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    assert table.lines() == ["no step was measured"]
    path = record.write("step_cpu_mats_float32", {"model": "mats tiny", "precision": "float32", "rows": [row]})
    (line,) = table.lines(since=path.stat().st_mtime)
    assert "× reference" in line and line.endswith("greedy out of memory")
    assert table.lines(since=path.stat().st_mtime + 1) == ["no step was measured"]
    monkeypatch.setattr(race, "Fast", Greedy)
    contest, rows = case({"reference": Released})
    assert contest.row["seconds"] == {"fast": {"out_of_memory": True}} and rows[-1]["costs"].keys() == {"reference", "strong"}


@pytest.mark.skipif(not memory.CLEAR.exists(), reason="this system does not tell")
def test_peak_memory_is_that_of_the_work_alone() -> None:
    """Red if what was freed before counts, or what was freed since does not (in a process whose heap has no holes yet)."""
    script = """
import torch
from benchmarks import memory
del (earlier := [torch.ones(2**26)])[:]
watched = memory.PeakMemory(torch.device("cpu"))
first = torch.ones(2**25)
del first
second = torch.ones(2**24)
print(watched.bytes())
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert int(done.stdout) == pytest.approx(2**27, abs=2**22), done.stderr


def test_contestants_begin_alike() -> None:
    """Red if one begins with weights drawn otherwise, shares them with another, or splits what MATS shares."""
    options = model_options("mats", tiny=True)
    drawn = build_model(options, seed=0)
    for model in (kind(options, CPU, torch.float32).model for kind in (Released, Fast)):
        tensors = dict((*drawn.named_parameters(), *drawn.named_buffers()))
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            expected = tensors.pop(name)
            assert torch.equal(tensor, expected) and tensor.requires_grad == expected.requires_grad, name
            tensor.detach().fill_(-1.0)
        assert not tensors
        assert model.video_teacher.encoder.blocks is model.audio_teacher.encoder.blocks


def test_another_error_is_told_and_costs_nobody_else_a_figure() -> None:
    """Red if a broken contestant passes for one that does not fit, hides, or takes the others' figures with it."""

    class Broken(Fast):
        def step(self, *_: object) -> torch.Tensor:
            raise RuntimeError("shapes do not match")

    contest, _ = case({"broken": Broken, "reference": Released})
    assert contest.row["seconds"]["broken"] == {"failed": "RuntimeError: shapes do not match"}
    assert contest.row["fast_against"].keys() == {"reference"} and contest.row["costs"].keys() == {
        "reference",
        "strong",
        "fast",
    }
    assert race.untimed(contest.row) == {"broken": "failed (RuntimeError: shapes do not match)"}
    (error,) = contest.errors
    with pytest.raises(RuntimeError, match="shapes do not match"):
        raise error


def test_a_loss_scale_settles_before_the_first_timed_step() -> None:
    """Red if steps that are left out for an overflow, which take less time, are timed."""

    class Scaled(Fast):
        steps = 0

        def step(self, *batch: object) -> torch.Tensor:
            self.steps += 1
            return super().step(*batch)

        def loss_scale(self) -> float:
            return 2.0 ** -min(self.steps, 5)

    entrants: list[Scaled] = []

    def make() -> Scaled:
        entrants.append(Scaled(model_options("xkd", tiny=True), CPU, torch.float32))
        return entrants[-1]

    contest = race.Race(model_options("xkd", tiny=True), CPU, torch.float32, 2)
    race.Entrant(make, CPU, contest._views, contest._masks)
    assert entrants[0].steps == 6


def test_batches_are_named() -> None:
    """Red if a batch size is measured that nobody asked for, or a mistyped one passes."""
    assert [clips for clips, _ in named_batches("2,4")] == [2, 4] and named_batches("4x15") == [(4, 15)]
    for wrong in ("", "two", "2,", "1", "2x0"):
        with pytest.raises(pytest.UsageError, match="XKD_BENCHMARK_CLIPS"):
            named_batches(wrong)


def test_nothing_begins_after_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Red if a pair is timed, or work counted, when the time is over."""
    monkeypatch.setenv("XKD_BENCHMARK_SECONDS", "0")
    contest, _ = case({"reference": Released})
    assert contest.row["seconds"] == {"reference": {"not_reached": True}} and not contest.row["costs"]


@pytest.mark.parametrize(("code", "returned", "told"), [(124, 0, True), (1, 1, False)])
def test_gpu_script_tells_what_was_not_reached(tmp_path: Path, code: int, returned: int, told: bool) -> None:
    """Red if the last tests, cut off by the deadline, are a failure or a secret, or if a failed one is neither."""
    stub = tmp_path / "python"
    stub.write_text(f'#!/bin/bash\n[[ $* != *"-m further"* ]] || exit {code}\n')
    stub.chmod(0o755)
    environment = {**os.environ, "XKD_NATIVE": str(tmp_path), "PYTHON": str(stub)}
    done = subprocess.run(["bash", "benchmarks/gpu.sh"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == returned
    assert ("kernels' tests: not all reached" in done.stdout) == told


def test_readme_lists_what_feeding_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Red if a reader takes a table that was cut off for all there is."""
    told = {"device": "a GPU", "rows": [], "left_out": ["vp9 by the gpu"], "failed": {"yuv by the cpu": "UserError: too few"}}
    (tmp_path / "feeding_cuda.json").write_text(json.dumps(told))
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    lines = feeding_paragraph().splitlines()
    assert "Not reached on a GPU: vp9 by the gpu." in lines and "Failed on a GPU: yuv by the cpu: UserError: too few." in lines
