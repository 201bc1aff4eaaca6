"""The ``deepspeed`` launcher as a child process that can be asked to stop.

The launcher itself passes no signal on to the ranks of a single machine: ended alone, it leaves them training. So requests to
stop go to the ranks directly, which write a checkpoint and end; the launcher then ends by itself.
"""

from __future__ import annotations

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
    options = ["--log_level", "error", "--num_accelerators", str(processes), "--master_port", str(free_port())]
    return [str(launcher), *options, str(script), *arguments]


def run_launcher(command: Sequence[str], environment: dict[str, str]) -> tuple[int, int | None]:
    """Run the launcher to its end.

    A first SIGTERM or Ctrl-C asks the ranks for a last checkpoint, a second ends them at once.

    Returns:
        Its exit code, and the signal that stopped it early, if one did.
    """
    stopped: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        stopped.append(number)
        for rank in ranks_of(launcher.pid):
            with suppress(psutil.NoSuchProcess):
                rank.send_signal(signal.SIGTERM if len(stopped) == 1 else signal.SIGKILL)

    # A session of its own: the terminal's Ctrl-C reaches this process alone.
    launcher = subprocess.Popen(command, env=environment, start_new_session=True)
    with _handling(stop, signal.SIGTERM, signal.SIGINT):
        code = launcher.wait()
    return code, stopped[0] if stopped else None


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
    before = {number: signal.signal(number, handler) for number in signals}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)
