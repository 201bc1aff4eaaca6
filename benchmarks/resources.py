"""``python -m benchmarks.resources``: every kernel, compiled for GPUs that need not be there, and what it takes of them.

The operators run on the CPU with their kernels' launches caught; each caught launch is compiled for compute capabilities 8.0
(A100), 9.0 (H100, H200) and 10.0 (B200), those of them that its case can run on, and registers, spills and shared memory are
read from the machine code. ``--json`` prints one JSON list.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import JITFunction

from benchmarks.kernel_cases import CASES, FURTHER, Case
from xkd_kernels import backends

CAPABILITIES = (80, 90, 100)
TYPES = {
    torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16",
    torch.int32: "i32", torch.int64: "i64", torch.uint8: "u8", torch.float8_e4m3fn: "fp8e4nv",
}  # fmt: skip


@dataclass(frozen=True)
class Resources:
    """What one program of a kernel takes.

    Attributes:
        kernel, case: which kernel, and where it was first launched with these constants.
        constants: that it is compiled with, warps and stages among them.
        capability: 80 for 8.0, and so on.
        registers: per thread.
        spilled: bytes per thread that do not fit the registers.
        shared: bytes.
    """

    kernel: str
    case: str
    constants: dict[str, Any]
    capability: int
    registers: int
    spilled: int
    shared: int


Launch = tuple[JITFunction, tuple[Any, ...], dict[str, Any]]


def caught_launches(case: Case) -> list[Launch]:
    """The kernels that a case launches, forward and backward, for two clips."""
    caught: list[Launch] = []

    def catch(self: JITFunction, *arguments: Any, grid: Any, warmup: bool, **constants: Any) -> None:
        caught.append((self, arguments, constants))

    run, obstacle = JITFunction.run, backends.obstacle
    JITFunction.run, backends.obstacle = catch, lambda *of: None  # type: ignore[assignment, method-assign]
    try:
        inputs = case.inputs(2, torch.device("cpu"))
        outputs = case.fused(*inputs)
        outputs = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
        if outputs[0].requires_grad:
            torch.autograd.backward(outputs, [torch.zeros_like(output) for output in outputs])
    finally:
        JITFunction.run, backends.obstacle = run, obstacle  # type: ignore[method-assign]
        backends.choose.cache_clear()
    return caught


def compiled(launch: Launch, capability: int) -> tuple[int, int, int]:
    """Registers, spilled bytes and shared memory of a launch, as the device would specialise it."""
    kernel, arguments, keywords = launch
    names = [parameter.name for parameter in kernel.params]
    constants = {name: value for name, value in keywords.items() if name in names}
    options = {name: value for name, value in keywords.items() if name not in names}
    signature, attributes = {}, {}
    for place, (name, value) in enumerate(zip(names, arguments)):
        if value is None or (type(value) is int and value == 1):
            constants[name] = value
            continue
        if isinstance(value, torch.Tensor):
            signature[name] = f"*{TYPES[value.dtype]}"
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
        if isinstance(value, torch.Tensor) or (type(value) is int and value % 16 == 0):
            attributes[(place,)] = [["tt.divisibility", 16]]
    signature = {name: "constexpr" if name in constants else signature[name] for name in names}
    source = ASTSource(kernel, signature, constants, attributes)
    program = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(program.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    if not found:
        raise RuntimeError(f"cuobjdump says nothing of registers: {usage}")
    registers, stack, local = map(int, found.groups())
    return registers, stack + local, program.metadata.shared


def resources(cases: Iterable[Case] = CASES + FURTHER, capabilities: Iterable[int] = CAPABILITIES) -> list[Resources]:
    """Of every different kernel that the cases launch."""
    different: dict[str, tuple[Case, Launch]] = {}
    for case in cases:
        for launch in caught_launches(case):
            kernel, arguments, keywords = launch
            types = [str(x.dtype) if isinstance(x, torch.Tensor) else type(x).__name__ for x in arguments]
            different.setdefault(f"{kernel.__name__} {types} {keywords}", (case, launch))
    found = []
    for capability in capabilities:
        for case, launch in different.values():
            if capability in case.capabilities:
                shown = {key: value for key, value in launch[2].items() if value is not None}
                found.append(Resources(launch[0].__name__, case.name, shown, capability, *compiled(launch, capability)))
    return found


def table(found: Iterable[Resources]) -> list[str]:
    """One line per kernel and capability."""
    lines = [f"{'kernel':44} {'where':34} {'for':>6} {'registers':>9} {'spilled':>8} {'shared':>10}"]
    for row in found:
        target = f"sm_{row.capability}"
        name = row.kernel.strip("_").removesuffix("_kernel")
        lines.append(f"{name:44} {row.case:34} {target:>6} {row.registers:>9} {row.spilled:>6} B {row.shared / 1024:>6.1f} KiB")
    return lines


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.resources", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON list instead of a table")
    parser.add_argument("--case", choices=[case.name for case in CASES + FURTHER], help="only this one (default: all)")
    given = parser.parse_args()
    everything = resources([case for case in CASES + FURTHER if given.case in (None, case.name)])
    if given.json:
        print(json.dumps([asdict(row) for row in everything]))
    else:
        print("\n".join(table(everything)))
