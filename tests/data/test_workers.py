"""Worker processes: what hangs, crashes or raises costs itself alone, and nothing is left running."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from xkd_fast.data.workers import PAUSE, Outcome, run_tasks
from xkd_fast.errors import UserError

# A module of its own, so that a worker imports nothing else.
TASKS = """
import os, signal, sys, time

def work(task):
    kind, value = task
    if kind == "raise":
        raise ValueError(f"no {value}")
    if kind == "exit":
        sys.exit(value)
    if kind == "signal":
        os.kill(os.getpid(), value)
    if kind == "sleep":
        time.sleep(value)
    if kind == "deaf":  # deaf to everything that can be ignored
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        time.sleep(value)
    if kind == "large":
        return bytes(value)
    if kind == "print":
        print(value, flush=True)
        os.write(1, value.encode())
        os.system(f"echo {value}")
    if kind == "lambda":
        return lambda: value
    if kind == "pid":
        return os.getpid()
    return value
"""


@pytest.fixture(autouse=True)
def tasks_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "worker_tasks.py").write_text(TASKS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "modules"))
    return "worker_tasks:work"


def by_index(outcomes: Iterator[Outcome]) -> dict[int, Outcome]:
    found = {}
    for outcome in outcomes:
        assert outcome.index not in found, "a second outcome of one task"
        found[outcome.index] = outcome
    return dict(sorted(found.items()))


def eventually(condition: Callable[[], bool], seconds: float = 10.0) -> bool:
    limit = time.monotonic() + seconds
    while not (held := condition()) and time.monotonic() < limit:
        time.sleep(0.02)
    return held


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_a_bad_task_costs_only_itself(tasks_module: str) -> None:
    """Would catch a crash or a hang that ends the run, loses a neighbour's result, or goes by another name."""
    tasks = [
        ("value", "a"),
        ("signal", signal.SIGSEGV),
        ("deaf", 1000),
        ("raise", "luck"),
        ("exit", 3),
        ("sleep", 1000),
        ("signal", signal.SIGKILL),
        ("lambda", 0),
        ("value", "b"),
    ]
    started = time.monotonic()
    found = by_index(run_tasks(tasks_module, tasks, workers=2, seconds=2.0))
    assert time.monotonic() - started < 30
    assert {index: outcome.failure for index, outcome in found.items()} == {
        0: None, 1: "crashed", 2: "timed_out", 3: "raised", 4: "crashed", 5: "timed_out", 6: "crashed", 7: "crashed", 8: None
    }  # fmt: skip
    assert (found[0].result, found[8].result) == ("a", "b")
    assert all(found[index].result is None for index in range(1, 8))
    assert "signal SIGSEGV" in found[1].detail and "worker_tasks.py" in found[1].detail
    assert found[2].detail == "not done after 2 s"
    assert found[3].detail == "ValueError: no luck (worker_tasks.py:7)"
    assert "exit code 3" in found[4].detail
    assert "SIGKILL" in found[6].detail
    assert "pickle" in found[7].detail


def test_many_tasks_on_few_workers(tasks_module: str) -> None:
    """Would catch lost or doubled tasks, mixed-up answers, and a process for every task or every exception."""
    tasks = [("pid", None), ("raise", 0)] + [("value", k) for k in range(200)] + [("pid", None)]
    found = by_index(run_tasks(tasks_module, tasks, workers=1, seconds=30))
    assert [outcome.result for outcome in found.values()][2:-1] == list(range(200))
    assert found[0].result == found[202].result != os.getpid()


def test_no_tasks(tasks_module: str) -> None:
    """Would catch waiting for ever on nothing."""
    assert list(run_tasks(tasks_module, [], workers=2, seconds=1.0)) == []


def test_large_answers_and_a_slow_caller(tasks_module: str) -> None:
    """Would catch an answer taken for late because the caller was busy while it lay in the pipe, and one cut off."""
    outcomes = run_tasks(tasks_module, [("large", 3_000_000)] * 4, workers=2, seconds=1.0)
    first = next(outcomes)
    time.sleep(2.5)
    found = [first, *outcomes]
    assert [outcome.failure for outcome in found] == [None] * 4
    assert {len(outcome.result) for outcome in found} == {3_000_000}


