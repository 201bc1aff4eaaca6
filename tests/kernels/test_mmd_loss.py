"""Maximum mean discrepancy against the naive twin in float64."""

from __future__ import annotations

import sys

import pytest
import torch
import torch.nn.functional as F

from tests.kernels.compare import TOLERANCE, assert_agrees, relative_error
from xkd_fast.reference import mmd_loss as reference_loss
from xkd_kernels import mmd_loss, naive_mmd_loss
from xkd_kernels.mmd_loss import (
    STRIP,
    _condensed,
    _pulled,
    _pulled_on_a_cpu,
    mmd_loss_backward,
    mmd_loss_forward,
    strip_places,
)

GAMMAS = (0.001, 0.01, 0.1, 1.0, 10.0, 100.0, 1000.0)
FEW = (0.02, 0.5)
BACKENDS = ("triton", "torch")


def by(backend, gammas=GAMMAS):
    return lambda x, y: mmd_loss(x, y, gammas, backend=backend)


def naive(gammas=GAMMAS):
    return lambda x, y: naive_mmd_loss(x, y, gammas)


def some_rows(n, m, width, device, scale=1.0):
    torch.manual_seed(n + width)
    return [(torch.randn(count, width) * scale).to(device) for count in (n, m)]


def pairs(kind, n, m, width, device):
    """Two sets of rows, as they come out of a LayerNorm but for their distances."""
    x, y = (F.layer_norm(rows, (width,)) for rows in some_rows(n, m, width, device))
    if kind == "far":
        return [2 * x, 2 * y]
    if kind == "near":  # squared distances from 1e-6 on, exact duplicates within x and between the two
        sizes = torch.logspace(-6, 3, m, device=device).unsqueeze(1) / width
        y = x[torch.arange(m) % n] + sizes.sqrt() * torch.randn(m, width, device=device)
        x[-1], y[-1] = x[-2], x[0]
    if kind == "collapsed":
        x, y = (x[:1] + 1e-5 * rows for rows in (x, y))
    return [x, y]


