"""What holds of every launch: it runs on its tensors' device, and finds rows that lie far apart."""

from __future__ import annotations

import ast
import inspect
import typing
from pathlib import Path

import pytest
import torch
from torch import Tensor

import xkd_kernels as X
from benchmarks.kernel_cases import SMALL
from xkd_kernels import configurations
from xkd_kernels.configurations import Launch, on_own_device
from xkd_kernels.packed_attention import packed_attention_backward, packed_attention_forward

SOURCES = sorted(Path(X.__file__).parent.glob("*.py"))
FAR = 2**30 + 64  # numbers; twice as many do not fit 32 bits
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def launching(source: str) -> dict[str, list[str]]:
    """Functions that launch a kernel, with the names of their decorators."""
    found = {}
    for function in ast.parse(source).body:
        if isinstance(function, ast.FunctionDef):
            subscripted = [node.value for node in ast.walk(function) if isinstance(node, ast.Subscript)]
            if any(isinstance(value, ast.Name) and value.id.endswith("_kernel") for value in subscripted):
                found[function.name] = [ast.unparse(decorator).split("(")[0] for decorator in function.decorator_list]
    return found


def test_every_launch_is_guarded():
    """Catches an operator whose kernels would run on the current device instead of its tensors'."""
    found = {path.stem: launching(path.read_text(encoding="utf-8")) for path in SOURCES}
    assert {"packed_attention", "bias_gelu"} <= {name for name, functions in found.items() if functions}
    every = [(name, function, by) for name, functions in found.items() for function, by in functions.items()]
    assert [(name, function) for name, function, by in every if "on_own_device" not in by] == []


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_kernels_run_on_the_device_of_their_tensors(case, device, monkeypatch):
    """Catches a guard that is left before the kernel starts, or that looks at another tensor's device."""
    here: list[torch.device] = []
    launched: list[list[torch.device]] = []

    class Guard:
        def __init__(self, x: Tensor) -> None:
            self.device = x.device

        def __enter__(self) -> None:
            here.append(self.device)

        def __exit__(self, *_: object) -> None:
            here.pop()

    def launch(*key: object) -> Launch:
        launched.append([*here])
        return original(*key)

    original = configurations._launch
    monkeypatch.setattr(configurations, "_launch", launch)
    monkeypatch.setattr(torch.cuda, "device_of", Guard)
    outputs = case.fused(*case.inputs(2, device))
    outputs = [x for x in ([outputs] if isinstance(outputs, Tensor) else outputs) if x.requires_grad]
    forward = len(launched)
    torch.autograd.backward(outputs, [torch.ones_like(x) for x in outputs])
    assert forward and (len(launched) > forward) == bool(outputs)
    assert all(len(guards) == 1 and guards[0].type == device.type for guards in launched)


def test_a_guarded_operator_keeps_its_schema():
    """Catches annotations that custom_op cannot read through the guard, and a guard that takes None for a tensor."""
    operators = torch.ops.xkd_kernels
    gelu, norm = (str(x.default._schema) for x in (operators.bias_gelu, operators.residual_layer_norm_backward))
    assert gelu == "xkd_kernels::bias_gelu(Tensor h, Tensor bias) -> Tensor"
    assert "Tensor? to_total, Tensor to_normalised" in norm and "ScalarType? again" in norm

    @on_own_device
    def operator(a: Tensor | None, b: Tensor) -> Tensor:
        return b + 1

    assert operator(None, torch.zeros(1, device="cpu")).item() == 1
    assert operator(None, b=torch.zeros(1, device="cpu")).item() == 1
    assert inspect.signature(operator).parameters["a"].annotation == typing.Optional[Tensor]  # noqa: UP045


def spread(numbers: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """So many numbers, of which a CPU's system maps no more than are touched."""
    torch.utils.deterministic.fill_uninitialized_memory = False  # the fixture sets it again
    try:
        return torch.empty(numbers, dtype=dtype, device=device)
    except RuntimeError as error:
        pytest.skip(f"{numbers} numbers of {dtype} cannot be mapped: {error}")


@pytest.mark.parametrize("length", [20, 150])
def test_parts_that_lie_far_apart(length, device):
    """Catches a stride that is multiplied in 32 bits: a read far outside of the tensor."""
    near = torch.randn(length, 3, 1, 16, device=device).half()
    far = spread(2 * FAR + length * 16, torch.float16, device).as_strided(near.shape, (16, FAR, 16, 1)).copy_(near)
    out, sums = packed_attention_forward(far, [1], [length])
    assert torch.equal(out, packed_attention_forward(near, [1], [length])[0])
    assert torch.equal(
        packed_attention_backward(out, far, out, sums, [1], [length]),
        packed_attention_backward(out, near, out, sums, [1], [length]),
    )
    looks = [X.cls_attention(x, [(1, length)], backend="triton") for x in (far, near)]
    assert torch.equal(*looks)


def test_channels_that_lie_far_apart(device):
    """Catches the same of a clip's channels."""
    near = torch.randint(256, (1, 3, 2, 16, 16), dtype=torch.uint8, device=device)
    far = spread(2 * FAR + 512, torch.uint8, device).as_strided(near.shape, (1, FAR, 256, 16, 1)).copy_(near)
    ids = torch.zeros(1, 1, dtype=torch.int64, device=device)
    found = [X.gather_patches(clip, ids, (2, 16, 16), MEAN, STD, backend="triton") for clip in (far, near)]
    assert torch.equal(*found)
