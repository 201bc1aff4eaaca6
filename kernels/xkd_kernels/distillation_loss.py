"""Distillation between prototypes in one pass over the logits: loss, the teacher's batch sum and both entropies.

    p = softmax((teacher − centre) / τ_t), q = softmax(student / τ_s)
    loss = mean over pairs of views and clips of −Σ_k p_k · log q_k

Softmax is online (Milakov and Gimelshein 2018): every lane of a program keeps its own running maximum and sums, which are
joined once at the end, so a row may have any number of prototypes and is read once. Two kinds of programs share one launch:
those of student rows, and those of stripes of columns, which sum the teacher's logits over the batch for the centre. The
backward pass makes both softmaxes again from one number per row.

Legend: B clips, V student views, U teacher views, K prototypes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from xkd_kernels.backends import backend_of
from xkd_kernels.checks import kernel_type, require_floats, require_no_tangent, require_one_device, whole_number
from xkd_kernels.configurations import launch_of, on_own_device

LOWEST: tl.constexpr = tl.constexpr(-1e30)  # below every logit; finite, so that differences of it are


class Distillation(NamedTuple):
    """What distillation gives.

    Attributes:
        loss: scalar; the only one that is differentiated, by the student.
        teacher_sum: [K] the teacher's logits, summed over clips and views: what moves the centre.
        teacher_entropy, student_entropy: scalars, means over clips and views, in nats; ln K means uniform.
    """

    loss: Tensor
    teacher_sum: Tensor
    teacher_entropy: Tensor
    student_entropy: Tensor


def naive_distillation_loss(
    student: Tensor,
    teacher: Tensor,
    centre: Tensor,
    teacher_temperature: Tensor,
    student_temperature: float,
    teacher_views: int = 1,
) -> Distillation:
    """The definition; in float32, or wider where the student is."""
    dtype = torch.float64 if student.dtype == torch.float64 else torch.float32
    taught = ((teacher.to(dtype) - centre.to(dtype)) / teacher_temperature.to(dtype)).softmax(dim=-1)
    log_said = (student.to(dtype) / student_temperature).log_softmax(dim=-1)
    clips, prototypes = len(teacher) // teacher_views, teacher.shape[1]
    pairs = taught.reshape(teacher_views, 1, clips, prototypes) * log_said.reshape(1, -1, clips, prototypes)
    return Distillation(
        -pairs.sum(dim=-1).mean(),
        teacher.to(dtype).sum(dim=0),
        torch.special.entr(taught).sum(dim=-1).mean(),
        torch.special.entr(log_said.detach().exp()).sum(dim=-1).mean(),
    )


def distillation_loss(
    student: Tensor,
    teacher: Tensor,
    centre: Tensor,
    teacher_temperature: Tensor,
    student_temperature: float,
    teacher_views: int = 1,
    *,
    backend: str = "auto",
) -> Distillation:
    """Cross entropy from every teacher view to every student view of the same clip (XKD.md section 6).

    Args:
        student: [V·B, K] logits, all clips of the first view first.
        teacher: [U·B, K] logits in the same order; no gradient.
        centre: [K] or [1, K], subtracted from the teacher's logits.
        teacher_temperature: one number, on the same device: a schedule may fill it without anybody waiting.
        student_temperature: above 0.
        teacher_views: U.
        backend: see :mod:`xkd_kernels.backends`.

    Returns:
        Loss, batch sum and entropies, in float32, or wider where the student is.

    Raises:
        ValueError: shapes, types or devices that do not fit, or a temperature that is not above 0.
        BackendError: a backend that cannot run here.
    """
    views = whole_number(teacher_views)
    if not isinstance(teacher_temperature, Tensor):
        raise ValueError(f"teacher_temperature = {teacher_temperature!r} must be a tensor of one number, on the logits' device")
    if student.ndim != 2 or teacher.ndim != 2 or student.shape[1] != teacher.shape[1] or 0 in (*student.shape, *teacher.shape):
        raise ValueError(
            f"student and teacher have the shapes {list(student.shape)} and {list(teacher.shape)}, but [V·B, K] and [U·B, K] "
            "are wanted"
        )
    if views < 1 or len(teacher) % views or len(student) % (len(teacher) // views):
        raise ValueError(
            f"student has {len(student)} rows, teacher {len(teacher)} in teacher_views = {views}; each must be a whole number "
            "of views of the same clips"
        )
    if centre.numel() != teacher.shape[1] or centre.shape[-1:] != teacher.shape[1:] or teacher_temperature.numel() != 1:
        raise ValueError(
            f"centre has the shape {list(centre.shape)} and teacher_temperature {list(teacher_temperature.shape)}; "
            f"[{teacher.shape[1]}] and one number are wanted"
        )
    if not student_temperature > 0:
        raise ValueError(f"student_temperature = {student_temperature} must be above 0")
    require_floats(student=student, teacher=teacher, centre=centre, teacher_temperature=teacher_temperature)
    require_one_device(student=student, teacher=teacher, centre=centre, teacher_temperature=teacher_temperature)
    teacher, centre, temperature = teacher.detach(), centre.detach().reshape(-1), teacher_temperature.detach().reshape(())
    shape = str(whole_number(student.shape[1]))
    if backend_of("distillation_loss", student.device, kernel_type(student, teacher, centre), shape, backend) == "torch":
        with torch.autocast(student.device.type, enabled=False):
            return Distillation(*_ByTorch.apply(student, teacher, centre, temperature, student_temperature, views))
    require_no_tangent(student)
    means, teacher_sum, _ = distillation_loss_forward(student, teacher, centre, temperature, student_temperature, views)
    monitored = means.detach()
    return Distillation(means[0], teacher_sum.detach(), monitored[1], monitored[2])


class _ByTorch(torch.autograd.Function):
    """Keeps the student's logits and the teacher's mean probabilities per clip."""

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor,
        centre: Tensor,
        teacher_temperature: Tensor,
        student_temperature: float,
        views: int,
    ) -> tuple[Tensor, ...]:
        dtype = torch.promote_types(student.dtype, torch.float32)
        log_taught = ((teacher.to(dtype) - centre.to(dtype)) / teacher_temperature.to(dtype)).log_softmax(dim=-1)
        taught = log_taught.exp()
        log_said = (student.to(dtype) / student_temperature).log_softmax(dim=-1)
        target = taught.unflatten(0, (views, -1)).mean(dim=0) if views > 1 else taught
        rows = log_said.unflatten(0, (-1, len(target)))
        ctx.save_for_backward(student, target)
        ctx.temperature = student_temperature
        outputs = (
            -(rows.sum(dim=0).flatten() @ target.flatten()) / len(student),
            teacher.to(dtype).sum(dim=0),
            torch.special.entr(taught).sum() / len(teacher),  # 0 where nothing is expected, not 0 · ∞
            torch.special.entr(log_said.exp()).sum() / len(student),
        )
        ctx.mark_non_differentiable(*outputs[1:])
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, *_: Any) -> Any:  # type: ignore[override]
        student, target = ctx.saved_tensors
        said = (student.to(target.dtype) / ctx.temperature).softmax(dim=-1)
        said.unflatten(0, (-1, len(target))).sub_(target)
        return (said.mul_(gradient / (ctx.temperature * len(student)))).to(student.dtype), *[None] * 5


# ------------------------------------------------------------------------------------------------------------------ operators


@torch.library.custom_op("xkd_kernels::distillation_loss", mutates_args=())
@on_own_device
def distillation_loss_forward(
    student: Tensor, teacher: Tensor, centre: Tensor, teacher_temperature: Tensor, student_temperature: float, views: int
) -> tuple[Tensor, Tensor, Tensor]:
    """[3] loss, teacher's and student's entropy; the teacher's sum [K]; log of each row's sum, student's and teacher's rows."""
    student, teacher, centre = student.contiguous(), teacher.contiguous(), centre.contiguous()
    rows, prototypes = student.shape
    parts = torch.empty(rows, 3, dtype=torch.float32, device=student.device)
    teacher_sum, log_sums = _kept(student, teacher)
    launch = launch_of("distillation_loss_forward", student, str(prototypes))
    stripes = triton.cdiv(prototypes, launch.meta["COLUMNS"])
    _distillation_loss_forward_kernel[(rows + stripes,)](
        student, teacher, centre, teacher_temperature, parts, teacher_sum, log_sums,
        rows, len(teacher) // views, views, 1 / student_temperature,
        PROTOTYPES=prototypes, **launch.options,
    )  # fmt: skip
    return parts.sum(dim=0), teacher_sum, log_sums


@distillation_loss_forward.register_fake
def _(
    student: Tensor, teacher: Tensor, centre: Tensor, teacher_temperature: Tensor, student_temperature: float, views: int
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty(3, dtype=torch.float32, device=student.device), *_kept(student, teacher)


def _kept(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    teacher_sum = torch.empty(teacher.shape[1], dtype=torch.float32, device=student.device)
    return teacher_sum, torch.empty(len(student) + len(teacher), dtype=torch.float32, device=student.device)


@torch.library.custom_op("xkd_kernels::distillation_loss_backward", mutates_args=())
@on_own_device
def distillation_loss_backward(
    gradient: Tensor,
    student: Tensor,
    teacher: Tensor,
    centre: Tensor,
    teacher_temperature: Tensor,
    log_sums: Tensor,
    student_temperature: float,
    views: int,
) -> Tensor:
    """The student's gradient [V·B, K] in its type; ``gradient`` is that of the three means, of which only the loss's counts."""
    student, teacher, centre = student.contiguous(), teacher.contiguous(), centre.contiguous()
    rows, prototypes = student.shape
    to_student = torch.empty_like(student)
    launch = launch_of("distillation_loss_backward", student, str(prototypes))
    _distillation_loss_backward_kernel[(rows, triton.cdiv(prototypes, launch.meta["BLOCK"]))](
        gradient.contiguous(), student, teacher, centre, teacher_temperature, log_sums, to_student,
        rows, len(teacher) // views, views, 1 / student_temperature,
        PROTOTYPES=prototypes, **launch.options,
    )  # fmt: skip
    return to_student


@distillation_loss_backward.register_fake
def _(
    gradient: Tensor,
    student: Tensor,
    teacher: Tensor,
    centre: Tensor,
    teacher_temperature: Tensor,
    log_sums: Tensor,
    student_temperature: float,
    views: int,
) -> Tensor:
    return torch.empty_like(student, memory_format=torch.contiguous_format)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.student_temperature, ctx.views = inputs
    ctx.save_for_backward(*tensors, output[2])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, gradient: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if gradient is None:
        return (None,) * 6
    return distillation_loss_backward(gradient, *ctx.saved_tensors, ctx.student_temperature, ctx.views), *[None] * 5


distillation_loss_forward.register_autograd(_differentiate, setup_context=_keep)


# -------------------------------------------------------------------------------------------------------------------- kernels


@triton.jit
def _joined(highest, total, weighted):
    """A row's maximum, Σ e^(x − maximum) and Σ e^(x − maximum) · (x − maximum), from those of its lanes."""
    most = tl.max(highest, axis=0)
    shrink = tl.exp(highest - most)
    below = (weighted + total * (highest - most)) * shrink
    return most, tl.sum(total * shrink, axis=0), tl.sum(below, axis=0)


