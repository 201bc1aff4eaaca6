"""Starting the processes of a run: ranks, threads, turns, and how a run is asked to stop."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import socket
import sys
import sysconfig
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import psutil
import torch
import torch.distributed as dist

from xkd_fast.errors import UserError
from xkd_fast.files import InUse, sole_use

LONGEST_BUILD = 600.0  # seconds that DeepSpeed's communication on a CPU, some 40 s of work, may take to compile
LOADING = 5.0  # seconds that it is held by a process that only loads what is there
TIMEOUT = timedelta(hours=2)  # of collectives: the first rank may render and prepare data while the others wait


def start_deepspeed(device: str = "auto") -> Any:
    """Import DeepSpeed for ``device`` (auto, cpu, cuda) and start the process group; returns the ``deepspeed`` module.

    Ranks come from the environment (``deepspeed``, ``torchrun``); without one, a single process trains alone.

    Raises:
        UserError: ``cuda`` is asked for and there is none, more ranks than GPUs are started here, or DeepSpeed's CPU
            communication cannot be compiled here.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("train.device = cuda, but torch sees no GPU here; set train.device=cpu or auto")
    if device == "cpu" or not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"
        require_build_tools()
        tell_of_other_build()
    defaults = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    if "MASTER_PORT" not in os.environ:
        os.environ["MASTER_PORT"] = str(free_port())
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")  # of DeepSpeed's own calls
    import deepspeed

    deepspeed.utils.logger.setLevel(logging.ERROR)
    logging.getLogger("xkd_kernels").setLevel(logging.ERROR)  # rank 0 tells who computes what
    take_device(int(os.environ["LOCAL_RANK"]))
    if not dist.is_initialized():
        deepspeed.init_distributed(verbose=False, timeout=TIMEOUT)
        dist.barrier()
        _unlink_shared_buffer()
    return deepspeed


def take_device(local_rank: int) -> None:
    """Make the ``local_rank``-th GPU this process's own, before a collective or a model would go to the first one.

    Raises:
        UserError: there are not so many.
    """
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    if accelerator.device_name() != "cpu" and local_rank >= accelerator.device_count():
        raise UserError(
            f"this machine starts {local_world_size()} ranks, but torch sees {accelerator.device_count()} GPUs here; "
            "start one rank per GPU (deepspeed --num_gpus, torchrun --nproc_per_node)"
        )
    accelerator.set_device(local_rank)


def own_device() -> torch.device:
    """Where this rank computes, once DeepSpeed has started."""
    from deepspeed.accelerator import get_accelerator

    return torch.device(get_accelerator().current_device_name())


def _unlink_shared_buffer() -> None:
    """Take the name from the memory that this rank shares with DeepSpeed's other ranks on a CPU, 66 MiB of /dev/shm.

    DeepSpeed never does: every run would keep its memory until the machine restarts. Once all ranks have mapped it the name is
    of no use, and without one it goes with the last of them, however they end.
    """
    variables = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"], dist.get_rank()
    name = "_".join(("deepspeed_allreduce_buffer", str(os.getuid()), *map(str, variables)))
    Path("/dev/shm", name).unlink(missing_ok=True)


def require_build_tools() -> None:
    """Make sure that DeepSpeed can compile its communication on the CPU, which it does at first use.

    Ninja is looked for in this Python's own bin folder too, as if its environment had been activated.

    Raises:
        UserError: naming what is missing and how to install it.
    """
    own = str(Path(sys.executable).parent)
    if own not in os.environ.get("PATH", "").split(os.pathsep):
        os.environ["PATH"] = f"{own}{os.pathsep}{os.environ.get('PATH', '')}"
    compiler = os.environ.get("CXX", "c++")
    header = Path(sysconfig.get_path("include")) / "Python.h"
    needed = (
        (shutil.which("ninja"), "ninja is not found; install it: pip install ninja"),
        (shutil.which(compiler), f"the C++ compiler {compiler} is not found; install g++ (Debian, Ubuntu: apt install g++)"),
        (header.exists(), f"{header} is missing; install Python's headers (Debian, Ubuntu: apt install python3-dev)"),
    )
    for found, sentence in needed:
        if not found:
            raise UserError(f"DeepSpeed compiles its communication on the CPU, but {sentence}")


