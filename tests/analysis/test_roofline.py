"""What operators move and compute, counted by the code beside what was counted by hand."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

import xkd_kernels as kernels
from benchmarks.kernel_cases import CASES
from benchmarks.roofline import KINDS, floors, kind_of, step_costs
from xkd_fast.analysis.flops import flop_counter, step_flops, total
from xkd_fast.analysis.roofline import DEVICES, SHEETS, Cost, Device, Traffic, cost, patches_read, touched
from xkd_fast.model.options import EncoderOptions, ModelOptions

ROOT = Path(__file__).resolve().parents[2]
HALF = torch.bfloat16


def moved(*tensors: tuple[int, int]) -> Cost:
    """Of (numbers, bytes of each) tensors whose bytes are multiples of 32."""
    amount = sum(numbers * size for numbers, size in tensors)
    return Cost(amount, amount // 32)


def test_operators_read_and_write_once() -> None:
    """Red if an input, an output or an in-place operator's second pass is left out, or a view or an unread target is not."""
    a, b = torch.zeros(8, 16), torch.zeros(1, 16)
    assert cost(lambda: (a + b) * 2) == moved((128, 4), (16, 4), (128, 4)) + moved((128, 4), (128, 4)) + Cost(others=256)
    assert cost(lambda: a.mul_(a)) == moved((128, 4), (128, 4)) + Cost(others=128)
    assert cost(lambda: a.copy_(b.expand(8, 16))) == moved((16, 4), (128, 4)) + Cost(others=128)
    assert cost(lambda: a.view(-1).t().unsqueeze(0)) == cost(lambda: torch.empty(64)) == Cost()
    assert cost(lambda: a[:4].clone()) == moved((64, 4), (64, 4)) + Cost(others=64)


def test_a_selection_reads_what_it_copies() -> None:
    """Red if a table of which a few rows are taken counts as read."""
    table, ids = torch.zeros(1000, 16), torch.zeros(8, dtype=torch.int64)
    once = moved((8, 8), (128, 4), (128, 4))
    for found in (cost(lambda: table[ids]), cost(lambda: F.embedding(ids, table))):
        assert (found.bytes, found.sectors) == (once.bytes, once.sectors)


def test_products_are_those_of_the_flop_counter() -> None:
    """Red if a matrix product, or a backward pass, is missed."""

    def work() -> None:
        x, w = (torch.ones(12, 12, requires_grad=True) for _ in range(2))
        torch.baddbmm(torch.zeros(3, 12, 12), (x @ w).expand(3, 12, 12), torch.ones(3, 12, 12)).sum().backward()

    with flop_counter() as counted:
        work()
    assert cost(work).products == counted.get_total_flops() > 0


def test_what_our_operators_cost() -> None:
    """Red if a tensor that a kernel reads or writes is left out, or what it leaves alone is not."""
    rows, width, hidden, size = 64, 96, 128, 32
    with FakeTensorMode():
        x, branch = torch.empty(rows, width), torch.empty(rows, width, dtype=HALF)
        weight, bias = torch.empty(width), torch.empty(width)
        norm = cost(lambda: kernels.residual_layer_norm(x, branch, weight, bias, dtype=HALF, backend="triton"))
        h, shift = torch.empty(rows, hidden, dtype=HALF), torch.empty(hidden)
        gelu = cost(lambda: kernels.bias_gelu(h, shift, backend="triton"))
        qkv = torch.empty(rows, 3, 3, size, dtype=HALF)
        mixed = cost(lambda: kernels.packed_attention(qkv, [(2, 24), (1, 16)], backend="triton"))
        looks = cost(lambda: kernels.cls_attention(qkv, [(2, 24), (1, 16)], backend="triton"))
    number, squares = rows * width, 2 * 24**2 + 16**2
    expected = moved((number, 4), (number, 2), (2 * width, 4), (number, 4), (number, 2), (2 * rows, 4))
    assert (norm.bytes, norm.sectors) == (expected.bytes, expected.sectors)
    expected = moved((rows * hidden, 2), (hidden, 4), (rows * hidden, 2))
    assert (gelu.bytes, gelu.sectors) == (expected.bytes, expected.sectors)
    expected = moved((rows * 9 * size, 2), (rows * 3 * size, 2))
    assert (mixed.bytes, mixed.sectors, mixed.products) == (expected.bytes, expected.sectors, 4 * squares * 3 * size)
    expected = moved((rows * 3 * size, 2), (3 * 3 * size, 2), (3 * rows, 4))
    assert (looks.bytes, looks.sectors) == (expected.bytes, expected.sectors)