# The distances' rounding counts γ · distance times: 16 times for typical rows, 65 times for those twice as far apart.
@pytest.mark.parametrize(("kind", "tolerance"), [("near", 1e-6), ("typical", 3e-6), ("far", 1e-5), ("collapsed", 1e-6)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_agrees_at_8192_numbers(backend, kind, tolerance, device):
    """Catches distances and gradients by the expanded square, long sums in one register, exponentials summed in float32."""
    slack = 3 if backend == "torch" else 1  # PyTorch sums a row's squares in 16 long sums
    assert_agrees(by(backend), naive(), pairs(kind, 4, 8, 8192, device), slack * tolerance)


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 17, 63), (11, 3, 141), (60, 5, 16), (30, 100, 20)])
def test_ragged_shapes(shape, device):
    """Catches rows beyond the end that take part, pairs of tiles left out or visited twice, means over the wrong number."""
    assert_agrees(by("triton", FEW), naive(FEW), some_rows(*shape, device, scale=shape[-1] ** -0.5), 1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_rows(dtype, device):
    """Catches distances in the type of the rows, and a loss or a gradient of another type."""
    x, y = (rows.to(dtype) for rows in some_rows(5, 6, 40, device, scale=0.2))
    for backend in BACKENDS:
        assert_agrees(by(backend, FEW), naive(FEW), [x, y], TOLERANCE[dtype])
        assert_agrees(by(backend, FEW), naive(FEW), [x, y], 1e-6, gradients=False)
        assert by(backend)(x, y).dtype == torch.float32


@pytest.mark.parametrize("shape", [(1, 1, 1), (17, 63, 141), (20, 5, 8192)])
def test_torch_backend_in_every_type(shape, device):
    """Catches float32 somewhere inside a float64 loss, and a gradient of the padding between rows."""
    x, y = some_rows(*shape, device, scale=shape[-1] ** -0.5)
    assert_agrees(by("torch"), naive(), [x, y], 2e-6)
    assert_agrees(by("torch"), naive(), [x.double(), y.double()], 1e-13)
    exact = reference_loss(x.double(), y.double(), GAMMAS).item()
    assert by("torch")(x.double(), y.double()).item() == pytest.approx(exact, 1e-12)


def test_rows_that_are_infinitely_far_apart_pull_nothing(device):
    """Catches 0 · ∞ in the gradient of rows whose distance overflows."""
    x, y = (1e25 * rows for rows in some_rows(3, 4, 24, device))
    x.requires_grad_()
    mmd_loss(x, y, GAMMAS, backend="torch").backward()
    assert torch.equal(x.grad, torch.zeros_like(x))


def test_torch_backend_as_on_a_gpu(monkeypatch, device):
    """Catches a gradient that goes another way there and comes out otherwise."""
    monkeypatch.setattr(sys.modules["xkd_kernels.mmd_loss"], "_pulled_on_a_cpu", _pulled)
    assert_agrees(by("torch"), naive(), some_rows(4, 7, 23, device, scale=0.2), 1e-6)


@pytest.mark.parametrize("of_x", [True, False])
def test_strips(of_x, monkeypatch, device):
    """Catches strips of rows that overlap, leave rows out or read another strip's weights, and a bound that is not kept."""
    x, y = some_rows(9, 12, 24, device, scale=0.2)
    gradient = torch.tensor(0.7, device=device)
    whole = mmd_loss_backward(gradient, x, y, list(FEW), of_x, True)
    monkeypatch.setattr(sys.modules["xkd_kernels.mmd_loss"], "STRIP", 4 * 32 * 8)
    strips = mmd_loss_backward(gradient, x, y, list(FEW), of_x, True)
    assert all(torch.equal(*pair) for pair in zip(whole, strips, strict=True))
    assert len(whole[0]) == (9 if of_x else 0)


@pytest.mark.parametrize("rows", [16, 128, 1024, 1040, 4096, 30000])
def test_weights_do_not_grow_with_the_square_of_the_rows(rows):
    """Catches a matrix of all pairs in memory."""
    assert strip_places(rows, 16) % 16 == 0
    assert strip_places(rows, 16) * rows * 4 <= STRIP
    assert (strip_places(rows, 16) >= rows) == (rows <= 1024)


@pytest.mark.parametrize("backend", BACKENDS)
def test_keeps_its_rows_alone(backend, device):
    """Catches distances kept for the backward pass."""
    x, y = (rows.requires_grad_() for rows in some_rows(9, 5, 24, device))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        by(backend, FEW)(x, y)
    assert {tensor.data_ptr() for tensor in kept} <= {x.data_ptr(), y.data_ptr()}


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_of_two_is_differentiated(backend, device):
    """Catches a gradient of x given to y, one where none was asked for, and strides taken for contiguous ones."""
    for place in (0, 1):
        found, exact = ([rows[::2, ::2] for rows in some_rows(10, 6, 48, device, scale=0.2)] for _ in range(2))
        exact = [rows.double() for rows in exact]
        for rows in (found, exact):
            rows[place].requires_grad_()
        by(backend, FEW)(*found).backward()
        naive(FEW)(*exact).backward()
        torch.testing.assert_close(found[place].grad.double(), exact[place].grad, rtol=1e-5, atol=1e-7)
        assert found[1 - place].grad is None


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_gathered_from_other_ranks(backend, device):
    """Catches a gradient without the pull of rows that need none themselves: `mmd_scope: global` joins them to one's own."""
    own, others = some_rows(4, 4, 24, device, scale=0.2)
    for place in (0, 1):
        gradients = []
        for loss, dtype in ((by(backend, FEW), torch.float32), (naive(FEW), torch.float64)):
            leaf, rest = own.detach().to(dtype).requires_grad_(), others.to(dtype)
            x = torch.cat([rest[:2], leaf, rest[2:]]) if place == 0 else torch.cat([leaf, rest])
            (3 * loss(x, 0.5 + torch.cat([leaf.flip(0), rest]))).backward()
            gradients.append(leaf.grad.double())
        torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_is_exactly_like_itself(backend, device):
    """Catches a diagonal lost to rounding: x·x computed two ways, times γ = 1000."""
    (x, _), far = some_rows(1, 1, 8192, device), torch.full((1, 8192), 100.0, device=device)
    assert by(backend)(x, far).item() == 14.0
    assert by(backend)(x, x.clone()).item() == 0.0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_number_shows(backend, value, device):
    """Catches a maximum that takes NaN for small (as a GPU's does), and an infinite row that looks merely far away."""
    for place in (0, 1):
        rows = some_rows(3, 2, 24, device)
        rows[place][1, 5] = value
        rows = [x.requires_grad_() for x in rows]
        loss = by(backend, FEW)(*rows)
        loss.backward()
        assert loss.isnan() and rows[place].grad[1].isnan().any()


def test_opcheck_and_compile(device):
    """Catches a fake implementation of other shapes or types, aliased outputs and graph breaks."""
    x, y = some_rows(3, 2, 24, device)
    torch.library.opcheck(mmd_loss_forward, (x.clone().requires_grad_(), y.clone().requires_grad_(), list(FEW)))
    for wanted in ((True, True), (False, True)):
        torch.library.opcheck(mmd_loss_backward, (torch.ones((), device=device), x, y, list(FEW), *wanted))
    for backend in BACKENDS:
        compiled = torch.compile(by(backend, FEW), fullgraph=True, backend="aot_eager")
        assert_agrees(compiled, naive(FEW), [x, y], 1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_and_further_derivatives(backend, device):
    """Catches half precision inside, and a second derivative that is silently 0."""
    x, y = some_rows(3, 2, 24, device, scale=0.2)
    plain = by(backend, FEW)(x, y)
    with torch.autocast(device.type, torch.bfloat16):
        assert torch.equal(by(backend, FEW)(x, y), plain)
    (gradient,) = torch.autograd.grad(by(backend, FEW)(x.requires_grad_(), y), x, create_graph=True)
    with pytest.raises((NotImplementedError, RuntimeError)):
        gradient.square().sum().backward()


@pytest.mark.parametrize("count", [256, pytest.param(1024, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("kind", "tolerance"), [("near", 3e-6), ("typical", 5e-5)])
def test_many_rows_of_many_numbers(kind, tolerance, count, device):
    """Catches sums over pairs that lose what is small, at the sizes of a step: 512 and 2048 rows of 8192 numbers.

    No row pulls itself: a weight of 1111 there, times a difference of 0 that is made as one of products, would drown what is
    exact.
    """
    torch.manual_seed(5)
    x, y = (F.layer_norm(torch.randn(count, 8192, device=device), (8192,)) for _ in range(2))
    if kind == "near":
        y = x + 1e-4 * torch.randn_like(x)
    rows = torch.cat([x, y]).double()
    distance = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist").square()
    share = torch.full((count,), 1 / count, dtype=torch.float64, device=device)
    share = torch.cat([share, -share])
    pairs = share[:, None] * share
    loss = sum((pairs * torch.exp(-gamma * distance)).sum() for gamma in GAMMAS)
    weights = -4 * pairs * sum(gamma * torch.exp(-gamma * distance) for gamma in GAMMAS)
    weights.fill_diagonal_(0)
    exact = weights.sum(dim=1, keepdim=True) * rows - weights @ rows
    x, y = x.requires_grad_(), y.requires_grad_()
    found = mmd_loss(x, y, GAMMAS, backend="triton" if device.type == "cuda" else "torch")
    found.backward()
    assert abs(found.item() - loss.item()) < 1e-5 * abs(loss.item())
    assert relative_error(torch.cat([x.grad, y.grad]), exact) < tolerance


def test_products_in_float64_are_the_pull_of_the_pairs(device):
    """Catches the way that a GPU's gradient goes without our kernel: half of the pairs, a sign, or what float32 cancels."""
    torch.manual_seed(6)
    x = F.layer_norm(torch.randn(20, 512, device=device), (512,))
    rows, distance, pairs = _condensed(x[:12], x[12:] * 0 + x[:8] + 1e-4 * torch.randn(8, 512, device=device))
    weights = pairs * sum(gamma * torch.exp(-gamma * distance) for gamma in GAMMAS)
    first, second = torch.triu_indices(20, 20, 1, device=device)
    wide, exact = rows.double(), torch.zeros(20, 512, dtype=torch.float64, device=device)
    difference = weights.unsqueeze(1) * (wide[first] - wide[second])
    exact.index_add_(0, first, difference).index_add_(0, second, -difference)
    for way in (_pulled, _pulled_on_a_cpu):
        if way is _pulled or device.type == "cpu":
            assert relative_error(way(rows, distance, weights), exact) < 1e-5, way.__name__


@pytest.mark.parametrize(("n", "m"), [(200, 180), pytest.param(1100, 948, marks=pytest.mark.slow)])
def test_many_tiles_of_few_numbers(n, m, device):
    """Catches tiles of the ring that are left out or counted twice where there are many: up to 2048 rows."""
    torch.manual_seed(7)
    x, y = torch.randn(n, 8, device=device), torch.randn(m, 8, device=device) + 0.3
    found = mmd_loss(x, y, (0.01, 0.1), backend="triton").item()
    assert found == pytest.approx(naive_mmd_loss(x.double(), y.double(), (0.01, 0.1)).item(), rel=1e-5)
