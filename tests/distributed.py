"""Starts the ranks of a test as processes of their own, as a launcher does."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from xkd_fast.engine.launch import free_port

REPOSITORY = Path(__file__).parent.parent


def run_ranks(arguments: Sequence[str], world_size: int, timeout: float = 900, *, on_gpu: bool = False) -> None:
    """Run ``python ARGUMENTS`` once per rank and wait; raises with the failing rank's output if one fails.

    Ranks see no GPU unless ``on_gpu``: a machine has one or a few, and tests start up to four ranks.
    """
    port = str(free_port())
    processes = []
    for rank in range(world_size):
        environment = dict(
            os.environ,
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(world_size),
            LOCAL_SIZE=str(world_size),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=port,
            OMP_NUM_THREADS="1",
        )
        if not on_gpu:
            environment |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
        command = [sys.executable, *arguments]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        processes.append(subprocess.Popen(command, env=environment, cwd=REPOSITORY, text=True, **pipes))
    try:
        outputs = [process.communicate(timeout=timeout)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for rank, (process, output) in enumerate(zip(processes, outputs, strict=True)):
        if process.returncode:
            raise AssertionError(f"rank {rank} ended with {process.returncode}:\n{output[-4000:]}")
