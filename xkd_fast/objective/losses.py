"""The named losses that a model returns, and the tensors worth looking at beside them."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import NamedTuple

from torch import Tensor


class Distilled(NamedTuple):
    """One direction of distillation, from a modality's teacher to the other one's student: scalars but for the mean.

    Entropies are there where they come with the loss for nothing.
    """

    loss: Tensor
    teacher_mean: Tensor  # [prototypes]
    teacher_entropy: Tensor | None = None
    student_entropy: Tensor | None = None


@dataclass
class Outputs:
    """Intermediate results of one forward pass, detached. Every dict is keyed ``"video"`` and ``"audio"``."""

    student_logits: dict[str, Tensor]  # [(1 + n_local)·B, prototypes], masked global view first, then local 0, 1, …
    teacher_logits: dict[str, Tensor]  # [B, prototypes]
    refinement_weights: dict[str, Tensor]  # [B, patch tokens of the teacher's view]
    teacher_means: dict[str, Tensor]  # [prototypes]: the batch mean of the teacher's logits, what moves the centre
    teacher_entropies: dict[str, Tensor]  # scalars, nats: of what the teacher predicts of a clip; empty = not computed
    student_entropies: dict[str, Tensor]  # likewise, mean over the student's views


@dataclass
class Losses:
    """Scalars of one forward pass, unweighted but for ``total``, the one to differentiate (XKD.md section 1)."""

    total: Tensor
    reconstruction: Tensor
    distillation: Tensor
    alignment: Tensor
    video_reconstruction: Tensor
    audio_reconstruction: Tensor
    video_to_audio_distillation: Tensor
    audio_to_video_distillation: Tensor
    student_alignment: Tensor
    teacher_alignment: Tensor
    outputs: Outputs

    def terms(self) -> dict[str, Tensor]:
        """Every scalar by name, detached, ``total`` first."""
        return {f.name: getattr(self, f.name).detach() for f in fields(self) if f.name != "outputs"}
