"""Distillation over prototypes against its naive twin in float64, and against the reference's."""

from __future__ import annotations

import math

import pytest
import torch

from tests.kernels.compare import relative_error
from xkd_fast import reference
from xkd_kernels import BackendError, Distillation, distillation_loss, naive_distillation_loss
from xkd_kernels.distillation_loss import distillation_loss_backward, distillation_loss_forward

TEACHER_TEMPERATURE, STUDENT_TEMPERATURE = 0.07, 0.1
# Values of ~10 are differences of numbers up to ~100, whose rounding shows; a gradient in a half type is off by its own.
VALUE = 2e-6
GRADIENT = {torch.float32: 3e-6, torch.float16: 6e-4, torch.bfloat16: 7e-3}


def batch(clips, prototypes, device, *, student_views=2, teacher_views=1, dtype=torch.float32, scale=1.0):
    """Student, teacher, centre and temperature as the head's last norm gives them: numbers of order 1."""
    torch.manual_seed(prototypes)
    student = (torch.randn(student_views * clips, prototypes, device=device) * scale).to(dtype)
    teacher = torch.randn(teacher_views * clips, prototypes, device=device) * scale
    centre = 0.3 * torch.randn(1, prototypes, device=device)
    return student, teacher, centre, torch.tensor(TEACHER_TEMPERATURE, dtype=torch.float64, device=device)


def exact(student, teacher, centre, temperature, views=1):
    wide = student.detach().double().requires_grad_()
    found = naive_distillation_loss(wide, teacher.double(), centre.double(), temperature, STUDENT_TEMPERATURE, views)
    (3 * found.loss).backward()
    return found, wide.grad


def assert_found(found: Distillation, gradient, expected: Distillation, exact_gradient, tolerance):
    for name, mine, theirs in zip(Distillation._fields, found, expected):
        scale = max(theirs.abs().max().item(), 1.0)
        assert (mine.double() - theirs).abs().max().item() < VALUE * scale, name
        assert not (name != "loss" and mine.requires_grad), name
    assert relative_error(gradient, exact_gradient) < tolerance


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("dtype", GRADIENT)
@pytest.mark.parametrize(
    ("clips", "prototypes", "student_views", "teacher_views"),
    [(1, 1, 1, 1), (3, 17, 2, 1), (2, 63, 4, 1), (2, 1000, 1, 3), (5, 4100, 2, 2)],
)
def test_agrees_with_the_definition(clips, prototypes, student_views, teacher_views, dtype, backend, device):
    """Catches lanes joined without rescaling, padding taken for prototypes, views or clips paired wrongly, a dropped factor."""
    student, *others = batch(clips, prototypes, device, student_views=student_views, teacher_views=teacher_views, dtype=dtype)
    student.requires_grad_()
    found = distillation_loss(student, *others, STUDENT_TEMPERATURE, teacher_views, backend=backend)
    (3 * found.loss).backward()
    assert student.grad.dtype == dtype
    expected, gradient = exact(student, *others, teacher_views)
    assert_found(found, student.grad, expected, gradient, GRADIENT[dtype])


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_logits_that_overflow_an_exponential(backend, device):
    """Catches a softmax without its maximum: e^(100 / 0.07) is no number."""
    student, *others = batch(3, 300, device, scale=100.0)
    student.requires_grad_()
    found = distillation_loss(student, *others, STUDENT_TEMPERATURE, backend=backend)
    (3 * found.loss).backward()
    expected, gradient = exact(student, *others)
    assert found.loss.item() == pytest.approx(expected.loss.item(), rel=1e-6)
    assert found.student_entropy.item() == pytest.approx(expected.student_entropy.item(), abs=1e-5)
    assert relative_error(student.grad, gradient) < 1e-4


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_is_the_references_loss(backend, device):
    """Catches another definition than the one that replays the released model's numbers."""
    student, teacher, centre, temperature = batch(4, 65, device, student_views=3)
    expected = reference.distillation_loss(teacher, student, centre, temperature, STUDENT_TEMPERATURE)
    found = distillation_loss(student, teacher, centre, temperature, STUDENT_TEMPERATURE, backend=backend)
    assert found.loss.item() == pytest.approx(expected.item(), rel=1e-6)
    torch.testing.assert_close(found.teacher_sum / 4, teacher.mean(dim=0))


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_entropies_of_known_distributions(backend, device):
    """Catches an entropy in bits, over the wrong rows or of the wrong side."""
    alike, one = torch.zeros(6, 50, device=device), torch.zeros(3, 50, device=device)
    one[:, 7] = 1000.0
    temperature = torch.ones((), device=device)
    found = distillation_loss(alike, one, torch.zeros(50, device=device), temperature, 1.0, backend=backend)
    assert found.student_entropy.item() == pytest.approx(math.log(50), rel=1e-6)
    assert abs(found.teacher_entropy.item()) < 1e-6
    found = distillation_loss(one, alike[:3], torch.zeros(50, device=device), temperature, 1.0, backend=backend)
    assert found.teacher_entropy.item() == pytest.approx(math.log(50), rel=1e-6)
    assert abs(found.student_entropy.item()) < 1e-6


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_as_many_prototypes_as_there_may_be(backend, device):
    """Catches a row of 65 536 that is joined wrongly, or whose sums lose digits."""
    student, *others = batch(2, 65536, device)
    student.requires_grad_()
    found = distillation_loss(student, *others, STUDENT_TEMPERATURE, backend=backend)
    (3 * found.loss).backward()
    expected, gradient = exact(student, *others)
    assert_found(found, student.grad, expected, gradient, 3e-6)


