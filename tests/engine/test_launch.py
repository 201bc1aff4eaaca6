"""Starting and stopping: threads, turns, SIGTERM."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
import torch.distributed as dist

from xkd_fast.engine.launch import (
    StopSignal,
    first_rank_first,
    launchers_above,
    local_world_size,
    require_build_tools,
    set_threads,
    start_deepspeed,
    tell_of_other_build,
)
from xkd_fast.errors import UserError


def test_sigterm_is_agreed_on_not_acted_on(single_rank: None) -> None:
    """Red if SIGTERM kills a run in mid-step, or is forgotten."""
    previous = signal.getsignal(signal.SIGTERM)
    try:
        stop = StopSignal(launchers_above())
        stop.agree(torch.device("cpu"))
        assert not stop.agreed
        os.kill(os.getpid(), signal.SIGTERM)
        assert not stop.agreed
        stop.agree(torch.device("cpu"))
        assert stop.agreed
    finally:
        signal.signal(signal.SIGTERM, previous)


def test_the_end_of_a_launcher_is_a_request_to_stop(single_rank: None) -> None:
    """Red if ranks train on unattended once their launcher is gone, or stop while it runs."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as launcher:
        before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            stop = StopSignal([psutil.Process(launcher.pid)])
            stop.agree(torch.device("cpu"))
            assert not stop.agreed
            launcher.kill()
            launcher.wait()
            stop.agree(torch.device("cpu"))
            assert stop.agreed
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def test_error_of_the_first_rank_reaches_all(single_rank: None) -> None:
    """Red if the other ranks would wait for ever for a first rank that has failed."""

    def fail() -> None:
        raise UserError("no videos")

    with pytest.raises(UserError, match="no videos"):
        first_rank_first(fail)


def test_processes_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Red if every rank takes all cores."""
    before = torch.get_num_threads()
    try:
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(8), raising=False)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
        set_threads(0)
        assert torch.get_num_threads() == 2
        set_threads(3)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_local_world_size_of_each_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """Red if a launcher's variable is not known (torchrun: LOCAL_WORLD_SIZE, deepspeed: LOCAL_SIZE)."""
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert local_world_size() == 1
    for size, name in ((16, "WORLD_SIZE"), (4, "LOCAL_SIZE"), (2, "LOCAL_WORLD_SIZE")):
        monkeypatch.setenv(name, str(size))
        assert local_world_size() == size


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_asking_for_a_gpu_that_is_not_there_is_refused() -> None:
    """Red if train.device=cuda silently trains on the CPU."""
    with pytest.raises(UserError, match=r"train\.device"):
        start_deepspeed("cuda")


def test_missing_build_tools_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Red if a machine without a compiler gets ninja's log, or an environment that is not activated a traceback."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match=r"no-such-compiler is not found; install g\+\+"):
        require_build_tools()  # ninja is found beside this Python
    monkeypatch.setattr("sys.executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="ninja is not found; install it: pip install ninja"):
        require_build_tools()


def test_a_build_of_another_process_is_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Red if a run waits without a word, for ever where a build was stopped in between."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    tell_of_other_build()
    lock = tmp_path / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir()
    lock.touch()
    tell_of_other_build()
    assert capsys.readouterr().err == ""  # one that only loads it holds it for a moment
    for age in (60, 3600):
        then = lock.stat().st_mtime - age
        os.utime(lock, (then, then))
        if age == 60:
            tell_of_other_build()
            assert f"{lock} exists; waiting for it" in capsys.readouterr().err
            continue
        with pytest.raises(UserError, match=rf"{lock} exists; no build takes that long.*remove that file"):
            tell_of_other_build()


def test_a_rank_takes_its_own_gpu_before_it_talks_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Red if the first collective, or the model, goes to the first GPU on every rank: no run on several GPUs would start."""
    import deepspeed
    from deepspeed import accelerator

    met: list[object] = []
    gpus = SimpleNamespace(device_name=lambda: "cuda", device_count=lambda: 4, set_device=lambda index: met.append(index))
    monkeypatch.setattr(accelerator, "get_accelerator", lambda: gpus)
    monkeypatch.setattr(deepspeed, "init_distributed", lambda **_: met.append("process group"))
    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    monkeypatch.setattr(dist, "barrier", lambda: met.append("barrier"))
    monkeypatch.setattr("xkd_fast.engine.launch._unlink_shared_buffer", lambda: None)
    variables = {"RANK": "7", "LOCAL_RANK": "3", "WORLD_SIZE": "8", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    start_deepspeed("cpu")
    assert met == [3, "process group", "barrier"]
    monkeypatch.setenv("LOCAL_RANK", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    with pytest.raises(UserError, match="starts 8 ranks, but torch sees 4 GPUs here; start one rank per GPU"):
        start_deepspeed("cpu")
