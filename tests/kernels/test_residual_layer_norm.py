"""Residual sum and LayerNorm against the naive twin in float64."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.compare import TOLERANCE, assert_agrees, relative_error
from xkd_kernels import naive_residual_layer_norm, residual_layer_norm
from xkd_kernels.residual_layer_norm import residual_layer_norm_backward, residual_layer_norm_forward

TYPES = [
    (torch.float32, torch.float32, torch.float32),
    (torch.float32, torch.bfloat16, torch.bfloat16),  # as under autocast
    (torch.float32, torch.float16, torch.float16),
    (torch.bfloat16, torch.bfloat16, torch.bfloat16),
]


def inputs(shape, stream, branch, device, scale=1.0, offset=0.0):
    torch.manual_seed(shape[-1])
    x = (torch.randn(shape, device=device) * scale + offset).to(stream)
    return [x, torch.randn(shape, device=device).to(branch), *torch.randn(2, shape[-1], device=device).unbind()]


def fused(dtype):
    return lambda *tensors: residual_layer_norm(*tensors, 1e-5, dtype=dtype, backend="triton")


def naive(*tensors):
    return naive_residual_layer_norm(*tensors, 1e-5)


@pytest.mark.parametrize(("stream", "branch", "dtype"), TYPES)
@pytest.mark.parametrize("shape", [(1, 1), (17, 63), (141, 24), (2, 9, 141), (561, 8), (3, 768), (2, 2500)])
def test_agrees_with_the_definition(shape, stream, branch, dtype, device):
    """Catches a mean over the padding, a branch or stream gradient left out, sums of the weight's gradient that lose rows."""
    tolerance = max(TOLERANCE[stream], TOLERANCE[dtype])
    assert_agrees(fused(dtype), naive, inputs(shape, stream, branch, device), tolerance)


def test_more_rows_than_programs(device):
    """Catches a walk over the rows that stops after the first round or overlaps."""
    tensors = inputs((393, 20), torch.float32, torch.float32, device)
    assert_agrees(fused(torch.float32), naive, tensors, 2 * TOLERANCE[torch.float32])


def test_statistics_far_from_zero(device):
    """Catches a variance as the difference of two large numbers: at a mean of 1000 that loses half the digits."""
    tensors = inputs((17, 100), torch.float32, torch.float32, device, offset=1000.0)
    assert_agrees(fused(torch.float32), naive, tensors, 1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e-6, 1e4])
def test_magnitudes(scale, dtype, device):
    """Catches squares that leave the range of their type, and eps added to the deviation instead of the variance."""
    tensors = inputs((17, 100), dtype, dtype, device, scale=scale)
    tensors[1] = (tensors[1] * scale).to(dtype)
    assert_agrees(fused(dtype), naive, tensors, 2 * TOLERANCE[dtype])


def test_each_output_alone_can_be_differentiated(device):
    """Catches a missing gradient taken for one of NaN, and the sum's own gradient sent through the norm."""
    tensors = inputs((5, 24), torch.float32, torch.bfloat16, device)
    assert_agrees(lambda *x: fused(torch.float32)(*x)[1], lambda *x: naive(*x)[1], tensors, 7e-3)
    x, branch = (tensor.clone().requires_grad_() for tensor in tensors[:2])
    fused(torch.float32)(x, branch, *tensors[2:])[0].sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x)) and torch.equal(branch.grad, torch.ones_like(branch))


def test_hands_out_the_normalised_sum_again(device):
    """Catches a recomputed input of the next layer that is not the one of the forward pass."""
    x, branch, weight, bias = inputs((17, 63), torch.float32, torch.bfloat16, device)
    total, normalised, mean, inverse = residual_layer_norm_forward(x, branch, weight, bias, 1e-5, torch.bfloat16)
    *_, again = residual_layer_norm_backward(
        None, normalised, total, mean, inverse, weight, bias, torch.bfloat16, torch.bfloat16
    )
    assert relative_error(again, normalised) < 1e-3  # a last bit of bfloat16 here and there


def test_strided_inputs_and_torch_backend(device):
    """Catches kernels and fallback that take inputs for contiguous, or return other types."""
    x, branch, weight, bias = inputs((10, 48), torch.float32, torch.bfloat16, device)
    strided = [x[::2, ::2], branch[::2, ::2], weight[::2], bias[::2]]
    assert_agrees(fused(torch.float32), naive, strided, 7e-3)
    for mine, theirs in zip(residual_layer_norm(*strided, dtype=torch.bfloat16), naive(*strided), strict=True):
        assert relative_error(mine, theirs) < 7e-3
    assert residual_layer_norm(*strided, dtype=torch.bfloat16)[1].dtype == torch.bfloat16


def test_opcheck_and_compile(device):
    """Catches a fake implementation of other shapes or types, aliased outputs and graph breaks."""
    tensors = inputs((3, 5, 24), torch.float32, torch.bfloat16, device)
    differentiated = [tensor.requires_grad_() for tensor in tensors]
    torch.library.opcheck(residual_layer_norm_forward, (*differentiated, 1e-5, torch.bfloat16))
    x, branch, weight, bias = (tensor.detach() for tensor in tensors)
    total, normalised, mean, inverse = residual_layer_norm_forward(x, branch, weight, bias, 1e-5, torch.bfloat16)
    for to_total, again in ((total, torch.bfloat16), (None, None)):
        arguments = (to_total, normalised, total, mean, inverse, weight, bias, torch.bfloat16, again)
        torch.library.opcheck(residual_layer_norm_backward, arguments)
    compiled = torch.compile(lambda *t: sum(o.float().sum() for o in fused(None)(*t)), fullgraph=True, backend="aot_eager")
    compiled(*differentiated).backward()
    assert all(tensor.grad is not None and tensor.grad.isfinite().all() for tensor in differentiated)


def test_wrong_shapes_are_refused(device):
    """Catches a branch that would be broadcast."""
    with pytest.raises(ValueError, match=r"\[4, 8\], \[1, 8\], \[8\], \[8\]"):
        residual_layer_norm(*(torch.zeros(shape, device=device) for shape in ((4, 8), (1, 8), (8,), (8,))))
