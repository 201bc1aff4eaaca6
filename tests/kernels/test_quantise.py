"""Rows in E4M3, alone and fused, and the linear layer that takes them, against their naive twins in float64."""

from __future__ import annotations

import logging
import sys

import pytest
import torch

import xkd_kernels as X
from tests.kernels.compare import relative_error
from xkd_kernels.quantise import bias_gelu_fp8_forward, quantise_rows_forward, residual_layer_norm_fp8_forward

LINEAR = sys.modules["xkd_kernels.fp8_linear"]  # as an attribute of the package it is the function
E4M3, INFINITY = torch.float8_e4m3fn, torch.tensor(torch.inf, device="cpu")
FLIPS = 3e-3  # share of numbers so near the middle between two of E4M3 that a factor for a division rounds them otherwise
OPERATORS = {
    "quantise": (X.quantise_rows, X.naive_quantise_rows, 1),
    "norm": (X.residual_layer_norm_fp8, lambda *x: X.naive_residual_layer_norm_fp8(*x, 1e-5), 4),
    "first norm": (
        lambda x, *more, **who: X.residual_layer_norm_fp8(x, None, *more, **who),
        lambda x, *more: X.naive_residual_layer_norm_fp8(x, None, *more, 1e-5),
        3,
    ),
    "gelu": (X.bias_gelu_fp8, X.naive_bias_gelu_fp8, 2),
}


def inputs(name, shape, dtype, device, spread=1.0):
    """As many as the operator takes; rows differ by orders of magnitude."""
    torch.manual_seed(shape[-1])
    rows = torch.randn(shape, device=device) * torch.randn((*shape[:-1], 1), device=device).mul(spread).exp()
    branch = [torch.randn(shape, device=device).to(dtype)] if name == "norm" else []
    x = rows.to(torch.float32 if "norm" in name else dtype)
    return [x, *branch, *(torch.randn(2, shape[-1], device=device).unbind())][: OPERATORS[name][2]]


def steps_apart(q, other):
    """By how many of E4M3's numbers two tensors differ, place by place; ±0 are one."""

    def place(x):
        bits = x.view(torch.uint8).int()
        return torch.where(bits < 128, bits, 128 - bits)

    return (place(q) - place(other)).abs()


def assert_quantised(found, exact):
    """Same sums and scales; numbers that are the same but for a few, which are one step away."""
    assert [x.shape for x in found] == [x.shape for x in exact]
    assert found[-2].dtype == E4M3 and found[-1].dtype == torch.float32
    for mine, theirs in zip(found[:-2], exact[:-2], strict=True):
        assert relative_error(mine, theirs) < 1e-6
    assert ((found[-1] - exact[-1]).abs() <= 2e-6 * exact[-1]).all()
    apart = steps_apart(found[-2], exact[-2])
    assert apart.max() <= 1 and (apart > 0).float().mean() <= FLIPS


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1), (17, 63), (141, 24), (2, 9, 141), (3, 768), (2, 3072)])
@pytest.mark.parametrize("name", OPERATORS)
def test_agrees_with_the_definition(name, shape, dtype, backend, device):
    """Catches a largest number of the padding or of another row, a row of a program left out, a bias, gain or branch lost, a
    norm rounded to bfloat16 before it is quantised."""
    operator, naive, _ = OPERATORS[name]
    tensors = inputs(name, shape, dtype, device)
    assert_quantised(operator(*tensors, backend=backend), naive(*(x.double() for x in tensors)))


def all_neighbourhoods():
    """Every number of E4M3, the middles between neighbours, and the next float32 on either side of each."""
    numbers = torch.arange(256, dtype=torch.uint8, device="cpu").view(E4M3).float()
    numbers = numbers[numbers.isfinite()].unique()
    points = torch.cat([numbers, (numbers[1:] + numbers[:-1]) / 2])
    points = torch.cat([points, torch.nextafter(points, INFINITY), torch.nextafter(points, -INFINITY)])
    return points[points.abs() <= 448].unique()


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_rounds_to_the_nearest_and_ties_to_even_everywhere(backend, device):
    """Catches rounding by half a step at ties, near 0 (where E4M3 has an even spacing) or at 448, which a row of scale 1 shows
    for every number there is; and a kernel whose cast cuts off, as the interpreter's does."""
    points = all_neighbourhoods().to(device)
    assert len(points) > 1500
    q, scale = X.quantise_rows(points.unsqueeze(0), backend=backend)
    assert scale.item() == 1 and torch.equal(q.squeeze(0).float(), points.to(E4M3).float())
    drawn = torch.cat([torch.full((64, 1), 448.0), 448 * torch.rand(64, 999).pow(4) * torch.randn(64, 999).sign()], dim=1)
    q, scale = X.quantise_rows(drawn.to(device), backend=backend)
    assert (scale == 1).all() and torch.equal(q.float().cpu(), drawn.to(E4M3).float())


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_rows_of_nothing_and_of_no_numbers(backend, device):
    """Catches a division by 0, a scale that underflows, and NaN that a largest number does not see: training must notice it."""
    x = torch.ones(6, 32, device=device)
    x[0], x[1], x[2] = 0.0, 1e-41, 3e38
    x[3, 5], x[4, 5] = torch.nan, torch.inf
    q, scale = X.quantise_rows(x, backend=backend)
    assert scale[:2].tolist() == [[1.0], [1.0]] and not q[:2].float().any()
    assert (q[2] == q[5]).all() and q[2].float().eq(448).all()
    weight = X.quantise_rows(torch.full((16, 32), 1e-3, device=device))
    y = X.fp8_linear(q, scale, *weight, None, torch.bfloat16)
    assert y.isnan().all(dim=1).tolist() == [False, False, False, True, True, False] and y[:3].isfinite().all()


