"""``python -m benchmarks.roofline``: what every kernel must move and compute, beside its naive twin, and the time that takes.

``--step`` prints instead what the base model's forward and backward pass spends on which kind of operator, and on each of ours;
``--readme`` writes that into the kernels' README. Nothing is computed,
and no GPU is needed: operators run on fake tensors and are watched (``xkd_fast.analysis.roofline``). Times are floors from data
sheets, not measurements. ``--json`` prints one JSON list.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor

if not torch.cuda.is_available():  # nothing is launched, but only thus are kernels offered without a GPU
    os.environ.setdefault("TRITON_INTERPRET", "1")

from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.kernel_cases import CASES, Case
from xkd_fast.analysis.roofline import DEVICES, Cost, Traffic
from xkd_fast.model import products
from xkd_fast.model.build import build_model, random_views
from xkd_fast.model.options import ModelOptions

CLIPS = 32
README = Path(__file__).parent.parent / "kernels" / "README.md"
BEGIN, END = "<!-- what `python -m benchmarks.roofline --readme` writes -->\n", "<!-- end -->\n"
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class Floor:
    """The least that one pass of an operator costs.

    Attributes:
        case: operator and place.
        way: "forward" or "backward".
        code: "fused" or "naive".
        cost: of one call.
        seconds: at least, by device.
    """

    case: str
    way: str
    code: str
    cost: Cost
    seconds: dict[str, float]


def floors(case: Case, clips: int = CLIPS) -> list[Floor]:
    """Of a case, fused and naive, forward and, where it is differentiated, backward."""
    found = []
    with FakeTensorMode():
        for code, function in (("fused", case.fused), ("naive", case.naive)):
            for way, cost in _passes(function, case.inputs(clips, DEVICE)).items():
                found.append(Floor(case.name, way, code, cost, {name: cost.seconds(gpu) for name, gpu in DEVICES.items()}))
    return found


def _passes(function: Callable[..., Tensor | tuple[Tensor, ...]], inputs: list[Tensor]) -> dict[str, Cost]:
    with Traffic() as forward:
        out = function(*inputs)
    outputs = out if isinstance(out, tuple) else (out,)
    costs = {"forward": forward.total}
    if outputs[0].requires_grad:
        gradients = [torch.empty_like(output) for output in outputs]
        with Traffic() as backward:
            torch.autograd.backward(outputs, gradients)
        costs["backward"] = backward.total
    return costs


KINDS = {  # the first that is found in an operator's name
    "attention": r"scaled_dot_product|packed_attention|cls_attention",
    "patches": r"gather_patches",
    "sums and norms": r"layer_norm|addcmul",
    "GELU": r"gelu",
    "matrix products": r"mm$",
    "casts, copies, concatenations": r"^(_to_copy|copy_|clone|cat)$",
    "other elementwise operators and sums": r"",
}


def kind_of(name: str) -> str:
    """What kind of operator one such as "aten.mm" is."""
    return next(kind for kind, pattern in KINDS.items() if re.search(pattern, name.split(".")[1]))


def step_costs(options: ModelOptions, kernels: str, clips: int = CLIPS) -> dict[str, Cost]:
    """Of a model's forward and backward pass in bfloat16, by kind of operator; attention fused either way."""
    found: dict[str, Cost] = {}
    for name, cost in step_operators(options, kernels, clips).items():
        found[kind_of(name)] = found.get(kind_of(name), Cost()) + cost
    return found


@cache
def step_operators(options: ModelOptions, kernels: str, clips: int = CLIPS) -> dict[str, Cost]:
    """The same by operator."""
    attention = "triton" if kernels == "triton" else "sdpa"
    options = replace(options, kernels=kernels, attention=attention)
    with torch.device("meta"):
        model = build_model(options, seed=0)
    with FakeTensorMode():
        state = {name: _fake(x) for name, x in (*model.named_parameters(), *model.named_buffers())}
        views = random_views(options, clips, DEVICE)
        # as on the devices that are told of, whatever this machine multiplies bfloat16 in
        with patch.object(products, "LACKS_BFLOAT16", False), Traffic() as traffic:
            with torch.autocast(DEVICE.type, torch.bfloat16):
                loss = torch.func.functional_call(model, state, views).total
            loss.backward()
    return traffic.costs


def _fake(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=DEVICE, requires_grad=x.requires_grad)