@triton.jit
def _distillation_loss_forward_kernel(
    student, teacher, centre, teacher_temperature, parts, teacher_sum, log_sums, rows, clips, views, student_sharpness,
    PROTOTYPES: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    if program < rows:
        row = program.to(tl.int64)
        sharpness = 1 / tl.load(teacher_temperature).to(tl.float32)
        loss, entropy = 0.0, 0.0
        for view in range(0, views):
            taught_row = (view * clips + row % clips).to(tl.int64)
            highest = tl.full([BLOCK], LOWEST, tl.float32)
            total = tl.zeros([BLOCK], tl.float32)
            weighted = tl.zeros([BLOCK], tl.float32)
            crossed = tl.zeros([BLOCK], tl.float32)
            said_highest = tl.full([BLOCK], LOWEST, tl.float32)
            said_total = tl.zeros([BLOCK], tl.float32)
            said_weighted = tl.zeros([BLOCK], tl.float32)
            for first in range(0, PROTOTYPES, BLOCK):
                columns = first + tl.arange(0, BLOCK)
                inside = columns < PROTOTYPES
                taught = tl.load(teacher + taught_row * PROTOTYPES + columns, mask=inside, other=0.0).to(tl.float32)
                taught -= tl.load(centre + columns, mask=inside, other=0.0).to(tl.float32)
                taught = tl.where(inside, taught * sharpness, LOWEST)
                said = tl.load(student + row * PROTOTYPES + columns, mask=inside, other=0.0).to(tl.float32) * student_sharpness

                higher = tl.maximum(highest, taught)
                shrink = tl.exp(highest - higher)
                own = tl.where(inside, tl.exp(taught - higher), 0.0)
                weighted = (weighted + total * (highest - higher)) * shrink
                weighted += own * (taught - higher)
                total = total * shrink + own
                crossed = crossed * shrink + own * said
                highest = higher

                said_higher = tl.maximum(said_highest, tl.where(inside, said, LOWEST))
                shrink = tl.exp(said_highest - said_higher)
                own = tl.where(inside, tl.exp(said - said_higher), 0.0)
                said_weighted = (said_weighted + said_total * (said_highest - said_higher)) * shrink
                said_weighted += own * (said - said_higher)
                said_total = said_total * shrink + own
                said_highest = said_higher
            said_most, said_sum, said_below = _joined(said_highest, said_total, said_weighted)
            most, all_of_it, below = _joined(highest, total, weighted)
            cross = tl.sum(crossed * tl.exp(highest - most), axis=0) / all_of_it
            loss += said_most + tl.log(said_sum) - cross
            if row < clips:
                entropy += tl.log(all_of_it) - below / all_of_it
                tl.store(log_sums + rows + taught_row, most + tl.log(all_of_it))
            if view == 0:
                tl.store(log_sums + row, said_most + tl.log(said_sum))
                tl.store(parts + 3 * row + 2, (tl.log(said_sum) - said_below / said_sum) / rows)
        tl.store(parts + 3 * row, loss / (views * rows))
        tl.store(parts + 3 * row + 1, entropy / (views * clips))
    else:
        columns = (program - rows) * COLUMNS + tl.arange(0, COLUMNS)
        found = tl.zeros([BLOCK // COLUMNS, COLUMNS], tl.float32)
        for first_row in range(0, views * clips, BLOCK // COLUMNS):
            taught_rows = first_row + tl.arange(0, BLOCK // COLUMNS)
            inside = (taught_rows < views * clips)[:, None] & (columns < PROTOTYPES)[None, :]
            places = taught_rows.to(tl.int64)[:, None] * PROTOTYPES + columns[None, :]
            found += tl.load(teacher + places, mask=inside, other=0.0).to(tl.float32)
        tl.store(teacher_sum + columns, tl.sum(found, axis=0), mask=columns < PROTOTYPES)


@triton.jit
def _distillation_loss_backward_kernel(
    gradient, student, teacher, centre, teacher_temperature, log_sums, to_student, rows, clips, views, student_sharpness,
    PROTOTYPES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < PROTOTYPES
    sharpness = 1 / tl.load(teacher_temperature).to(tl.float32)
    middle = tl.load(centre + columns, mask=inside, other=0.0).to(tl.float32)
    target = tl.zeros([BLOCK], tl.float32)
    for view in range(0, views):
        taught_row = (view * clips + row % clips).to(tl.int64)
        taught = tl.load(teacher + taught_row * PROTOTYPES + columns, mask=inside, other=LOWEST).to(tl.float32)
        target += tl.exp((taught - middle) * sharpness - tl.load(log_sums + rows + taught_row))
    said = tl.load(student + row * PROTOTYPES + columns, mask=inside, other=LOWEST).to(tl.float32)
    said = tl.exp(said * student_sharpness - tl.load(log_sums + row))
    factor = tl.load(gradient).to(tl.float32) * student_sharpness / rows
    to_said = (said - target / views) * factor
    tl.store(to_student + row * PROTOTYPES + columns, to_said.to(to_student.dtype.element_ty), mask=inside)
