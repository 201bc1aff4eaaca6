"""The optimiser's operators against their definitions in float64, every backend that runs here."""

from __future__ import annotations

import math
from contextlib import nullcontext
from random import Random

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from xkd_kernels import (
    BackendError,
    Segments,
    adamw_ema_,
    choose,
    ema_,
    naive_adamw_ema,
    naive_squared_norms,
    obstacle,
    squared_norms,
)
from xkd_kernels.adamw_ema import OPERATOR, _bounded, _table, scale_by_written_out

SIZES = (1, 17, 63, 393, 4096, 100_003)  # 100 003 numbers are cut into several pieces, the last of odd size
HYPER = {"lr": 3e-3, "betas": (0.9, 0.95), "eps": 1e-3}
BACKENDS = ("native", "torch")


@pytest.fixture(params=BACKENDS)
def backend(request, device):
    if request.param == "native" and choose(OPERATOR, device, torch.float32, "").backend != "native":
        try:
            choose(OPERATOR, device, torch.float32, "", "native")
        except BackendError as error:
            pytest.skip(str(error))
    return request.param


def tensors(device: torch.device, generator: torch.Generator, *, scale: float = 1.0, dtype=torch.float32) -> list[Tensor]:
    return [(torch.randn(size, generator=generator) * scale).to(device, dtype) for size in SIZES]


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def wide(each: list[Tensor]) -> list[Tensor]:
    return [tensor.double() for tensor in each]


def largest_error(found: list[Tensor], exact: list[Tensor], before: list[Tensor]) -> float:
    """Of how far each tensor moved."""
    return max(((f.double() - e).norm() / (e - b.double()).norm()).item() for f, e, b in zip(found, exact, before))


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_norms_equal_the_definition(backend, device, generator, scale):
    """Catches a dropped piece or tail, sums of one segment in another, and float32 sums that lose digits."""
    gradients = tensors(device, generator, scale=scale)
    found = squared_norms(gradients, Segments.whole(gradients), backend=backend)
    torch.testing.assert_close(
        found.double(), naive_squared_norms(wide(gradients), Segments.whole(gradients)), rtol=2e-6, atol=0
    )


