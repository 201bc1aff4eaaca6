"""Refinement against the naive twin in float64."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.compare import assert_agrees, relative_error
from xkd_fast import reference
from xkd_kernels import naive_refine, refine
from xkd_kernels.refine import refine_forward

MODES = ["mean", "softmax"]
BACKENDS = ["triton", "torch"]


def looks(clips, heads, patches, device):
    """As attention of CLS leaves them: slices of [heads, tokens], of one sharp head and others."""
    of_tokens = torch.randn(heads, clips, 1 + patches) * torch.linspace(0.2, 4, heads)[:, None, None]
    return of_tokens.softmax(dim=-1).to(device).transpose(0, 1)[:, :, 1:]


def inputs(shape, dtype, device, scale=1.0):
    """Tokens behind a CLS token; their mean is not small beside them, or an error of it would look larger than it is."""
    clips, heads, patches, others, width = shape
    torch.manual_seed(width)
    tokens = (torch.randn(clips, 1 + patches, width) + torch.randn(width)) * scale
    return [tokens.to(device, dtype)[:, 1:], looks(clips, heads, patches, device), looks(clips, heads, others, device)]


def by(backend, mode):
    return lambda *x: refine(*x, mode, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1, 1), (2, 3, 17, 63, 24), (3, 2, 63, 17, 141), (2, 12, 141, 130, 96), (1, 5, 393, 9, 768)]
)
def test_agrees_with_the_definition(shape, mode, backend, device):
    """Catches padding heads, patches or channels that count, own and other confused, a mean of the wrong number."""
    assert_agrees(
        by(backend, mode), lambda *x: naive_refine(*x, mode), inputs(shape, torch.float32, device), 2e-6, gradients=False
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_tokens(dtype, mode, backend, device):
    """Catches sums or weights in the type of tokens or looks: the results are float32 and as exact."""
    tokens, *both = inputs((2, 3, 63, 20, 48), dtype, device)
    tensors = [tokens, *(x.to(dtype) for x in both)]
    found = by(backend, mode)(*tensors)
    assert all(x.dtype == torch.float32 for x in found)
    assert_agrees(by(backend, mode), lambda *x: naive_refine(*x, mode), tensors, 2e-6, gradients=False)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", MODES)
def test_large_numbers(mode, backend, device):
    """Catches a softmax without its maximum, where exp overflows, and one whose maximum is that of the first columns alone."""
    tokens, own, other = inputs((2, 3, 300, 20, 24), torch.float32, device, scale=1e4)
    own = own * torch.linspace(1, 1e4, 300, device=device)
    assert_agrees(by(backend, mode), lambda *x: naive_refine(*x, mode), [tokens, own, other * 30], 5e-5, gradients=False)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", MODES)
def test_in_place_in_whatever_strides(mode, backend, device):
    """Catches looks or tokens taken for contiguous."""
    tokens, own, other = inputs((2, 3, 30, 20, 24), torch.float32, device)
    strided = [tokens[:, ::2, ::2], own.transpose(1, 2).contiguous().transpose(1, 2)[:, ::2, ::2], other[:, ::2, ::3]]
    assert_agrees(by(backend, mode), lambda *x: naive_refine(*x, mode), strided, 2e-6, gradients=False)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_step_of_the_teachers(backend, device):
    """Catches another definition than the reference's, and an energy that is not the plain mean's."""
    for mode in MODES:
        tokens, own, other = inputs((2, 3, 17, 20, 24), torch.float32, device)
        pooled, weights = refine(tokens, own, other, mode, backend=backend)
        expected = reference.refinement_weights(own.double(), other.double(), mode)
        assert relative_error(weights, expected) < 1e-6
        assert relative_error(pooled, reference.refine(tokens.double(), expected).mean(dim=1)) < 1e-6
        torch.testing.assert_close(pooled.norm(dim=-1), tokens.mean(dim=1).norm(dim=-1), rtol=1e-5, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", MODES)
def test_not_rounded_under_autocast(mode, backend, device):
    """Catches the weighted sum as a product in bfloat16: off by 2e-3."""
    tensors = inputs((4, 3, 50, 20, 96), torch.float32, device)
    exact = naive_refine(*(x.double() for x in tensors), mode)
    with torch.autocast(device.type, torch.bfloat16):
        found = refine(*tensors, mode, backend=backend)
    for mine, theirs in zip(found, exact, strict=True):
        assert mine.dtype == torch.float32 and relative_error(mine, theirs) < 2e-6


@pytest.mark.parametrize("mode", MODES)
def test_torch_is_float64_of_float64_and_differentiable(mode, device):
    """Catches a replay in float64 that is float32 inside, and gradients that end here."""
    tensors = [x.double() for x in inputs((2, 3, 7, 5, 6), torch.float32, device)]
    for found, exact in zip(refine(*tensors, mode), naive_refine(*tensors, mode), strict=True):
        assert found.dtype == torch.float64 and relative_error(found, exact) < 1e-13
    assert torch.autograd.gradcheck(by("torch", mode), [x.contiguous().requires_grad_() for x in tensors])


def test_a_gradient_is_no_kernels_business(device):
    """Catches a result without a gradient where one is wanted, unless nobody asked for this very kernel."""
    tokens, *both = inputs((2, 3, 7, 5, 6), torch.float32, device)
    tokens = tokens.detach().requires_grad_()
    with pytest.raises(NotImplementedError, match=r"refine's kernel has no gradient: call it under torch\.no_grad"):
        refine(tokens, *both, backend="triton")
    refine(tokens, *both)[0].sum().backward()
    assert tokens.grad.abs().sum() > 0
    with torch.no_grad():
        assert not refine(tokens, *both, backend="triton")[0].requires_grad


def test_opcheck_and_compile(device):
    """Catches a fake implementation of other shapes, aliased outputs and graph breaks."""
    torch._dynamo.reset()
    tensors = inputs((2, 3, 17, 9, 24), torch.bfloat16, device)
    for mode in MODES:
        torch.library.opcheck(refine_forward, (*tensors, mode))
        for backend in BACKENDS:
            compiled = torch.compile(by(backend, mode), fullgraph=True, backend="aot_eager")
            for mine, theirs in zip(compiled(*tensors), by(backend, mode)(*tensors), strict=True):
                torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
def test_wrong_inputs_are_refused(backend, device):
    """Catches looks at other patches, which would be broadcast or read beyond their end, and a mode that is none."""
    tokens, own, other = inputs((2, 3, 7, 5, 6), torch.float32, device)
    for wrong in ((tokens[:, 1:], own, other), (tokens, own[:1], other), (tokens, own, other[:, 1:]), (tokens[0], own, other)):
        with pytest.raises(ValueError, match=r"but \[B, N, D\], \[B, h, N\] and \[B, h, M\] are wanted"):
            refine(*wrong, backend=backend)
    with pytest.raises(ValueError, match="mode = 'max' is not one of mean, softmax"):
        refine(tokens, own, other, "max", backend=backend)
