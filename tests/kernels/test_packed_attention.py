"""Packed attention against its naive twin in float64; the interpreter runs the kernels where there is no GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.kernels.compare import TOLERANCE, assert_agrees, relative_error
from xkd_kernels import naive_packed_attention, packed_attention
from xkd_kernels.packed_attention import packed_attention_backward, packed_attention_forward

HALF = (torch.bfloat16, torch.float16)


def packed(tokens: int, heads: int, width: int, dtype: torch.dtype, device: torch.device, scale: float = 1.0) -> Tensor:
    torch.manual_seed(tokens + width)
    return (torch.randn(tokens, 3, heads, width, device=device) * scale).to(dtype)


def check(qkv: Tensor, segments: list[tuple[int, int]], tolerance: float) -> None:
    assert_agrees(
        lambda x: packed_attention(x, segments, backend="triton"),
        lambda x: naive_packed_attention(x, segments),
        [qkv],
        tolerance,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("length", [1, 17, 63, 141])
def test_one_segment(length, dtype, device):
    """Catches wrong masks at the ragged end, a wrong scale, swapped parts, a missing row of the gradient, half-type sums."""
    check(packed(length, 2, 32, dtype, device), [(1, length)], TOLERANCE[dtype])


@pytest.mark.parametrize("length", [393, 561])
def test_long_segments(length, device):
    """Catches a running maximum or sum that is not carried from tile to tile."""
    check(packed(length, 1, 32, torch.bfloat16, device), [(1, length)], TOLERANCE[torch.bfloat16])


@pytest.mark.parametrize("width", [16, 24, 64, 96, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_head_widths(width, dtype, device):
    """Catches columns beyond a width that is no power of two, and one regime's launch that the others' sizes break.

    20 tokens are whole in every type, 70 in half types up to width 64, and 133 in none.
    """
    segments = [(1, 20), (1, 70)] if dtype == torch.float32 else [(1, 20), (1, 70), (1, 133)]
    check(packed(sum(length for _, length in segments), 1, width, dtype, device), segments, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_runs_of_different_lengths(dtype, device):
    """Catches a segment that looks beyond its rows, in either regime, and tables in the wrong order."""
    segments = [(2, 7), (1, 130), (3, 33), (1, 1), (1, 140)]
    check(packed(2 * 7 + 130 + 99 + 1 + 140, 2, 16, dtype, device), segments, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", HALF)
def test_large_magnitudes(dtype, device):
    """Catches exponentials without their maximum subtracted, and padding whose exponential overflows."""
    check(packed(40, 1, 32, dtype, device, scale=30.0), [(2, 20)], TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", HALF)
def test_large_magnitudes_streamed(dtype, device):
    """Catches the same. Rows that look at one key alone leave differences of nearly equal numbers to q and k: those of any
    fused attention, PyTorch's too, are off by far more than a rounding, so it is the measure here."""
    qkv, segments = packed(150, 1, 32, dtype, device, scale=30.0), [(1, 150)]
    results = []
    for backend, x in (("triton", qkv), ("torch", qkv), ("torch", qkv.double())):
        x = x.clone().requires_grad_()
        out = packed_attention(x, segments, backend=backend)
        out.backward(torch.linspace(-1, 1, out.numel(), device=device).view_as(out).to(out.dtype))
        results.append([out, *x.grad.unbind(dim=1)])
    for mine, theirs, exact in zip(*results, strict=True):
        assert relative_error(mine, exact) < TOLERANCE[dtype] + 5 * relative_error(theirs, exact)


@pytest.mark.parametrize("length", [40, 150])
def test_scores_far_below_zero(length, device):
    """Catches masked columns of the backward pass: with scores near −10⁴ the padding's exponential is infinite."""
    qkv = packed(length, 1, 16, torch.float32, device)
    qkv[:, 0], qkv[:, 1] = 60 + qkv[:, 0], -60 + qkv[:, 1]
    # float32 scores of 1.4e4 are good to 1e-3 themselves, and the order of their sums differs between machines and kernels
    check(qkv, [(1, length)], 5e-3)


def test_strides_are_read_in_place(device):
    """Catches a kernel that takes the input for contiguous: here tokens, parts and heads all lie apart."""
    whole = packed(60, 4, 32, torch.float32, device)
    check(whole[:, :, 1:3, 4:28][::2], [(2, 15)], TOLERANCE[torch.float32])
    check(whole.permute(0, 1, 3, 2)[:, :, :16], [(1, 60)], TOLERANCE[torch.float32])


def test_torch_backend_agrees(device):
    """Catches runs split at the wrong rows in the fallback."""
    segments = [(2, 7), (1, 30)]
    qkv = packed(44, 2, 16, torch.float32, device).double()
    assert relative_error(packed_attention(qkv, segments), naive_packed_attention(qkv, segments)) < 1e-12


def test_opcheck_and_compile(device):
    """Catches fake implementations of other shapes or strides, a formula that autograd cannot trace, and graph breaks."""
    for segments in ([(2, 9)], [(1, 9), (1, 133)]):
        counts, lengths = [run[0] for run in segments], [run[1] for run in segments]
        tokens = sum(c * n for c, n in segments)
        qkv = packed(tokens, 2, 16, torch.float32, device).requires_grad_()
        torch.library.opcheck(packed_attention_forward, (qkv, counts, lengths))
        out, sums = packed_attention_forward(qkv.detach(), counts, lengths)
        torch.library.opcheck(packed_attention_backward, (out, qkv.detach(), out, sums, counts, lengths))
    compiled = torch.compile(
        lambda x: packed_attention(x, segments, backend="triton").square().sum(), fullgraph=True, backend="aot_eager"
    )
    compiled(qkv).backward()
    gradient, qkv.grad = qkv.grad, None
    packed_attention(qkv, segments, backend="triton").square().sum().backward()
    assert torch.equal(gradient, qkv.grad)


@pytest.mark.parametrize(
    ("segments", "message"),
    [([(2, 9)], "make up 18 tokens, but there are 20"), ([(0, 9), (1, 20)], "at least 1"), ([(1, 0), (1, 20)], "at least 1")],
)
def test_wrong_segments_are_refused(segments, message, device):
    """Catches rows that nobody writes."""
    with pytest.raises(ValueError, match=message):
        packed_attention(torch.zeros(20, 3, 1, 16, device=device), segments)


def test_wrong_shape_is_refused(device):
    """Catches a projection that was not split into its parts."""
    with pytest.raises(ValueError, match=r"\[20, 48\].*\[tokens, 3, heads, head width\]"):
        packed_attention(torch.zeros(20, 48, device=device), [(1, 20)])