def test_norms_of_pieces_of_flat_buffers(backend, device, generator):
    """Catches segments that all start at their tensor's first number; two buffers, a gap, an empty segment."""
    flats = [torch.randn(1000, generator=generator).to(device), torch.randn(70_001, generator=generator).to(device)]
    segments = Segments([0, 0, 1, 1, 1], [0, 17, 3, 300, 300], [17, 900, 111, 0, 69_701])
    found = squared_norms(flats, segments, backend=backend)
    torch.testing.assert_close(found.double(), naive_squared_norms(wide(flats), segments), rtol=2e-6, atol=0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_shows_in_its_norm_alone(backend, device, generator, bad):
    """Catches a vectorised sum that drops NaN: overflows would be trained on."""
    gradients = tensors(device, generator)
    gradients[5][70_000] = bad
    finite = squared_norms(gradients, Segments.whole(gradients), backend=backend).isfinite().tolist()
    assert finite == [True] * 5 + [False]


def test_a_step_equals_the_definition(backend, device, generator):
    """Catches a wrong term, order or bias correction, decay on the wrong tensors, scales of other segments."""
    parameters, teachers = tensors(device, generator), tensors(device, generator)
    firsts, seconds = ([torch.zeros_like(p) for p in parameters] for _ in range(2))
    copies = [t.bfloat16() if i % 2 else None for i, t in enumerate(teachers)]
    taught = [t if i != 2 else None for i, t in enumerate(teachers)]
    copies[2] = None
    follow, decays = [0.01 * (1 + i) for i in range(len(SIZES))], [0.3 * (i % 2) for i in range(len(SIZES))]
    exact = [wide(each) for each in (parameters, firsts, seconds, teachers)]
    before = [[tensor.clone() for tensor in each] for each in (parameters, firsts, seconds, teachers)]
    segments = Segments.whole(parameters)
    for step in (1, 2, 3):
        gradients = tensors(device, generator, scale=10.0**-step)
        scales = torch.linspace(0.1, 1.0, len(SIZES), device=device)
        naive_adamw_ema(
            exact[0], wide(gradients), exact[1], exact[2], scales.double(), segments,
            **HYPER, weight_decays=decays, step=step,
            teachers=[None if i == 2 else t for i, t in enumerate(exact[3])], follow=follow,
        )  # fmt: skip
        adamw_ema_(
            parameters, gradients, firsts, seconds, scales, segments,
            **HYPER, weight_decays=decays, step=step, teachers=taught, follow=follow, copies=copies, backend=backend,
        )  # fmt: skip
    for name, found, right, old in zip("pmv", (parameters, firsts, seconds), exact, before):
        bound = 6e-5 if name == "p" else 3e-6  # parameters of size 1 move by 0.01: float32 rounds them at 1e-5 of that
        assert largest_error(found, right, old) < bound, name
    moved = [i for i in range(len(SIZES)) if i != 2]
    assert largest_error(*([each[i] for i in moved] for each in (teachers, exact[3], before[3]))) < 3e-5
    assert torch.equal(teachers[2], before[3][2]), "a teacher that was not given moved"
    for copy, teacher in zip(copies, teachers):
        assert copy is None or torch.equal(copy, teacher.bfloat16())


def test_numbers_outside_of_all_segments_stay(backend, device, generator):
    """Catches a step on the padding of a flat buffer, or on a frozen parameter in its middle."""
    flats = [[torch.randn(5000, generator=generator).to(device)] for _ in range(5)]
    parameters, gradients, firsts, seconds, teachers = flats
    seconds[0].abs_()
    exact, copies = [wide(each) for each in flats], [teachers[0].bfloat16()]
    before = [each[0].clone() for each in flats]
    segments, scales = Segments([0, 0], [3, 3000], [1500, 1990]), torch.tensor([0.5, 2.0], device=device)
    numbers = {**HYPER, "weight_decays": [0.3], "step": 7, "follow": [0.05]}
    naive_adamw_ema(*exact[:4], scales.double(), segments, **numbers, teachers=exact[4])
    adamw_ema_(
        parameters, gradients, firsts, seconds, scales, segments, **numbers, teachers=teachers, copies=copies, backend=backend
    )
    outside = torch.ones(5000, dtype=torch.bool, device=device)
    outside[3:1503] = outside[3000:4990] = False
    for i, name in ((0, "parameters"), (2, "firsts"), (3, "seconds"), (4, "teachers")):
        assert torch.equal(flats[i][0][outside], before[i][outside]), name
        torch.testing.assert_close(flats[i][0].double(), exact[i][0], rtol=2e-6, atol=1e-6, msg=name)
        assert not torch.equal(flats[i][0][3:1503], before[i][3:1503]), name
    assert torch.equal(copies[0][~outside], teachers[0][~outside].bfloat16())


def test_teachers_follow_alone(backend, device, generator):
    """Catches one momentum for all, a teacher replaced, a stale copy."""
    teachers, students = tensors(device, generator), tensors(device, generator)
    before, follow = [t.clone() for t in teachers], [0.5, 0.003, 0.003, 1.0, 0.0, 1e-4]
    copies = [t.bfloat16() for t in teachers]
    copies[1] = None
    ema_(teachers, students, follow, copies=copies, backend=backend)
    for teacher, old, student, weight in zip(teachers, before, students, follow):
        exact = old.double() + weight * (student.double() - old.double())
        torch.testing.assert_close(teacher.double(), exact, rtol=1e-6, atol=2e-7)
    assert all(copy is None or torch.equal(copy, teacher.bfloat16()) for copy, teacher in zip(copies, teachers))


def test_bfloat16_copies_round_as_pytorch_does(backend, device):
    """Catches cutting off, ties away from even, and infinities or NaN that turn into numbers."""
    bits = torch.randint(-(2**31), 2**31, (20_000,), generator=torch.Generator().manual_seed(2)).to(torch.int32)
    ties = (torch.arange(4000, dtype=torch.int32) << 15) + (0x3F80 << 16)
    special = torch.tensor([math.inf, -math.inf, math.nan, 0.0, -0.0, 3.4e38, 1e-45]).view(torch.int32)
    student = torch.cat([bits, ties, special]).view(torch.float32).to(device)
    teacher = student.clone()
    copy = torch.zeros_like(teacher, dtype=torch.bfloat16)
    ema_([teacher], [student], [0.0], copies=[copy], backend=backend)
    torch.testing.assert_close(copy, teacher.bfloat16(), rtol=0, atol=0, equal_nan=True)


def test_equal_to_pytorchs_adamw(backend, device, generator):
    """Catches a definition that is no AdamW at all: ``torch.optim.AdamW`` in float64, clipping aside."""
    parameters = tensors(device, generator)
    plain = [p.double().requires_grad_() for p in parameters]
    optimizer = torch.optim.AdamW(plain, lr=HYPER["lr"], betas=HYPER["betas"], eps=HYPER["eps"], weight_decay=0.3)
    firsts, seconds = ([torch.zeros_like(p) for p in parameters] for _ in range(2))
    before, segments = [p.clone() for p in parameters], Segments.whole(parameters)
    for step in (1, 2):
        gradients = tensors(device, generator)
        for p, g in zip(plain, gradients):
            p.grad = g.double()
        optimizer.step()
        ones = torch.ones(len(SIZES), device=device)
        adamw_ema_(
            parameters, gradients, firsts, seconds, ones, segments,
            **HYPER, weight_decays=[0.3] * len(SIZES), step=step, backend=backend,
        )  # fmt: skip
    assert largest_error(parameters, [p.detach() for p in plain], before) < 6e-5


def test_float64_runs_by_pytorch(device, generator):
    """Catches a cast to float32 where a wider type is trained in."""
    parameters = tensors(device, generator, dtype=torch.float64)
    moments, exact = [[torch.zeros_like(p) for p in parameters] for _ in range(2)], wide(parameters)
    gradients, ones = tensors(device, generator, dtype=torch.float64), torch.ones(len(SIZES), device=device)
    numbers = {**HYPER, "weight_decays": [0.3] * len(SIZES), "step": 1}
    right = [[torch.zeros_like(p) for p in parameters] for _ in range(2)]
    naive_adamw_ema(exact, gradients, *right, ones.double(), Segments.whole(exact), **numbers)
    adamw_ema_(parameters, [g.clone() for g in gradients], *moments, ones, Segments.whole(parameters), **numbers)
    for mine, theirs in zip(parameters, exact):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)
    with pytest.raises(BackendError, match="computes in float32, not in float64; torch can"):
        squared_norms(gradients, Segments.whole(gradients), backend="native")


