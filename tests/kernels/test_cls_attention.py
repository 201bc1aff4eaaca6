"""CLS attention against its naive twin in float64."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.compare import TOLERANCE, assert_agrees
from tests.kernels.test_packed_attention import packed
from xkd_kernels import cls_attention, naive_cls_attention
from xkd_kernels.cls_attention import cls_attention_backward, cls_attention_forward


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("segments", "heads", "width"),
    [([(1, 1)], 2, 32), ([(2, 17)], 2, 24), ([(1, 63), (2, 5), (1, 141)], 2, 64), ([(1, 393)], 1, 128), ([(1, 561)], 1, 16)],
)
def test_agrees_with_the_definition(segments, heads, width, dtype, device):
    """Catches another query than the first, a wrong scale, sums beyond the segment, a gradient row left unwritten."""
    qkv = packed(sum(c * n for c, n in segments), heads, width, dtype, device)
    assert_agrees(
        lambda x: cls_attention(x, segments, backend="triton"),
        lambda x: naive_cls_attention(x, segments),
        [qkv],
        TOLERANCE[dtype],
    )


def test_large_magnitudes(device):
    """Catches exponentials without their maximum subtracted."""
    qkv = packed(90, 1, 32, torch.bfloat16, device, scale=30.0)
    assert_agrees(
        lambda x: cls_attention(x, [(1, 90)], backend="triton"),
        lambda x: naive_cls_attention(x, [(1, 90)]),
        [qkv],
        TOLERANCE[torch.bfloat16],
    )


def test_strides_are_read_in_place(device):
    """Catches a kernel that takes the input for contiguous."""
    qkv = packed(60, 4, 32, torch.float32, device)[:, :, 1:3, 4:28][::2]
    assert_agrees(
        lambda x: cls_attention(x, [(2, 15)], backend="triton"),
        lambda x: naive_cls_attention(x, [(2, 15)]),
        [qkv],
        TOLERANCE[torch.float32],
    )


def test_opcheck(device):
    """Catches a fake implementation of other shapes or types."""
    qkv = packed(18, 2, 16, torch.bfloat16, device).requires_grad_()
    torch.library.opcheck(cls_attention_forward, (qkv, [2], [9]))
    probabilities = cls_attention_forward(qkv.detach(), [2], [9])
    torch.library.opcheck(cls_attention_backward, (probabilities, qkv.detach(), probabilities, [2], [9]))


def test_wrong_segments_are_refused(device):
    """Catches rows that nobody writes."""
    with pytest.raises(ValueError, match="make up 18 tokens, but there are 20"):
        cls_attention(torch.zeros(20, 3, 1, 16, device=device), [(2, 9)])
