"""Every attention backend gives each packed sequence its own attention, and no other's."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from tests.tiny import random_batch, tiny_options
from xkd_fast.analysis.kept import Kept
from xkd_fast.errors import UserError
from xkd_fast.model import attention as module
from xkd_fast.model import products
from xkd_fast.model.attention import PLAIN, automatic, block_diagonal, choose, eager, group_by_group
from xkd_fast.model.build import build_model
from xkd_fast.model.options import DecoderOptions, ModelOptions
from xkd_fast.model.packing import Group, joined
from xkd_kernels import Choice

HEADS, WIDTH = 3, 8
GROUPS = [Group(2, 5), Group(1, 17), Group(3, 1)]


def one_by_one(qkv: Tensor) -> Tensor:
    """Attention of every sequence by itself, in float64, as it is written in the textbook."""
    mixed = []
    for sequence in qkv.double().split([group.length for group in GROUPS for _ in range(group.sequences)]):
        q, k, v = sequence.view(len(sequence), 3, HEADS, WIDTH).permute(1, 2, 0, 3)
        mixed.append(((q @ k.mT / WIDTH**0.5).softmax(dim=-1) @ v).transpose(0, 1).flatten(1))
    return joined(mixed)


def packed(dtype: torch.dtype) -> Tensor:
    """Random projections of packed sequences."""
    rows = sum(group.rows for group in GROUPS)
    return torch.randn(rows, 3 * HEADS * WIDTH, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()


@pytest.mark.parametrize(("dtype", "error"), ((torch.float32, 2e-6), (torch.bfloat16, 2e-2)))
@pytest.mark.parametrize("attend", (*PLAIN.values(), automatic))
def test_each_sequence_attends_to_itself(attend, dtype: torch.dtype, error: float) -> None:
    """Red if sequences mix, heads are mistaken for widths, or a backend's gradients are not those of its numbers."""
    qkv, exact = packed(dtype), packed(torch.float64)
    got, expected = group_by_group(attend)(qkv, GROUPS, HEADS), one_by_one(exact)
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    (got * weight).sum().backward()
    (expected * weight).sum().backward()
    assert got.dtype == dtype and (got - expected).abs().max() < error * expected.abs().max()
    assert qkv.grad is not None and exact.grad is not None
    assert (qkv.grad - exact.grad).abs().max() < 2 * error * exact.grad.abs().max()