def test_operators_pass_opcheck(device, generator):
    """Catches wrong mutation marks or fake implementations, on which torch.compile would build."""
    if reason := obstacle(device, torch.float32, "native"):
        pytest.skip(reason)
    parameters, gradients, firsts, seconds, teachers = (tensors(device, generator) for _ in range(5))
    whole, number = Segments.whole(parameters), len(SIZES)
    places = (whole.tensor, whole.start, whole.count)
    seconds = [s.abs() for s in seconds]
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.xkd_kernels.squared_norms, (gradients, *places), test_utils=tests)
    teaching = (teachers, list(range(number)), [0.1] * number, [], [])
    numbers = (1e-3, 0.9, 0.95, 1e-8, [0.3] * number, 1)
    step = (parameters, gradients, firsts, seconds, torch.ones(number, device=device), *places, *numbers, *teaching)
    torch.library.opcheck(torch.ops.xkd_kernels.adamw_ema, step, test_utils=tests)
    follow = (teachers, parameters, [0.1] * number, [], [])
    torch.library.opcheck(torch.ops.xkd_kernels.ema, follow, test_utils=tests)


def test_versions_tell_of_a_change(backend, device, generator):
    """Catches a write behind autograd's back: a cached cast of the teachers would go stale."""
    teachers, students = tensors(device, generator), tensors(device, generator)
    versions = [t._version for t in teachers]
    ema_(teachers, students, [0.1] * len(SIZES), backend=backend)
    assert all(t._version > v for t, v in zip(teachers, versions))


