"""Cross-modal distillation (XKD.md section 6): a teacher's distribution over prototypes for the other's student."""

from __future__ import annotations

from torch import Tensor

from xkd_fast.objective.losses import Distilled
from xkd_kernels import distillation_loss


def distil(
    teacher: Tensor, student: Tensor, centre: Tensor, teacher_temperature: Tensor, student_temperature: float, kernels: str
) -> Distilled:
    """One direction, in one pass over the logits.

    Args:
        teacher: [B, K] logits.
        student: [views·B, K] logits, differentiated.
        centre: [1, K], as it was before this step.
        teacher_temperature: one number on the device.
        student_temperature: above 0.
        kernels: who computes, as ``model.kernels`` says it.
    """
    found = distillation_loss(student, teacher, centre, teacher_temperature, student_temperature, backend=kernels)
    return Distilled(found.loss, found.teacher_sum / len(teacher), found.teacher_entropy, found.student_entropy)