def test_what_objectives_and_refinement_cost() -> None:
    """Red if targets are counted as written, CLS tokens as read, or the backward pass does not read the clip again."""
    count, numbers = 4 * 8, 64
    with FakeTensorMode():
        predicted = torch.empty(4, 8, numbers, dtype=HALF, requires_grad=True)
        clip, ids = torch.empty(4, 1, 16, 64), torch.empty(4, 8, dtype=torch.int64)
        with Traffic() as traffic:
            kernels.masked_patch_loss(predicted, clip, ids, (4, 16), backend="triton").backward()
        looks = [torch.empty(4, 2, patches) for patches in (16, 24)]
        refined = cost(lambda: kernels.refine(torch.empty(4, 17, 32)[:, 1:], *looks, backend="triton"))
    once = count * (numbers * (2 + 4) + 8 + 2 * 4) + 4  # predictions, patches, ids, two numbers of each patch; the loss
    assert traffic.costs["xkd_kernels.masked_patch_loss"].bytes == once
    assert traffic.costs["xkd_kernels.masked_patch_loss_backward"].bytes == once + count * numbers * 2
    assert refined.bytes == 4 * 4 * (16 * 32 + 2 * 16 + 2 * 24 + 32 + 16)


def test_backward_passes_of_our_operators() -> None:
    """Red if the gradient, what was kept, or a result is left out, or an attention product is."""
    rows, size, lengths = 320, 32, [(1, 320)]
    with FakeTensorMode():
        for segments, each, sums in ((lengths, 14, 3 * rows * 4), ([(5, 64)], 10, 0)):
            qkv = torch.empty(rows, 3, 3, size, dtype=HALF, requires_grad=True)
            out = kernels.packed_attention(qkv, segments, backend="triton")
            with Traffic() as traffic:
                out.backward(torch.empty_like(out))
            found = traffic.costs["xkd_kernels.packed_attention_backward"]
            streamed = 2 * rows * 3 * size if sums else 0  # the output is read again
            assert found.bytes == 2 * (2 * rows * 9 * size) + 2 * rows * 3 * size + streamed + sums
            squares = sum(count * length**2 for count, length in segments)
            assert found.products == each * squares * 3 * size


def test_segments_of_both_regimes_in_one_call() -> None:
    """Red if whole segments are taken to make their scores twice where another one is streamed."""
    with FakeTensorMode():
        qkv = torch.empty(500, 3, 3, 32, dtype=HALF, requires_grad=True)
        out = kernels.packed_attention(qkv, [(5, 60), (1, 200)], backend="triton")
        with Traffic() as traffic:
            out.backward(torch.empty_like(out))
    found = traffic.costs["xkd_kernels.packed_attention_backward"]
    assert found.products == (10 * 5 * 60**2 + 14 * 200**2) * 3 * 32


def test_backward_passes_of_cls_attention_and_gather() -> None:
    """Red if they are counted as elementwise operators: what they leave alone read, or what they add to only written."""
    with FakeTensorMode():
        qkv = torch.empty(64, 3, 3, 32, dtype=HALF, requires_grad=True)
        looks = kernels.cls_attention(qkv, [(2, 24), (1, 16)], backend="triton")
        clip = torch.empty(2, 3, 8, 32, 48, dtype=HALF, requires_grad=True)
        patches = kernels.gather_patches(clip, torch.zeros(2, 5, dtype=torch.int64), (4, 16, 16), backend="triton")
        with Traffic() as traffic:
            torch.autograd.backward([looks, patches], [torch.empty_like(looks), torch.empty_like(patches)])
    found = traffic.costs["xkd_kernels.cls_attention_backward"]
    expected = moved((3 * 64, 4), (3 * 64, 4), (64 * 3 * 32, 2), (64 * 9 * 32, 2), (3 * 3 * 32, 2))
    assert (found.bytes, found.sectors, found.products) == (expected.bytes, expected.sectors, 0)
    assert found.others == (3 * 32 + 5) * 3 * 64
    found, numbers = traffic.costs["xkd_kernels.gather_patches_backward"], 10 * 3072
    pixels = 2 * 3 * 8 * 32 * 48
    expected = moved((numbers, 4), (10, 8), (pixels, 4), (numbers, 4), (numbers, 4), (pixels, 4), (pixels, 2))
    assert found.bytes == expected.bytes and found.sectors == expected.sectors + 1  # 80 bytes of ids are 3 sectors


@pytest.mark.parametrize(
    ("name", "sheet"),
    [("NVIDIA H100 80GB HBM3", "H100"), ("NVIDIA H100 PCIe", None), ("NVIDIA GH200 480GB", None), ("NVIDIA H200", "H200")],
)
def test_a_data_sheet_is_that_of_the_very_device(name: str, sheet: str | None) -> None:
    """Red if a device is held against another one's limits, whose name is part of its own."""
    assert SHEETS.get(name) == sheet and set(SHEETS.values()) == set(DEVICES)