def step_floors(clips: int) -> tuple[dict[str, tuple[float, float]], dict[str, float]]:
    """Floors of the whole pass on an H100, ms: by kind, with PyTorch's operators and with ours, and ours by themselves."""
    device, options = DEVICES["H100"], ModelOptions()
    plain, ours = (step_costs(options, kernels, clips) for kernels in ("torch", "triton"))
    kinds = sorted(plain, key=lambda kind: -plain[kind].seconds(device))
    kinds += [kind for kind in ours if kind not in kinds]
    found = {kind: tuple(1e3 * costs.get(kind, Cost()).seconds(device) for costs in (plain, ours)) for kind in kinds}
    found["all"] = tuple(sum(floors[i] for floors in found.values()) for i in range(2))
    own: dict[str, float] = {}
    for name, cost in step_operators(options, "triton", clips).items():
        if name.startswith("xkd_kernels."):
            operator = name.removeprefix("xkd_kernels.").removesuffix("_backward")
            own[operator] = own.get(operator, 0.0) + 1e3 * cost.seconds(device)
    return found, dict(sorted(own.items(), key=lambda pair: -pair[1]))  # type: ignore[return-value]


def step_table(clips: int) -> list[str]:
    """:func:`step_floors` to read."""
    kinds, own = step_floors(clips)
    lines = [f"Floors on an H100, ms for {clips} clips: PyTorch's operators one by one, and ours"]
    lines += [f"{kind:40} {plain:>8.2f} {ours:>8.2f}" for kind, (plain, ours) in kinds.items()]
    lines += ["Of which our operators, forward and backward"]
    return lines + [f"{name:40} {floor:>17.2f} {floor / kinds['all'][1]:>5.1%}" for name, floor in own.items()]


def readme_text(clips: int = CLIPS) -> str:
    """:func:`step_floors` as the README's tables."""
    kinds, own = step_floors(clips)
    lines = ["| kind of operator | PyTorch's, one by one | with these kernels |", "|---|---|---|"]
    lines += [f"| {kind} | {f'{plain:.1f}' if plain else '-'} | {ours:.1f} |" for kind, (plain, ours) in kinds.items()]
    lines += ["", "Of the last column, forward and backward together:", ""]
    lines += ["| operator | ms | share of all |", "|---|---|---|"]
    lines += [f"| `{name}` | {floor:.2f} | {floor / kinds['all'][1]:.1%} |" for name, floor in own.items()]
    return "\n".join(lines) + "\n"


def readme_with(text: str, tables: str) -> str:
    """The README with other tables between its two marks."""
    before, rest = text.split(BEGIN)
    return before + BEGIN + tables + END + rest.split(END)[1]


def table(found: list[Floor]) -> list[str]:
    """One line for each pass of each case."""
    named = "".join(f"{name + ' µs':>10}" for name in DEVICES)
    lines = [f"{'operator, place':36} {'pass':8} {'code':6} {'MB':>8} {'sectors':>11} {'GFLOP':>8}{named}"]
    for row in found:
        times = "".join(f"{1e6 * seconds:>10.1f}" for seconds in row.seconds.values())
        work = (row.cost.products + row.cost.others) / 1e9
        lines.append(
            f"{row.case:36} {row.way:8} {row.code:6} {row.cost.bytes / 1e6:>8.1f} {row.cost.sectors:>11} {work:>8.2f}{times}"
        )
    return lines


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.roofline", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON list instead of a table")
    parser.add_argument("--case", choices=[case.name for case in CASES], help="only this one (default: all)")
    parser.add_argument("--step", action="store_true", help="the whole forward and backward pass, by kind of operator")
    parser.add_argument("--readme", action="store_true", help="write that into kernels/README.md")
    parser.add_argument("--clips", type=int, default=CLIPS, help="clips of a batch (default: %(default)s)")
    given = parser.parse_args()
    if given.clips < 1:
        parser.error(f"--clips {given.clips} must be 1 or more")
    if given.readme:
        README.write_text(readme_with(README.read_text(encoding="utf-8"), readme_text()), encoding="utf-8")
        sys.exit()
    if given.step:
        print("\n".join(step_table(given.clips)))
        sys.exit()
    everything = [row for case in CASES if given.case in (None, case.name) for row in floors(case, given.clips)]
    print(json.dumps([asdict(row) for row in everything]) if given.json else "\n".join(table(everything)))
