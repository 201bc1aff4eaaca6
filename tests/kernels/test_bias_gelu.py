"""Bias and GELU against the naive twin in float64."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.compare import TOLERANCE, assert_agrees, relative_error
from xkd_kernels import bias_gelu, naive_bias_gelu
from xkd_kernels.bias_gelu import bias_gelu_backward, bias_gelu_forward


def inputs(shape, dtype, device, scale=1.0):
    torch.manual_seed(shape[-1])
    return [(torch.randn(shape, device=device) * scale).to(dtype), torch.randn(shape[-1], device=device)]


def fused(h, bias):
    return bias_gelu(h, bias, backend="triton")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1), (17, 63), (141, 24), (2, 9, 561), (393, 8), (3, 3072)])
def test_agrees_with_the_definition(shape, dtype, device):
    """Catches the tanh approximation (off by 1e-4 in float32), a bias left out, its gradient summed over too few rows."""
    assert_agrees(fused, naive_bias_gelu, inputs(shape, dtype, device), TOLERANCE[dtype])


def test_large_magnitudes(device):
    """Catches 0 · ∞ in the tails."""
    assert_agrees(fused, naive_bias_gelu, inputs((5, 40), torch.float32, device, scale=1e3), TOLERANCE[torch.float32])


def test_strided_inputs_and_torch_backend(device):
    """Catches kernels and fallback that take the input for contiguous."""
    h, bias = inputs((8, 60), torch.float32, device)
    assert_agrees(fused, naive_bias_gelu, [h[::2, ::3], bias[::3]], TOLERANCE[torch.float32])
    assert relative_error(bias_gelu(h, bias), naive_bias_gelu(h, bias)) < TOLERANCE[torch.float32]


def test_hands_out_the_activation_again(device):
    """Catches a recomputed input of the next layer that is not the one of the forward pass."""
    h, bias = inputs((9, 70), torch.bfloat16, device)
    *_, again = bias_gelu_backward(torch.ones_like(h), h, bias, True)
    assert torch.equal(again, bias_gelu_forward(h, bias))


def test_opcheck_and_compile(device):
    """Catches a fake implementation of other shapes and graph breaks."""
    h, bias = (tensor.requires_grad_() for tensor in inputs((3, 5, 24), torch.float32, device))
    torch.library.opcheck(bias_gelu_forward, (h, bias))
    for again in (True, False):
        torch.library.opcheck(bias_gelu_backward, (h.detach(), h.detach(), bias.detach(), again))
    compiled = torch.compile(lambda *t: fused(*t).sum(), fullgraph=True, backend="aot_eager")
    compiled(h, bias).backward()
    assert h.grad.isfinite().all() and bias.grad.isfinite().all()


def test_wrong_shapes_are_refused(device):
    """Catches a bias that would be broadcast."""
    with pytest.raises(ValueError, match=r"\[4, 8\] and \[1\]"):
        bias_gelu(torch.zeros(4, 8, device=device), torch.zeros(1, device=device))