def test_what_a_task_prints_is_no_answer(tasks_module: str) -> None:
    """Would catch a library's chatter on standard output read as a result."""
    found = by_index(run_tasks(tasks_module, [("print", "chatter"), ("value", 5)], workers=1, seconds=30))
    assert [outcome.result for outcome in found.values()] == ["chatter", 5]


def test_the_start_of_a_worker_is_not_the_tasks_time(tasks_module: str, tmp_path: Path) -> None:
    """Would catch slow imports, from a network disk say, that make the first task of every worker time out."""
    module = tmp_path / "modules" / "slow_start.py"
    module.write_text("import time\ntime.sleep(1.5)\nfrom worker_tasks import work\n")
    started = time.monotonic()
    found = by_index(run_tasks("slow_start:work", [("value", 1), ("sleep", 1000), ("deaf", 1000)], workers=1, seconds=1.0))
    assert [outcome.failure for outcome in found.values()] == [None, "timed_out", "timed_out"]
    assert time.monotonic() - started < 60, "nor is the time that a start may take the task's"


def test_a_function_that_cannot_be_imported_is_told(tasks_module: str) -> None:
    """Would catch a run that hangs, or a crash without a cause."""
    (outcome,) = run_tasks("worker_tasks:play", [("value", 1)], workers=1, seconds=5.0)
    assert outcome.failure == "crashed" and "has no attribute 'play'" in outcome.detail


def test_modules_in_the_working_directory_are_not_imported(
    tasks_module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Would catch a user's own `pickle.py` beside the videos running in place of the library."""
    (tmp_path / "cwd").mkdir()
    (tmp_path / "cwd" / "selectors.py").write_text("raise RuntimeError('not this one')\n")
    monkeypatch.chdir(tmp_path / "cwd")
    assert [outcome.result for outcome in run_tasks(tasks_module, [("value", 1)], workers=1, seconds=30)] == [1]


def test_pause_bounds_how_far_work_runs_ahead(tasks_module: str) -> None:
    """Would catch a hundred thousand converted films held in memory behind one slow one, and a pause that never ends."""
    seen = 0
    ahead = []

    def tasks() -> Iterator[object]:
        for number in range(12):
            while number - seen >= 3:
                yield PAUSE
            ahead.append(number - seen)
            yield ("value", number)

    results = []
    for outcome in run_tasks(tasks_module, tasks(), workers=2, seconds=30):
        results.append(outcome.result)
        seen += 1
    assert sorted(results) == list(range(12))
    assert max(ahead) <= 2


def test_leaving_early_ends_the_workers(tasks_module: str) -> None:
    """Would catch processes that go on after an error or an interrupt in the caller."""
    outcomes = run_tasks(tasks_module, [("pid", None), ("sleep", 1000)], workers=1, seconds=2000)
    pid = next(outcomes).result
    assert is_running(pid)
    outcomes.close()
    assert eventually(lambda: not is_running(pid))


def test_workers_end_when_their_parent_is_killed(tasks_module: str, tmp_path: Path) -> None:
    """Would catch orphans that hang on a bad file for ever after the run was killed."""
    script = (
        "import sys; from xkd_fast.data.workers import run_tasks\n"
        "tasks = [('pid', None), ('pid', None), ('sleep', 1000), ('sleep', 1000)]\n"
        "for outcome in run_tasks('worker_tasks:work', tasks, workers=2, seconds=1.5): print(outcome.result, flush=True)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    workers = {int(parent.stdout.readline()) for _ in range(2)}
    parent.kill()
    parent.wait()
    parent.stdout.close()
    assert eventually(lambda: not any(map(is_running, workers)))


def test_workers_must_be_one_or_more(tasks_module: str) -> None:
    """Would catch a run without workers that waits for ever."""
    with pytest.raises(UserError, match="workers = 0 must be 1 or more"):
        list(run_tasks(tasks_module, [], workers=0, seconds=1.0))