@pytest.mark.parametrize("name", OPERATORS)
def test_strided_inputs(name, device):
    """Catches kernels that take the inputs for contiguous."""
    operator, naive, _ = OPERATORS[name]
    tensors = [x[..., ::2] if x.ndim == 1 else x[::2, ::2] for x in inputs(name, (10, 48), torch.float32, device)]
    for backend in ("triton", "torch"):
        assert_quantised(operator(*tensors, backend=backend), naive(*(x.double() for x in tensors)))


def test_nothing_added_is_the_stream_itself(device):
    """Catches a copy of the stream where the first block adds nothing to it."""
    x, weight, bias = inputs("first norm", (4, 24), torch.float32, device)
    for backend in ("triton", "torch"):
        assert X.residual_layer_norm_fp8(x, None, weight, bias, backend=backend)[0] is x


def test_statistics_far_from_zero(device):
    """Catches a variance as the difference of two large numbers."""
    tensors = inputs("norm", (17, 100), torch.float32, device, spread=0.0)
    tensors[0] += 1000
    (total, q, scale), exact = (
        X.residual_layer_norm_fp8(*tensors, backend="triton"),
        X.naive_residual_layer_norm_fp8(*(x.double() for x in tensors), 1e-5),
    )
    assert relative_error(total, exact[0]) < 1e-6 and relative_error(scale, exact[2]) < 1e-4
    assert (steps_apart(q, exact[1]) > 0).float().mean() < 0.02


def layer(rows, inputs, outputs, device):
    """Quantised rows and weights, and a bias; then what they stand for in float64."""
    torch.manual_seed(outputs)
    x, weight, bias = (torch.randn(shape, device=device) for shape in ((rows, inputs), (outputs, inputs), (outputs,)))
    quantised = (*X.quantise_rows(x * torch.arange(1, rows + 1, device=device).unsqueeze(1)), *X.quantise_rows(weight))
    wide = [q.double() * scale.double() for q, scale in (quantised[:2], quantised[2:])]
    return quantised, bias, wide[0] @ wide[1].t()


@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(1, 16, 16), (17, 32, 48), (63, 768, 96), (141, 48, 16)])
def test_linear_layer(rows, inputs, outputs, device):
    """Catches scales of rows taken for those of columns, a scale or the bias left out, and a weight that is transposed."""
    quantised, bias, product = layer(rows, inputs, outputs, device)
    dtypes = [(torch.bfloat16, 6e-3)] + ([(torch.float32, 1e-6)] if device.type == "cpu" else [])
    for dtype, tolerance in dtypes:
        for added in (None, bias):
            exact = product if added is None else product + added.double()
            with torch.autocast(device.type, torch.bfloat16):
                found = X.fp8_linear(*quantised, added, dtype)
            assert found.dtype == dtype and found.shape == (rows, outputs)
            assert relative_error(found, exact) < tolerance
            assert relative_error(X.naive_fp8_linear(*(x.double() for x in quantised), added, torch.float64), exact) < 1e-12
    q, scale, *weight = quantised
    batched = X.fp8_linear(q.expand(2, -1, -1), scale.expand(2, -1, -1), *weight, bias, torch.bfloat16)
    torch.testing.assert_close(batched[1], X.fp8_linear(*quantised, bias, torch.bfloat16), rtol=1e-2, atol=1e-2)


