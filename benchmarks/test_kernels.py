"""Every fused operator beside its rivals, at the shapes of the base model's step, forward and backward by themselves.

Rivals are the naive twin (``eager``) and its program by torch.compile (``compiled``), PyTorch's operators as
``backend="torch"`` takes them (``torch``), and for attention flash, cuDNN and xformers where they work. XKD_BENCHMARK_TUNE=1
looks for faster launches first, of what has none yet before the rest, and goes on to sizes that the base model does not have.
A case that is measured again replaces its row in the results; the other rows stay. ``python -m benchmarks.adopt`` makes the
winners, and their launches, what ``auto`` takes.

Without ``--benchmark``, or without a GPU, the same runs once at tiny shapes, interpreted.
"""

from __future__ import annotations

import json
import math
import os
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._functorch import config as functorch
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import record, timing, tuning
from benchmarks.kernel_cases import CASES, FURTHER, SMALL, Case, Result, runs_of
from benchmarks.memory import most_allocated
from benchmarks.race import too_late
from benchmarks.roofline import floors
from xkd_fast.analysis.provenance import provenance
from xkd_fast.analysis.roofline import SHEETS
from xkd_fast.errors import UserError
from xkd_fast.model.attention import choose
from xkd_fast.model.packing import Group

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
GPU = torch.cuda.get_device_name(DEVICE) if DEVICE.type == "cuda" else ""
TUNES = os.environ.get("XKD_BENCHMARK_TUNE") == "1"
RESULT = f"kernels_{GPU.replace(' ', '_').lower()}"
CLIPS, ROUNDS = 32, 20
TUNING_ROUNDS = 7

Operator = Callable[..., Result]


def rivals(case: Case, compiler: str) -> dict[str, Operator]:
    """Everyone who computes a case."""
    found: dict[str, Operator] = {
        "fused": case.fused,
        "torch": case.plain,
        "compiled": torch.compile(case.naive, dynamic=False, fullgraph=True, backend=compiler),
        "eager": case.naive,
    }
    if case.lengths and DEVICE.type == "cuda":
        for name, kind in (("flash", SDPBackend.FLASH_ATTENTION), ("cudnn", SDPBackend.CUDNN_ATTENTION)):
            found[name] = partial(_by_kind, kind, case.plain)
        try:
            found["xformers"] = partial(_by_xformers, choose("xformers").attend_packed, case.lengths)
        except UserError as error:
            print(error)
    return found


def _by_kind(kind: SDPBackend, operator: Operator, qkv: Tensor) -> Result:
    with sdpa_kernel(kind):
        return operator(qkv)


def _by_xformers(attend: Callable[..., Tensor], lengths: tuple[int, ...], qkv: Tensor) -> Tensor:
    return attend(qkv.flatten(1), [Group(*run) for run in runs_of(qkv, lengths)], qkv.shape[2])


class Passes:
    """Forward and backward pass of one contestant, each to be run as often as one likes."""

    def __init__(self, operator: Operator, inputs: list[Tensor]) -> None:
        self.operator, self.inputs = operator, inputs
        self.outputs = self.forward()
        self.leaves = [x for x in inputs if x.requires_grad]
        generator = torch.Generator(DEVICE).manual_seed(0)
        shaped = [(x.shape, x.dtype) for x in self.outputs]
        self.gradients = [torch.randn(shape, generator=generator, device=DEVICE).to(dtype) for shape, dtype in shaped]

    def forward(self) -> tuple[Tensor, ...]:
        """The operator's results."""
        out = self.operator(*self.inputs)
        return out if isinstance(out, tuple) else (out,)

    def backward(self) -> tuple[Tensor, ...]:
        """Gradients of its inputs."""
        return torch.autograd.grad(self.outputs, self.leaves, self.gradients, retain_graph=True)

    def both(self) -> object:
        """One pass after the other, nothing of it kept."""
        outputs = self.forward()
        return torch.autograd.grad(outputs, self.leaves, self.gradients) if self.leaves else None

    @property
    def works(self) -> dict[str, Callable[[], tuple[Tensor, ...]]]:
        """Both passes by name; one without the other where nothing is differentiated."""
        return {"forward": self.forward, "backward": self.backward} if self.leaves else {"forward": self.forward}