@pytest.mark.parametrize(("channels_last", "sectors"), [(True, 2), (False, 3)])
def test_sectors_of_a_patch(channels_last: bool, sectors: int) -> None:
    """Red if bytes are taken for sectors: a row of 16 pixels of three 8-bit channels is 48 bytes either way."""
    clip = torch.empty(2, 3, 8, 112, 112, dtype=torch.uint8)
    clip = torch.empty(2, 8, 112, 112, 3, dtype=torch.uint8).permute(0, 4, 1, 2, 3) if channels_last else clip
    found = patches_read(clip, 10, (4, 16, 16))
    assert found == Cost(10 * 4 * 16 * 48, 10 * 4 * 16 * sectors)


def test_touched_sectors() -> None:
    """Red if a run that begins in the middle of a sector, or ends in one, is counted too low or too high."""
    assert touched([0], 32) == 1 and touched([16], 16) == 1 and touched([16], 17) == 2 and touched([31], 2) == 2
    assert touched([0, 16, 32], 48) == 6


def test_time_is_that_of_the_tighter_limit() -> None:
    """Red if memory and arithmetic are added, or units are confused."""
    device = Device(bandwidth=1e12, matrix=1e14, scalar=1e13)
    assert Cost(sectors=10**9 // 32, products=10**11).seconds(device) == pytest.approx(1e-3, rel=1e-6)
    assert Cost(sectors=10, products=10**12, others=10**11).seconds(device) == pytest.approx(2e-2, rel=1e-6)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_fused_operators_move_less_than_their_twins(case) -> None:
    """Red if a case is not counted, or a fused operator has lost its point."""
    rows = {(row.way, row.code): row for row in floors(case, clips=2)}
    ways = {way for way, _ in rows}
    assert ways == ({"forward", "backward"} if case.inputs(1, torch.device("cpu"))[0].requires_grad else {"forward"})
    for way in ways:
        fused, naive = rows[way, "fused"], rows[way, "naive"]
        assert 0 < fused.cost.bytes < 0.5 * naive.cost.bytes
        assert fused.cost.bytes <= 32 * fused.cost.sectors < 1.4 * fused.cost.bytes
        assert fused.seconds == {name: fused.cost.seconds(device) for name, device in DEVICES.items()}


def test_the_whole_step() -> None:
    """Red if a part of the step is not counted, ends up in another kind, or our operators move more than PyTorch's."""
    options = ModelOptions(encoder=EncoderOptions(768, 3, 12))
    torch_step, ours = (step_costs(options, kernels, clips=2) for kernels in ("torch", "triton"))
    one_clip = [step_costs(options, kernels, clips=1) for kernels in ("torch", "triton")]
    assert set(torch_step) == set(KINDS) - {"patches"} and set(ours) <= set(KINDS)
    expected = total(step_flops(options)).total
    for costs in (torch_step, ours):
        assert sum(cost.products for cost in costs.values()) == pytest.approx(2 * expected, rel=0.02)
    fewer = torch_step["matrix products"].products - ours["matrix products"].products  # the teachers' CLS rows
    assert 0 < fewer < 1e-4 * expected
    kinds = ("sums and norms", "GELU", "casts, copies, concatenations", "other elementwise operators and sums")
    moved = [
        sum(two[kind].bytes - one[kind].bytes for kind in kinds if kind in two)
        for two, one in zip((torch_step, ours), one_clip, strict=True)
    ]
    assert moved[1] < 0.65 * moved[0]  # for each clip more: the optimiser and the weights' casts cost the same for any number


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("aten.addmm", "matrix products"),
        ("aten.bmm", "matrix products"),
        ("aten.native_layer_norm_backward", "sums and norms"),
        ("xkd_kernels.bias_gelu_backward", "GELU"),
        ("aten._scaled_dot_product_flash_attention_for_cpu", "attention"),
        ("aten.add", "other elementwise operators and sums"),
    ],
)
def test_kinds(name: str, kind: str) -> None:
    """Red if an operator is told as another kind."""
    assert kind_of(name) == kind


def test_the_command_prints_them() -> None:
    """Red if the command fails on a machine without a GPU, or its numbers are not the operator's."""
    command = [sys.executable, "-m", "benchmarks.roofline", "--json", "--case", "bias_gelu, student audio", "--clips", "3"]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    (forward,) = [row for row in json.loads(printed) if (row["way"], row["code"]) == ("forward", "fused")]
    assert forward["cost"]["bytes"] == 2 * (3 * 254 * 3072 * 2) + 3072 * 4
    assert forward["seconds"]["H100"] == pytest.approx(forward["cost"]["sectors"] * 32 / 3.35e12)
