"""The ``deepspeed`` launcher as a child process that can be asked to stop.

The launcher itself passes no signal on to the ranks of a single machine. So requests to stop go to the ranks directly, which
write a checkpoint and end; the launcher then ends by itself.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

import psutil

from xkd_fast.engine.launch import free_port


def launcher_command(processes: int, script: Path, arguments: Sequence[str]) -> list[str]:
    """``deepspeed`` on this machine with so many ``processes`` of ``script``."""
    launcher = Path(sys.executable).with_name("deepspeed")
    options = ["--log_level", "critical", "--num_accelerators", str(processes), "--master_port", str(free_port())]
    return [str(launcher), *options, str(script), *arguments]


def run_launcher(command: Sequence[str], environment: dict[str, str]) -> tuple[int, int | None]:
    """Run the launcher to its end.

    A first SIGTERM, SIGHUP or Ctrl-C asks the ranks for a last checkpoint, a second ends them at once. Where no rank has
    started yet, the launcher itself is ended.

    Returns:
        Its exit code, and the signal that stopped it early, if one did.
    """
    stopped: list[int] = []
    started: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        stopped.append(number)
        if len(stopped) == 1:
            print("stopping: training writes a checkpoint and ends; once more ends it at once", file=sys.stderr)
        for launcher in started:
            _pass_on(launcher, signal.SIGTERM if len(stopped) == 1 else signal.SIGKILL)

    with (
        _handling(stop, signal.SIGTERM, signal.SIGINT, signal.SIGHUP),
        subprocess.Popen(command, env=environment, start_new_session=True) as launcher,  # Ctrl-C reaches this process alone
    ):
        started.append(launcher.pid)
        if stopped:
            _pass_on(launcher.pid, signal.SIGTERM)
        code = launcher.wait()
    return code, stopped[0] if stopped else None


def _pass_on(launcher: int, number: signal.Signals) -> None:
    """Send a signal to a launcher's ranks; without ranks, or to end all, to every process of its session."""
    with suppress(psutil.NoSuchProcess, ProcessLookupError):
        ranks = ranks_of(launcher)
        if number == signal.SIGKILL or not ranks:
            os.killpg(launcher, number)
        for rank in ranks:
            with suppress(psutil.NoSuchProcess):
                rank.send_signal(number)


def ranks_of(launcher: int) -> list[psutil.Process]:
    """The training processes below a launcher: those that it gave a ``--local_rank``."""
    ranks = []
    for process in psutil.Process(launcher).children(recursive=True):
        with suppress(psutil.Error):
            if any(argument.startswith("--local_rank") for argument in process.cmdline()):
                ranks.append(process)
    return ranks


@contextmanager
def _handling(handler: signal._HANDLER, *signals: signal.Signals) -> Iterator[None]:
    heeded = [number for number in signals if signal.getsignal(number) is not signal.SIG_IGN]  # nohup ignores SIGHUP
    before = {number: signal.signal(number, handler) for number in heeded}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)