def difference(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> float:
    """The largest, in parts of each tensor's largest number; infinite for what is no number."""
    pairs = [(x.detach().float(), y.detach().float()) for x, y in zip(found, expected, strict=True)]
    off = [float((x - y).abs().max() / y.abs().max()) for x, y in pairs]
    return max(value if value == value else math.inf for value in off)


@contextmanager
def kept_graphs() -> Iterator[None]:
    """Let compiled backward passes run more than once."""
    with functorch.patch(donated_buffer=False):
        yield


def tune(case: Case, clips: int, rounds: int) -> dict[tuning.Key, tuple[tuning.Launch, list[dict[str, Any]]]]:
    """Faster launches of every kernel of a case."""
    asked: set[tuning.Key] = set()
    chosen: dict[tuning.Key, tuning.Launch] = {}
    with tuning.launches(chosen, asked, by_default=True):
        passes = Passes(case.fused, case.inputs(clips, DEVICE))
        expected = {name: work() for name, work in passes.works.items()}

        def seconds(key: tuning.Key, launch: tuning.Launch) -> float:
            name = "backward" if "backward" in key[0] else "forward"
            chosen[key] = launch
            try:
                if difference(passes.works[name](), expected[name]) > case.close:
                    return math.inf
                return statistics.median(timing.seconds({name: passes.works[name]}, DEVICE, rounds)[name])
            except Exception as error:  # too much shared memory, too many registers: this launch is none
                print(f"{key[0]} {launch}: {type(error).__name__}")
                return math.inf
            finally:
                del chosen[key]

        found = {}
        for key in sorted(asked, key=str):
            found[key] = tuning.tuned(key, partial(seconds, key), too_late)
            chosen[key] = found[key][0]
    return found


def written() -> list[dict[str, Any]]:
    """The rows of this GPU's results."""
    path = record.RESULTS / f"{RESULT}.json"
    return json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []


def merged(rows: list[dict[str, Any]], row: dict[str, Any]) -> list[dict[str, Any]]:
    """``rows`` with one measured anew, which keeps the search for its launches where it comes without."""
    before = next((each for each in rows if each["case"] == row["case"]), None)
    if before is None:
        return [*rows, row]
    return [{**row, "launches": row["launches"] or before["launches"]} if each is before else each for each in rows]


def in_order(tunes: bool, rows: list[dict[str, Any]]) -> list[Case]:
    """All cases; where launches are looked for, those without any first, then those that the base model does not have."""
    if not tunes:
        return [*CASES, *SMALL]
    tuned = {row["case"] for row in rows if row["launches"]}
    return [*sorted([*CASES, *FURTHER], key=lambda case: case.name in tuned), *SMALL]


@pytest.mark.parametrize("case", in_order(TUNES, written()), ids=lambda case: case.name)
def test_kernel(measuring: bool, case: Case) -> None:
    """Times an operator's contestants in turns and writes down who is how fast; fails if one computes something else."""
    at_size = measuring and DEVICE.type == "cuda"
    if (case in SMALL) == at_size:
        pytest.skip(f"{case.name}: for {'a small run' if at_size else 'a GPU that is measured'}")
    if too_late():
        pytest.skip(f"{case.name}: not reached")
    clips, rounds, compiler = (CLIPS, ROUNDS, "inductor") if at_size else (2, 1, "aot_eager")
    tried: dict[tuning.Key, tuple[tuning.Launch, list[dict[str, Any]]]] = {}
    if at_size and TUNES:
        tried = tune(case, clips, TUNING_ROUNDS)
    elif not at_size and case.operator == "bias_gelu":
        tried = tune(case, clips, 1)
    inputs = case.inputs(clips, DEVICE)
    contestants, failed = {}, {}
    with tuning.launches({key: launch for key, (launch, _) in tried.items()}), kept_graphs():
        for name, operator in rivals(case, compiler).items():
            try:
                passes = Passes(operator, inputs)
                [work() for work in passes.works.values()]
                contestants[name] = passes
            except Exception as error:
                assert name not in ("fused", "torch", "eager"), f"{name} cannot compute {case.name}: {error}"
                failed[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        for way in contestants["eager"].works:
            expected = contestants["eager"].works[way]()
            for name, passes in contestants.items():
                off = difference(passes.works[way](), expected)
                assert off < case.close, f"{name} computes another {way} pass of {case.name}"
        row = measured(case, clips, contestants, rounds)
    row["failed"] = failed
    row["launches"] = [
        {"kernel": kernel, "dtype": str(dtype).removeprefix("torch."), "shape": shape, "tried": attempts}
        for (kernel, dtype, shape), (_, attempts) in tried.items()
    ]
    row["commit"] = provenance()["commit"]  # its own, since other rows stay
    print(told(row))
    if at_size:
        record.write(RESULT, {"gpu": GPU, "rows": merged(written(), row)})


def measured(case: Case, clips: int, contestants: dict[str, Passes], rounds: int) -> dict[str, Any]:
    """A case's times by pass and contestant, the memory of both passes, and the least time that the GPU could take."""
    row: dict[str, Any] = {
        "case": case.name,
        "operator": case.operator,
        "dtype": str(case.dtype).removeprefix("torch."),
        "shape": case.shape,
        "clips": clips,
        "seconds": {},
    }
    for way in contestants["fused"].works:
        times = timing.seconds({name: passes.works[way] for name, passes in contestants.items()}, DEVICE, rounds)
        row["seconds"][way] = {name: record.spread(found) for name, found in times.items()}
    held = {name: most_allocated(passes.both, DEVICE) for name, passes in contestants.items()}
    row["most_allocated"] = {name: size for name, size in held.items() if size is not None}
    gpu = SHEETS.get(GPU)
    row["floor"] = {floor.way: floor.seconds[gpu] for floor in floors(case, clips) if floor.code == "fused"} if gpu else {}
    return row


def told(row: dict[str, Any]) -> str:
    """A line for each pass."""
    lines = []
    for way, seconds in row["seconds"].items():
        times = ", ".join(f"{name} {1e6 * spread['median']:.0f}" for name, spread in seconds.items())
        share = f"; {row['floor'][way] / seconds['fused']['median']:.0%} of the roofline" if row["floor"] else ""
        lines.append(f"{row['case']}, {way}: {times} µs{share}")
    sizes = ", ".join(f"{name} {size / 2**20:.1f}" for name, size in row["most_allocated"].items())
    lines += [f"  memory of both passes, MiB: {sizes}"] if sizes else []
    lines += [f"  {name} does not run: {reason}" for name, reason in row["failed"].items()]
    return "\n".join(lines)