def test_what_runs_is_counted(backend, device, generator):
    """Catches PyTorch's operators hidden in one of ours, whose launches nobody would count, and an unseen compiled one."""
    parameters, gradients, firsts, seconds, teachers = (tensors(device, generator) for _ in range(5))
    segments, ones = Segments.whole(parameters), torch.ones(len(SIZES), device=device)
    numbers = {**HYPER, "weight_decays": [0.3] * len(SIZES), "step": 1, "teachers": teachers, "follow": [0.1] * len(SIZES)}

    def step():
        squared_norms(gradients, segments, backend=backend)
        adamw_ema_(parameters, gradients, firsts, [s.abs_() for s in seconds], ones, segments, **numbers, backend=backend)
        ema_(teachers, parameters, [0.1] * len(SIZES), backend=backend)

    with Dispatched() as dispatched:
        step()
    ours = {"squared_norms", "adamw_ema", "ema"}
    if backend == "native":
        assert ours <= dispatched.names and "_fused_adamw_" not in dispatched.names
    else:
        assert {"_fused_adamw_", "_foreach_lerp_"} <= dispatched.names and not ours & dispatched.names


class Dispatched(TorchDispatchMode):
    """The names of the operators that PyTorch's dispatcher has met."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


def test_a_step_is_the_same_seen_or_unseen(backend, device):
    """Catches the short way past the dispatcher doing anything else than the operator."""
    found = []
    for watch in (Dispatched(), nullcontext()):
        generator = torch.Generator().manual_seed(1)
        lists = [tensors(device, generator) for _ in range(5)]
        lists[3] = [each.abs() for each in lists[3]]
        copies, segments = [each.bfloat16() for each in lists[4]], Segments.whole(lists[0])
        numbers = {**HYPER, "weight_decays": [0.3] * len(SIZES), "step": 3, "follow": [0.1] * len(SIZES), "backend": backend}
        with watch:
            norms = squared_norms(lists[1], segments, backend=backend)
            adamw_ema_(*lists[:4], norms.rsqrt(), segments, **numbers, teachers=lists[4], copies=copies)
        found.append([*lists[0], *lists[2], *lists[3], *lists[4], *copies, norms])
    for one, other in zip(*found):
        assert torch.equal(one, other)


def test_the_table_is_what_the_header_says():
    """Catches a column in another's place, addresses without their start, a teacher's numbers for a tensor without one."""
    p, g, t, c = (torch.randn(50), torch.randn(7)), (torch.randn(50), torch.randn(7)), torch.randn(7), torch.zeros(7).bfloat16()
    table = _table(
        [0, 1, 0], [3, 2, 40], [5, 4, 0], torch.device("cpu"),
        parameters=list(p), gradients=list(g), teachers=([t], [1]), copies=([c], [1]), keep=[0.5, 0.25], follow=([0.125], [1]),
    )  # fmt: skip
    rows = [
        (p[0], g[0], None, None, 3, 5, 0.5, 0.0),
        (p[1], g[1], t, c, 2, 4, 0.25, 0.125),
        (p[0], g[0], None, None, 40, 0, 0.5, 0.0),
    ]
    for row, (parameter, gradient, teacher, copy, start, count, keep, follow) in zip(table, rows):
        at = [each.data_ptr() + start * each.element_size() if each is not None else 0 for each in (teacher, copy)]
        assert row[:7].tolist() == [parameter.data_ptr() + 4 * start, gradient.data_ptr() + 4 * start, 0, 0, *at, count]
        assert row[7:].view(torch.float32).tolist() == [keep, follow]


def test_neighbours_that_go_together_are_all_and_not_too_many():
    """Catches a tensor left unscaled or scaled twice, or memory that grows with the model."""
    random = Random(0)  # not hypothesis, which the machine with a GPU may lack
    cases = [([random.randint(0, 9) for _ in range(random.randint(0, 12))], random.randint(1, 20)) for _ in range(300)]
    for sizes, most in [*cases, ([], 1), ([9], 1), ([0, 0], 1)]:
        runs = list(_bounded(sizes, most))
        assert [i for begin, end in runs for i in range(begin, end)] == list(range(len(sizes)))
        assert all(end > begin and (end == begin + 1 or sum(sizes[begin:end]) <= most) for begin, end in runs)


def test_scaling_on_a_gpu_goes_by_lists_of_the_same_sizes(monkeypatch, generator):
    """Catches lists that PyTorch's multi-tensor product takes one by one; the GPU's way, followed on the CPU."""
    sizes, factors = [(4, 5), (7,), (1,), (30,)], torch.tensor([0.5, 2.0, 3.0, 0.0])
    given = [torch.randn(size, generator=generator) for size in sizes]
    expected = [tensor * factor for tensor, factor in zip(given, factors)]
    met = []
    product = torch._foreach_mul_
    monkeypatch.setattr(torch, "_foreach_mul_", lambda one, two: (met.append((one, two)), product(one, two)))
    scale_by_written_out(given, factors, most=28)
    assert [len(one) for one, _ in met] == [3, 1]
    assert all(a.shape == b.shape and a.stride() == b.stride() for one, two in met for a, b in zip(one, two))
    assert all(torch.equal(tensor, right) for tensor, right in zip(given, expected))


ONE = [torch.zeros(4)]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: squared_norms(ONE, Segments([0], [2], [3])), "segment 0, numbers 2 to 5, leaves its tensor 0 of 4"),
        (lambda: squared_norms(ONE, Segments([1], [0], [3])), "segment 0 is of tensor 1, but there are 1"),
        (lambda: squared_norms([torch.zeros(4, 4).t()], Segments([0], [0], [3])), "not contiguous"),
        (lambda: squared_norms(ONE, Segments([0], [0], [4]), backend="triton"), "backend .triton. of adamw_ema is not one of"),
        (lambda: ema_(ONE, [torch.zeros(5)], [0.1]), "tensor 0 has 5 numbers"),
        (lambda: ema_(ONE, [torch.zeros(4).double()], [0.1]), "float64"),
        (lambda: ema_(ONE, ONE, []), "0 numbers in follow for 1 teachers"),
        (lambda: ema_(ONE, ONE, [0.1], copies=[torch.zeros(3)]), r"copies\[0\], of shape \[3\], does not lie in memory"),
        (lambda: step(scales=torch.ones(2)), r"scales has the shape \[2\], but \[1\]"),
        (lambda: step(weight_decays=[]), "0 weight decays for 1 parameters"),
        (lambda: step(step=0), "step = 0 must be 1 or more"),
        (lambda: step(copies=[torch.zeros(4)]), "no teacher to copy"),
        (lambda: step(teachers=[torch.zeros(4)]), "0 numbers in follow for 1 parameters"),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    """Catches numbers outside of a tensor that compiled code would read or write."""
    with pytest.raises((ValueError, BackendError), match=message):
        call()


def step(**changed):
    """A step on four zeros."""
    lists = [[torch.zeros(4)] for _ in range(4)]
    numbers = {"scales": torch.ones(1), **HYPER, "weight_decays": [0.0], "step": 1, **changed}
    adamw_ema_(*lists, numbers.pop("scales"), Segments([0], [0], [4]), **numbers)


def test_nothing_to_do_is_done(backend):
    """Catches an error where a rank holds no piece of a group, or a model has no teachers."""
    assert squared_norms([], Segments([], [], []), backend=backend).shape == (0,)
    ema_([], [], [], backend=backend)
    adamw_ema_([], [], [], [], torch.empty(0), Segments([], [], []), **HYPER, weight_decays=[], step=1, backend=backend)