def tell_of_other_build() -> None:
    """Say so where another process holds the place in which DeepSpeed compiles: torch waits for it without a word.

    Raises:
        UserError: it has held it for longer than any build takes, so it was stopped in between.
    """
    from torch.utils.cpp_extension import get_default_build_root

    version = f"py{sys.version_info.major}{sys.version_info.minor}_cpu"
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or Path(get_default_build_root(), version)
    lock = Path(root, "deepspeed_shm_comm", "lock")
    try:
        age = time.time() - lock.stat().st_mtime
    except OSError:
        return
    told = f"another process seems to be compiling DeepSpeed's communication for {age:.0f} s: {lock} exists"
    if age > LONGEST_BUILD:
        raise UserError(f"{told}; no build takes that long, so it was stopped in between: remove that file")
    if age > LOADING and os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"{told}; waiting for it (if none is, stop this and remove that file)", file=sys.stderr, flush=True)


def free_port() -> int:
    """A TCP port free at this moment on the loopback interface."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def local_world_size() -> int:
    """Processes of this run on this machine."""
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "WORLD_SIZE"):
        if name in os.environ:
            return int(os.environ[name])
    return 1


def set_threads(threads: int) -> None:
    """Set torch's threads in this process; 0 shares the cores this process may use among the machine's processes."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(threads or max(1, cores // local_world_size()))


@contextmanager
def run_folder(folder: Path) -> Iterator[None]:
    """Rank 0 makes a run's folder and keeps other runs out of it until this one ends; if it is left empty, it goes again.

    Raises:
        UserError: on every rank, if the folder cannot be made, or another run trains into it.
    """
    with ExitStack() as held:

        def hold() -> None:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                held.enter_context(sole_use(folder))
                held.callback(_remove_empty, folder)
            except InUse as error:
                raise UserError(
                    f"output = {folder}: another run is training there; wait for it, stop it, or name another folder"
                ) from error
            except OSError as error:
                raise UserError(f"output = {folder} cannot be written: {error.strerror}; name another folder") from error

        first_rank_first(hold)
        yield


def _remove_empty(folder: Path) -> None:
    with suppress(OSError):  # it holds something
        folder.rmdir()


def first_rank_first(task: Callable[[], None]) -> None:
    """Run ``task`` on rank 0 while the others wait; an error there is raised on every rank, on rank 0 to be told."""
    failure: list[BaseException | None] = [None]
    if dist.get_rank() == 0:
        try:
            task()
        except Exception as error:
            failure[0] = error
    dist.broadcast_object_list(failure, src=0)
    if failure[0] is not None:
        if dist.get_rank() > 0 and isinstance(failure[0], UserError):
            failure[0].is_told = True
        raise failure[0]


def every_rank(task: Callable[[], None]) -> None:
    """Run ``task`` on every rank at once; a ``UserError`` of one is raised on all, on the first rank to be told.

    Any other error ends its rank at once, and the launcher the others: where it came from, they might wait for each other.
    """
    failure: UserError | None = None
    try:
        task()
    except UserError as error:
        failure = error
    failures: list[UserError | None] = [None] * dist.get_world_size()
    dist.all_gather_object(failures, failure)
    for failure in failures:
        if failure is not None:
            failure.is_told = dist.get_rank() > 0
            raise failure


class StopSignal:
    """SIGTERM (a scheduler's warning) or Ctrl-C asks for a last checkpoint; all ranks agree on the step to stop at.

    So does the end of a launcher above this process, which would leave it training unattended. A second Ctrl-C ends the
    process at once.

    Attributes:
        agreed: every rank knows that this is the last step.
    """

    def __init__(self, launchers: Sequence[psutil.Process]) -> None:
        """``launchers``: of :func:`launchers_above`, asked as early as possible: one that has ended since is not found."""
        self._received = False
        self._launchers = launchers
        self.agreed = False
        for number in (signal.SIGTERM, signal.SIGINT):
            if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup and background jobs of scripts have it
                signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._received = True
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def agree(self, device: torch.device) -> None:
        """Tell the other ranks; call on the logging path only, it synchronises."""
        wanted = self._received or not all(map(_is_alive, self._launchers))
        flag = torch.tensor(int(wanted), device=device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        self.agreed = bool(flag.item())


def _is_alive(process: psutil.Process) -> bool:
    with suppress(psutil.Error):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def launchers_above() -> list[psutil.Process]:
    """The processes above this one that launch training: ``deepspeed`` in its two stages, ``torchrun``, ``xkd-fast demo``."""
    names = {"deepspeed", "deepspeed.launcher.launch", "torchrun", "torch.distributed.run", "xkd-fast"}
    found = []
    for process in psutil.Process().parents():
        with suppress(psutil.Error):
            if names & {Path(argument).name for argument in process.cmdline()[:5]}:
                found.append(process)
    return found
