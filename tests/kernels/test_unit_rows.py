"""Rows of length 1 against the naive twin in float64, and against PyTorch's own normalisation."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.kernels.compare import TOLERANCE, assert_agrees, relative_error
from xkd_kernels import naive_unit_rows, unit_rows
from xkd_kernels.unit_rows import unit_rows_backward, unit_rows_forward


def inputs(shape, dtype, device, *, scale=True):
    torch.manual_seed(shape[1])
    x = torch.randn(shape, device=device).to(dtype)
    return [x, torch.rand(shape[0], 1, device=device) + 0.5] if scale else [x]


def by(backend, **options):
    return lambda *tensors: unit_rows(*tensors, backend=backend, **options)


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(1, 1), (17, 63), (5, 256), (141, 24), (2, 2500)])
def test_agrees_with_the_definition(shape, dtype, backend, device):
    """Catches a length over the padding, a scale left out forward or backward, the part along the row left in its gradient."""
    assert_agrees(by(backend), naive_unit_rows, inputs(shape, dtype, device), TOLERANCE[dtype])
    assert_agrees(by(backend), naive_unit_rows, inputs(shape, dtype, device, scale=False), TOLERANCE[dtype])


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_a_weight_in_the_type_of_products(backend, device):
    """Catches a result in another type, and a gradient rounded to it."""
    weight, scale = inputs((65, 32), torch.float32, device)
    found = unit_rows(weight, scale, dtype=torch.bfloat16, backend=backend)
    assert found.dtype == torch.bfloat16
    assert relative_error(found, scale * F.normalize(weight, dim=-1)) < TOLERANCE[torch.bfloat16]
    assert_agrees(by(backend, dtype=torch.bfloat16), naive_unit_rows, [weight, scale], 5e-3)


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("magnitude", [1e-6, 1e15])
def test_far_from_one(magnitude, backend, device):
    """Catches squares that leave float32's range of accurate numbers."""
    x, scale = inputs((9, 40), torch.float32, device)
    found = unit_rows(x * magnitude, scale, backend=backend)
    assert relative_error(found, naive_unit_rows((x * magnitude).double(), scale.double())) < 1e-6


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_rows_of_nothing(backend, device):
    """Catches 0 / 0, and a gradient through a length that is not divided by."""
    x, scale = inputs((6, 8), torch.float32, device)
    x[2] = 0
    x[4] *= 1e-3
    assert_agrees(by(backend, eps=0.1), lambda *t: naive_unit_rows(*t, eps=0.1), [x, scale], 1e-6)


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_strides_and_float64(backend, device):
    """Catches inputs taken for contiguous, and a replay that is rounded."""
    x, scale = inputs((14, 48), torch.float32, device)
    assert_agrees(by(backend), naive_unit_rows, [x[::2, ::2], scale[::2]], 1e-6)
    wide = [tensor.double() for tensor in inputs((7, 24), torch.float32, device)]
    assert_agrees(by("torch"), naive_unit_rows, wide, 1e-15)


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_a_second_derivative_is_refused(backend, device):
    """Catches one that is wrong without a word: the length would be taken for a constant."""
    x, scale = (tensor.requires_grad_() for tensor in inputs((3, 8), torch.float32, device))
    (first,) = torch.autograd.grad(unit_rows(x, scale, backend=backend).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError):
        first.square().sum().backward()


def test_opcheck_and_compile(device):
    """Catches a fake implementation of other shapes or types and graph breaks."""
    x, scale = (tensor.requires_grad_() for tensor in inputs((5, 24), torch.float32, device))
    for own in (scale, None):
        torch.library.opcheck(unit_rows_forward, (x, own, 1e-12, torch.bfloat16))
        out, inverse = unit_rows_forward(x.detach(), None if own is None else own.detach(), 1e-12, torch.bfloat16)
        torch.library.opcheck(unit_rows_backward, (out, x.detach(), None if own is None else own.detach(), inverse))
    for backend in ("triton", "torch"):
        compiled = torch.compile(lambda *t, backend=backend: by(backend)(*t), fullgraph=True, backend="aot_eager")
        found, expected = (torch.autograd.grad(f(x, scale).square().sum(), (x, scale)) for f in (compiled, by(backend)))
        for mine, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize(
    ("x", "more", "message"),
    [
        (torch.ones(8), {}, r"x has the shape \[8\]"),
        (torch.ones(0, 8), {}, r"x has the shape \[0, 8\]"),
        (torch.ones(4, 8), {"eps": 0.0}, "eps > 0"),
        (torch.ones(4, 8), {"scale": torch.ones(4)}, r"scale has the shape \[4\]; \[4, 1\]"),
        (torch.ones(4, 8, dtype=torch.int32), {}, "x is of type int32"),
        (torch.ones(4, 8), {"dtype": torch.int32}, "dtype = int32"),
        (torch.ones(4, 8), {"scale": torch.ones(4, 1, device="meta")}, "scale is on meta"),
    ],
)
def test_what_does_not_fit_is_refused(x, more, message, backend, device):
    """Catches memory read outside of a tensor, and a scale that would be broadcast."""
    with pytest.raises(ValueError, match=message):
        unit_rows(x.to(device), backend=backend, **more)