def test_what_is_impossible_has_no_entropy(device):
    """Catches 0 · ∞ where a logit is −∞."""
    student, teacher, centre, temperature = batch(2, 9, device)
    teacher[:, 3] = -torch.inf
    found = distillation_loss(student, teacher, centre, temperature, STUDENT_TEMPERATURE, backend="torch")
    expected = naive_distillation_loss(student, teacher, centre, temperature, STUDENT_TEMPERATURE)
    assert found.teacher_entropy.item() == pytest.approx(expected.teacher_entropy.item(), rel=1e-5)


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_a_float64_centre_is_not_rounded(backend, device):
    """Catches a kernel that takes it, which computes in float32, and a crash of two types."""
    student, teacher, centre, temperature = batch(2, 33, device)
    found = distillation_loss(student, teacher, centre.double(), temperature, STUDENT_TEMPERATURE, backend=backend)
    assert found.loss.item() == pytest.approx(exact(student, teacher, centre, temperature)[0].loss.item(), rel=1e-6)
    with pytest.raises(BackendError, match="not in float64"):
        distillation_loss(student, teacher, centre.double(), temperature, STUDENT_TEMPERATURE, backend="triton")


def test_float64_stays_float64(device):
    """Catches a fallback that rounds a replay to float32."""
    student, *others = batch(3, 33, device)
    wide = student.double().requires_grad_()
    found = distillation_loss(wide, *(x.double() for x in others), STUDENT_TEMPERATURE)
    (3 * found.loss).backward()
    expected, gradient = exact(student, *others)
    assert found.loss.dtype == torch.float64 and abs(found.loss.item() - expected.loss.item()) < 1e-13
    assert relative_error(wide.grad, gradient) < 1e-13


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_strides_and_autocast(backend, device):
    """Catches rows read as if they were contiguous, and a loss rounded by autocast."""
    student, teacher, centre, temperature = batch(4, 128, device)
    student = student[:, ::2].requires_grad_()
    teacher, centre = teacher[:, 1::2], centre[:, ::2]
    with torch.autocast(device.type, torch.bfloat16):
        found = distillation_loss(student, teacher, centre, temperature, STUDENT_TEMPERATURE, backend=backend)
    (3 * found.loss).backward()
    expected, gradient = exact(student, teacher, centre, temperature)
    assert_found(found, student.grad, expected, gradient, 3e-6)


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_a_second_derivative_is_refused(backend, device):
    """Catches one that is silently 0: both softmaxes are taken for constants in the backward pass."""
    student, *others = batch(3, 40, device)
    student.requires_grad_()
    found = distillation_loss(student, *others, STUDENT_TEMPERATURE, backend=backend)
    (gradient,) = torch.autograd.grad(found.loss, student, create_graph=True)
    with pytest.raises((NotImplementedError, RuntimeError)):
        gradient.square().sum().backward()


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("place", [0, 1])
def test_what_is_no_number_shows(place, backend, device):
    """Catches a maximum that takes NaN for small, as a GPU's does, and a sum that passes over it."""
    tensors = batch(2, 600, device)
    tensors[place][1, 5] = torch.nan
    student, *others = tensors
    student.requires_grad_()
    found = distillation_loss(student, *others, STUDENT_TEMPERATURE, backend=backend)
    found.loss.backward()
    assert found.loss.isnan() and student.grad[1].isnan().any()
    assert (found.teacher_entropy if place else found.student_entropy).isnan()


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_teachers_and_centres(dtype, backend, device):
    """Catches logits, a centre or their sum over the batch in a half type."""
    student, teacher, centre, temperature = batch(7, 600, device)
    student, teacher, centre = student.requires_grad_(), teacher.to(dtype), centre.to(dtype)
    found = distillation_loss(student, teacher, centre, temperature, STUDENT_TEMPERATURE, backend=backend)
    (3 * found.loss).backward()
    expected, gradient = exact(student, teacher, centre, temperature)
    assert found.teacher_sum.dtype == torch.float32
    assert_found(found, student.grad, expected, gradient, 3e-6)


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_a_cold_teacher_whom_the_student_follows(backend, device):
    """Catches a loss that drowns in the logits it is a difference of: both say the same, at temperatures of 0.04 and 0.1."""
    student, teacher, centre, _ = batch(2, 4096, device, student_views=1)
    teacher, shared = 40 * teacher, [0, 4000]
    # what the others leave them, two prototypes share
    centre[:, shared], teacher[:, shared] = 0, torch.tensor([200.0, 200.02], device=device)
    student = (2.5 * teacher + 0.01 * student).requires_grad_()
    temperature = torch.full((), 0.04, dtype=torch.float64, device=device)
    found = distillation_loss(student, teacher, centre, temperature, STUDENT_TEMPERATURE, backend=backend)
    (3 * found.loss).backward()
    expected, gradient = exact(student, teacher, centre, temperature)
    highest = (student.abs().max() / STUDENT_TEMPERATURE).item()  # whose last place is what any of them may be off by
    assert 0.5 < expected.loss.item() < 0.8 and abs(found.loss.item() - expected.loss.item()) < 2e-7 * highest
    assert relative_error(student.grad, gradient) < 4e-6 * highest


