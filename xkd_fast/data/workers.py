"""Worker processes that may hang or crash: each task has a time limit, and a bad one costs only itself.

Workers are fresh interpreters that speak over pipes, not forks: they inherit no threads or locks, they do not import the
caller's main module, and they can be killed at any time. A worker also sets itself an alarm, so that one whose parent was
killed in the meantime ends too. Results come back in the order of completion, so the caller decides about order.
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import itertools
import math
import os
import pickle
import selectors
import signal
import struct
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from xkd_fast.errors import UserError

Failure = Literal["raised", "timed_out", "crashed"]

PAUSE = object()  # yielded by an iterable of tasks: nothing more until another outcome has been seen

_END = object()
_LENGTH = struct.Struct("<Q")
_READY = b"r"
_PACKAGE_ROOT = str(Path(__file__).resolve().parents[2])
# Without the working directory, which may hold an `av` or a `numpy` of its own.
_SERVE = "import sys; '' in sys.path and sys.path.remove(''); from xkd_fast.data.workers import serve; serve()"
_STARTING = 120.0  # seconds that a new process has for its imports, on top of its first task's time


@dataclass(frozen=True)
class Outcome:
    """What became of one task."""

    index: int  # position of the task in the sequence given to run_tasks
    result: Any = None  # what the function returned; None on failure
    failure: Failure | None = None  # None: the task succeeded
    detail: str = ""  # on failure: the exception, the time limit, or the signal


def require_workers(workers: int) -> None:
    """Raise UserError unless ``workers`` is a usable number of processes."""
    if workers < 1:
        raise UserError(f"workers = {workers} must be 1 or more")


class _Worker:
    """One child process and the task it has in hand."""

    def __init__(self, function: str, seconds: float) -> None:
        self.function, self.seconds = function, seconds
        self.task: int | None = None
        self.deadline = math.inf
        self.starting = True  # until the process is ready for tasks
        self.received = bytearray()
        self.errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115
        environment = dict(os.environ)
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [_PACKAGE_ROOT, environment.get("PYTHONPATH")]))
        for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
            environment[variable] = "1"  # the processes are the parallelism
        self.process = subprocess.Popen(
            [sys.executable, "-c", _SERVE, function, repr(seconds)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            env=environment,
            start_new_session=True,  # an interrupt at the keyboard goes to the caller alone, which ends the workers
        )

    @property
    def output(self) -> int:
        assert self.process.stdout is not None
        return self.process.stdout.fileno()

    def give(self, index: int, task: Any) -> None:
        self.task = index
        self.deadline = time.monotonic() + self.seconds + (_STARTING if self.starting else 0.0)
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # a dead worker is noticed when its output ends
            _send(self.process.stdin, task)

    def receive(self) -> Outcome | None:
        """Read what there is; the outcome once it is complete."""
        assert self.task is not None
        data = os.read(self.output, 1 << 20)
        if not data:
            return self._crashed()
        if self.starting:
            self.starting, data = False, data[len(_READY) :]
            self.deadline = time.monotonic() + self.seconds
        if data:
            self.received += data
            self.deadline = math.inf  # done in time; the rest of the answer only has to be fetched
        if len(self.received) < _LENGTH.size:
            return None
        (size,) = _LENGTH.unpack_from(self.received)
        if len(self.received) < _LENGTH.size + size:
            return None
        ok, value = pickle.loads(memoryview(self.received)[_LENGTH.size :])
        self.received, index = bytearray(), self.task
        self.task, self.deadline = None, math.inf
        return Outcome(index, result=value) if ok else Outcome(index, failure="raised", detail=value)

    def _crashed(self) -> Outcome:
        assert self.task is not None
        code = self.process.wait()
        if code == -signal.SIGALRM:
            return Outcome(self.task, failure="timed_out", detail=f"not done after {self.seconds:g} s")
        cause = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return Outcome(self.task, failure="crashed", detail=f"the worker process ended with {cause}{self._last_words()}")

    def _last_words(self) -> str:
        """Where it happened: the last line of a traceback, or the place that faulthandler names."""
        self.errors.seek(0, os.SEEK_END)
        self.errors.seek(max(0, self.errors.tell() - 4000))
        lines = self.errors.read().decode("utf-8", "replace").strip().splitlines()
        places = [line for before, line in itertools.pairwise(lines) if "(most recent call first)" in before]
        return f": {(places or lines)[-1].strip()}" if lines else ""

    def end(self) -> None:
        """Kill and clear up."""
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self.errors):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()


def run_tasks(function: str, tasks: Iterable[Any], *, workers: int, seconds: float) -> Generator[Outcome, None, None]:
    """Call a function on every task in worker processes.

    Tasks are drawn from the iterable only as workers become free. A generator that yields ``PAUSE`` is asked again after the
    next outcome, which bounds how far completion runs ahead of a slow task. Leaving the iteration early kills the workers.

    Args:
        function: ``"module:name"`` of a function of one argument; task and result must be picklable.
        tasks: the arguments.
        workers: number of processes.
        seconds: time limit of one task, without the start of its process; then its worker is killed and replaced.

    Yields:
        Outcome: one per task, in order of completion.

    Raises:
        UserError: ``workers`` below 1.
    """
    require_workers(workers)
    queue, given = iter(tasks), 0
    busy: list[_Worker] = []
    idle: list[_Worker] = []
    exhausted = False
    with selectors.DefaultSelector() as selector:

        def retire(worker: _Worker) -> None:
            selector.unregister(worker.output)
            busy.remove(worker)
            worker.end()

        try:
            while True:
                while not exhausted and len(busy) < workers:
                    task = next(queue, _END)
                    if task is PAUSE and busy:
                        break
                    if task is _END or task is PAUSE:
                        exhausted = True
                        break
                    worker = idle.pop() if idle else _Worker(function, seconds)
                    busy.append(worker)
                    selector.register(worker.output, selectors.EVENT_READ, worker)
                    worker.give(given, task)
                    given += 1
                if not busy:
                    return
                wait = min(worker.deadline for worker in busy) - time.monotonic()
                ready = selector.select(min(max(0.0, wait), 60.0))  # no deadline is infinity, which select does not know
                # Settled before outcomes are handed out, because the time that the caller takes for them is not the workers'.
                talking, now = [key.data for key, _ in ready], time.monotonic()
                overdue = [worker for worker in busy if now > worker.deadline and worker not in talking]
                for worker in talking:
                    outcome = worker.receive()
                    if outcome is None:
                        continue
                    if outcome.failure in (None, "raised"):
                        selector.unregister(worker.output)
                        busy.remove(worker)
                        idle.append(worker)
                    else:
                        retire(worker)
                    yield outcome
                for worker in overdue:
                    assert worker.task is not None
                    late = Outcome(worker.task, failure="timed_out", detail=f"not done after {seconds:g} s")
                    retire(worker)
                    yield late
        finally:
            for worker in busy + idle:
                worker.end()


def _send(stream: IO[bytes], value: Any) -> None:
    data = pickle.dumps(value, protocol=pickle.HIGHEST_PROTOCOL)
    stream.write(_LENGTH.pack(len(data)))
    stream.write(data)
    stream.flush()


def _resolve(function: str) -> Callable[[Any], Any]:
    module, _, name = function.partition(":")
    return getattr(importlib.import_module(module), name)


def serve() -> None:
    """The worker's side: take tasks from standard input until it ends."""
    function_name, seconds = sys.argv[1], float(sys.argv[2])
    results = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints must not end up among the results
    faulthandler.enable()
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    function = _resolve(function_name)
    tasks = sys.stdin.buffer
    results.write(_READY)
    results.flush()
    while header := tasks.read(_LENGTH.size):
        task = pickle.loads(tasks.read(_LENGTH.unpack(header)[0]))
        # The default action of the alarm ends the process even inside C code that never returns.
        signal.setitimer(signal.ITIMER_REAL, seconds + 1.0)
        try:
            answer = (True, function(task))
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            answer = (False, f"{type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno})")
        signal.setitimer(signal.ITIMER_REAL, 0)
        _send(results, answer)