@pytest.mark.parametrize("has_matrix_unit", (False, True))
@pytest.mark.parametrize("length", (31, 32, 33, 128, 141))
def test_teachers_tiles_are_whole(length: int, has_matrix_unit: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Red if keys that fill a tile up take part, or if a real key, or a last and shorter tile of queries, is left out."""
    monkeypatch.setattr(module, "HAS_MATRIX_UNIT", has_matrix_unit)
    q, k, v = torch.randn(3, 2, HEADS, length, WIDTH, generator=torch.Generator().manual_seed(0)).bfloat16()
    exact = eager(q.double(), k.double(), v.double())
    torch.testing.assert_close(automatic(q, k, v).double(), exact, rtol=1e-2, atol=8e-3)
    assert (automatic(q[:, :, :1], k, v).double() - exact[:, :1]).abs().max() < 1e-2


@pytest.mark.parametrize(("length", "keeps_matrix"), ((64, True), (561, True), (785, False)))
def test_the_matrix_of_long_sequences_is_not_kept(length: int, keeps_matrix: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Red if ``auto`` keeps a matrix whose bytes grow with the square of a long sequence, or makes a short one's twice."""
    monkeypatch.setattr(products, "LACKS_BFLOAT16", False)  # whatever processor this is
    q, k, v = torch.randn(3, 1, 1, length, 8).bfloat16().requires_grad_()
    kept = Kept()
    kept.count(lambda: automatic(q, k, v).sum())
    assert (sum(kept.bytes.values()) >= 2 * length**2) == keeps_matrix


@pytest.mark.parametrize(("dtype", "error"), ((torch.float32, 2e-6), (torch.bfloat16, 2e-2)))
def test_triton_takes_packed_sequences_in_one_call(dtype: torch.dtype, error: float) -> None:
    """Red if groups reach our kernels in another order, or heads are mistaken for widths."""
    attention = choose("triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    qkv, exact = packed(dtype).detach().to(device).requires_grad_(), packed(torch.float64)
    got, expected = attention.attend_packed(qkv, GROUPS, HEADS), one_by_one(exact)
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    (got * weight.to(device)).sum().backward()
    (expected * weight).sum().backward()
    assert got.dtype == dtype and (got.cpu() - expected).abs().max() < error * expected.abs().max()
    assert qkv.grad is not None and exact.grad is not None
    assert (qkv.grad.cpu() - exact.grad).abs().max() < 2 * error * exact.grad.abs().max()


def test_triton_without_a_gpu_says_how_to_run_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Red if the choice falls back silently, or fails with a traceback out of Triton."""
    import triton

    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    if torch.cuda.is_available():
        pytest.skip("needs a machine without a GPU")
    with pytest.raises(UserError, match=r"model\.attention = triton cannot run here: .*TRITON_INTERPRET=1.*; use sdpa or auto"):
        choose("triton")


class DenseMask:
    """What stands in for xformers' mask where its binary does not run: the lengths, made dense."""

    def __init__(self, lengths: list[int]) -> None:
        blocks = [torch.ones(length, length, dtype=torch.bool) for length in lengths]
        self.dense = torch.block_diag(*blocks).bool()

    @classmethod
    def from_seqlens(cls, lengths: list[int], *, device: torch.device) -> DenseMask:
        """As xformers' mask is made."""
        assert device.type == "cpu"
        return cls(lengths)


def dense_attention(q: Tensor, k: Tensor, v: Tensor, attn_bias: DenseMask | None = None) -> Tensor:
    """xformers' contract: [B, n, h, d] each → [B, n, h, d]."""
    mask = None if attn_bias is None else attn_bias.dense
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


def test_a_block_diagonal_mask_packs_all_groups_into_one_call() -> None:
    """Red if tensors reach xformers in another layout than its contract's, or the mask's blocks are not the sequences."""
    masks = SimpleNamespace(attn_bias=SimpleNamespace(BlockDiagonalMask=DenseMask))
    operators = SimpleNamespace(memory_efficient_attention=dense_attention, fmha=masks)
    attend, attend_packed = block_diagonal(operators)
    qkv = packed(torch.float32)
    torch.testing.assert_close(attend_packed(qkv, GROUPS, HEADS).double(), one_by_one(qkv), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(group_by_group(attend)(qkv, GROUPS, HEADS).double(), one_by_one(qkv), rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_xformers_on_a_gpu() -> None:
    """Red if its block-diagonal attention differs from the textbook's."""
    pytest.importorskip("xformers")
    qkv = packed(torch.bfloat16).detach().cuda()
    try:
        attention = choose("xformers")
    except UserError as error:
        pytest.skip(str(error))
    got = attention.attend_packed(qkv, GROUPS, HEADS)
    torch.testing.assert_close(got.double().cpu(), one_by_one(qkv.cpu()), rtol=3e-2, atol=3e-2)


def test_xformers_is_not_compiled() -> None:
    """Red if the pair is only refused by the compiler, at the first step and with its traceback."""
    with pytest.raises(ValueError, match=r"cannot compile model\.attention = xformers.*use auto or sdpa"):
        ModelOptions(compile=True, attention="xformers")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"variant": "mas", "cls_token": False},
        {"variant": "mats", "teacher_view": "local"},
        {"decoder": DecoderOptions(width=8, depth=1, heads=2)},
    ],
)
def test_a_run_tells_who_attends_at_every_shape(changes: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """Red if auto takes our kernel at a shape that the run's description leaves out, or tells one that nobody asks for."""
    options = tiny_options(attention="auto", **changes)
    asked = []

    def wants(operator: str, kernels: str, x: Tensor, shape: str) -> bool:
        asked.append((operator, shape))
        return False

    monkeypatch.setattr(module, "wants", wants)
    model = build_model(options, seed=0)
    model(*random_batch(options, 2, dtype=torch.float32))
    shapes = {shape for operator, shape in asked if operator == "packed_attention"}
    told = []

    def choice(operator: str, device: torch.device, dtype: torch.dtype, shape: str) -> Choice:
        told.append((operator, dtype, shape))
        return Choice("triton" if len(told) == 1 else "torch", "measured")

    monkeypatch.setattr(module, "choose_kernel", choice)
    lines = module.described(choose("auto"), options, torch.device("cuda"), torch.bfloat16)
    assert set(told) == {("packed_attention", torch.bfloat16, shape) for shape in shapes}
    assert lines[0] == f"attention: triton, measured: {told[0][2]}"
    assert [line.split(", measured: ")[0] for line in lines[1:]] == ["attention: sdpa"] * (len(told) > 1)
    (line,) = module.described(choose("auto"), options, torch.device("cpu"), torch.bfloat16)
    assert line.startswith("attention: sdpa, but for bfloat16 on a CPU")
    assert module.described(choose("eager"), options, torch.device("cuda"), torch.float32) == ["attention: eager, asked for"]