def test_opcheck_and_compile(device):
    """Catches a fake implementation of other shapes, aliased outputs and graph breaks."""
    student, teacher, centre, temperature = batch(3, 70, device, teacher_views=1)
    centre = centre.reshape(-1)
    arguments = (student.clone().requires_grad_(), teacher, centre, temperature, STUDENT_TEMPERATURE, 1)
    torch.library.opcheck(distillation_loss_forward, arguments)
    means, _, log_sums = distillation_loss_forward(student, teacher, centre, temperature, STUDENT_TEMPERATURE, 1)
    further = (torch.ones_like(means), student, teacher, centre, temperature, log_sums, STUDENT_TEMPERATURE, 1)
    torch.library.opcheck(distillation_loss_backward, further)
    for backend in ("triton", "torch"):
        loss = torch.compile(
            lambda s, backend=backend: (
                distillation_loss(s, teacher, centre, temperature, STUDENT_TEMPERATURE, backend=backend).loss
            ),
            fullgraph=True,
            backend="aot_eager",
        )
        compiled, eager = (student.clone().requires_grad_() for _ in range(2))
        loss(compiled).backward()
        distillation_loss(eager, teacher, centre, temperature, STUDENT_TEMPERATURE, backend=backend).loss.backward()
        torch.testing.assert_close(compiled.grad, eager.grad)


def change(**changed):
    """The arguments of a right call, some of them others, not yet on their device: tensors, temperature, views."""
    student, teacher, centre = (torch.zeros(shape, device="cpu") for shape in ((4, 8), (2, 8), 8))
    right = {"student": student, "teacher": teacher, "centre": centre, "warm": torch.ones((), device="cpu")}
    return {**right, "cool": 0.1, "views": 1, **changed}


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"student": torch.randn(4, 9)}, r"\[4, 9\] and \[2, 8\], but \[V·B, K\]"),
        ({"student": torch.randn(5, 8)}, "student has 5 rows, teacher 2 in teacher_views = 1"),
        ({"views": 3}, "teacher 2 in teacher_views = 3"),
        ({"student": torch.randn(0, 8)}, "are wanted"),
        ({"centre": torch.zeros(8, 1)}, r"centre has the shape \[8, 1\]"),
        ({"centre": torch.zeros(7)}, r"centre has the shape \[7\]"),
        ({"warm": torch.ones(2)}, r"teacher_temperature \[2\]"),
        ({"warm": torch.ones((), dtype=torch.int64)}, "teacher_temperature is of type int64"),
        ({"warm": 0.1}, "teacher_temperature = 0.1 must be a tensor"),
        ({"cool": 0.0}, "student_temperature = 0.0 must be above 0"),
        ({"cool": float("nan")}, "must be above 0"),
        ({"teacher": torch.randn(2, 8, device="meta")}, "teacher is on meta"),
    ],
)
def test_what_does_not_fit_is_refused(changed, message, backend, device):
    """Catches memory read outside of a tensor, and rows paired with others' clips."""
    given = {n: x.to(device) if isinstance(x, torch.Tensor) and not x.is_meta else x for n, x in change(**changed).items()}
    with pytest.raises(ValueError, match=message):
        distillation_loss(*given.values(), backend=backend)