def test_scaled_product_is_called_as_it_wants_to_be(monkeypatch, device):
    """Catches operands, scales, bias or type that torch's scaled product refuses on a GPU, or takes for another scaling."""
    calls, scaled = [], torch._scaled_mm

    def scaled_mm(a, b, **more):
        calls.append((a, b, more))
        if a.is_cuda or torch.__version__ >= (2, 13):  # the first to have it on a CPU
            return scaled(a, b, **more)
        scales = more["scale_a"], more["scale_b"].t()
        return X.naive_fp8_linear(a, scales[0], b.t(), scales[1], more["bias"], more["out_dtype"])

    monkeypatch.setattr(LINEAR, "missing_scaled_product", lambda device: None)
    monkeypatch.setattr(torch, "_scaled_mm", scaled_mm)
    q, scale = X.quantise_rows(torch.randn(2, 17, 32, device=device))
    rows = X.quantise_rows(torch.randn(48, 32, device=device))
    weight, weight_scale = (x.repeat_interleave(2, dim=1)[:, ::2] for x in rows)
    for bias in (torch.randn(48, device=device), None):
        found = X.fp8_linear(q, scale, weight, weight_scale, bias, torch.bfloat16)
        assert found.shape == (2, 17, 48) and found.dtype == torch.bfloat16
        assert relative_error(found, X.naive_fp8_linear(q, scale, weight, weight_scale, bias, torch.float32)) < 6e-3
        a, b, more = calls.pop()
        assert a.shape == (34, 32) and a.is_contiguous() and b.shape == (32, 48) and b.stride() == (1, 32)
        for name, shape in (("scale_a", (34, 1)), ("scale_b", (1, 48))):
            assert more[name].shape == shape and more[name].dtype == torch.float32 and more[name].is_contiguous()
        assert bias is more["bias"] is None or more["bias"].dtype == torch.bfloat16
        assert more["out_dtype"] == torch.bfloat16 and more["use_fast_accum"] is False
    with pytest.raises(ValueError, match="dtype = float32; a GPU's scaled product gives bfloat16"):
        X.fp8_linear(q, scale, weight, weight_scale, None, torch.float32)


def test_gpus_without_a_scaled_product_are_told(monkeypatch, caplog):
    """Catches a GPU that is too old, or a torch that fails at it there, found out in the middle of training or never."""
    caplog.set_level(logging.WARNING, "xkd_kernels")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "G")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    told = LINEAR._tried.__wrapped__(torch.device("cuda"))
    assert told == "G has compute capability 8.6; 8.9 is the first with E4M3"
    (line,) = caplog.messages
    assert line.startswith("fp8_linear has no scaled product on G and is emulated there: G has compute capability 8.6")
    assert X.missing_scaled_product(torch.device("cpu")) == "a CPU has none" and len(caplog.messages) == 1


def test_opcheck_and_compile(device):
    """Catches fake implementations of other shapes or types, aliased outputs and graph breaks."""
    x, branch, weight, bias = inputs("norm", (3, 5, 32), torch.bfloat16, device)
    torch.library.opcheck(quantise_rows_forward, (x,))
    torch.library.opcheck(bias_gelu_fp8_forward, (branch, bias))
    for added in (branch, None):
        torch.library.opcheck(residual_layer_norm_fp8_forward, (x, added, weight, bias, 1e-5))
    layer = X.quantise_rows(torch.randn(16, 32, device=device))

    def chain(backend):
        total, *quantised = X.residual_layer_norm_fp8(x, branch, weight, bias, backend=backend)
        first = X.fp8_linear(*quantised, *layer, None, torch.bfloat16)
        second = X.fp8_linear(*X.bias_gelu_fp8(branch, bias, backend=backend), *layer, bias[:16], torch.bfloat16)
        return total, first, second, X.quantise_rows(second, backend=backend)[1]

    for backend in ("triton", "torch"):
        expected, found = chain(backend), torch.compile(chain, fullgraph=True, backend="aot_eager")(backend)
        for mine, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-2, atol=1e-2)


def test_a_gradient_is_refused_where_one_would_be_lost(device):
    """Catches weights that are trained through an operator without a gradient; without grad mode they may pass."""
    x = torch.randn(4, 16, device=device, requires_grad=True)
    with torch.no_grad():
        q, scale = X.quantise_rows(x, backend="triton")
    bias = torch.zeros(16, device=device, requires_grad=True)
    for call in (
        lambda: X.quantise_rows(x),
        lambda: X.bias_gelu_fp8(x, bias.detach()),
        lambda: X.residual_layer_norm_fp8(x.detach(), None, bias, bias),
        lambda: X.fp8_linear(q, scale, q.repeat(4, 1), scale.repeat(4, 1), bias, torch.float32),
    ):
        with pytest.raises(ValueError, match="requires a gradient, but this has none"):
            call()
