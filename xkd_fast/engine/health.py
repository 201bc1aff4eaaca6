"""Is the distillation healthy? Teachers that say the same of every clip, or nothing of any, teach nothing.

Per modality, over the latest micro-batch of every rank: the entropy of what teacher and student predict per clip (0: one
prototype; ln K: all alike), the entropy of the teacher's mean prediction (near 0: the same prototype for every clip), how far
the teacher lags behind its student, and the length of the centre.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from xkd_fast.objective.losses import Outputs
from xkd_fast.reference import MODALITIES

if TYPE_CHECKING:
    from xkd_fast.engine.engine import Engine

UNIFORM, ALIKE = 0.98, 0.05  # shares of the largest possible entropy beyond which a teacher has collapsed


def entropy(probabilities: Tensor) -> Tensor:
    """In nats, of each row: [..., K] → [...]. ln K means uniform."""
    return torch.special.entr(probabilities).sum(dim=-1)


def probabilities(logits: Tensor, temperature: float | Tensor) -> Tensor:
    """softmax(logits / temperature) in float32: [rows, K] → [rows, K]."""
    return (logits.float() / temperature).softmax(dim=-1)


def health(engine: Engine, outputs: Outputs) -> dict[str, float]:
    """The module's numbers. Synchronises, and must be called on every rank."""
    module, world = engine.module, dist.get_world_size()
    means: dict[str, Tensor] = {}
    predicted, distances = [], []
    for modality in MODALITIES:
        centre = module.get_buffer(f"{modality}_centre")
        taught = probabilities(outputs.teacher_logits[modality] - centre, module.get_buffer(f"{modality}_teacher_temperature"))
        if modality in outputs.teacher_entropies:
            means[f"{modality}_teacher_entropy"] = outputs.teacher_entropies[modality]
            means[f"{modality}_student_entropy"] = outputs.student_entropies[modality]
        else:
            means[f"{modality}_teacher_entropy"] = entropy(taught).mean()
            said = probabilities(outputs.student_logits[modality], module.options.objective.student_temperature)
            means[f"{modality}_student_entropy"] = entropy(said).mean()
        means[f"{modality}_centre_norm"] = centre.norm()
        predicted.append(taught.mean(dim=0))
        distances.append(squared_distance(engine.teachers.pairs(modality)))
    vector = torch.cat([torch.stack([value.float() for value in means.values()]), *predicted])
    dist.all_reduce(vector)
    vector /= world
    numbers = dict(zip(means, vector[: len(means)].tolist(), strict=True))
    prototypes = len(predicted[0])
    shares = torch.stack(distances)
    if engine.teachers.share_of is not None:  # every rank has seen its shares alone
        dist.all_reduce(shares)
    for number, modality in enumerate(MODALITIES):
        begin = len(means) + number * prototypes
        numbers[f"{modality}_teacher_mean_entropy"] = entropy(vector[begin : begin + prototypes]).item()
        apart, size = shares[number].tolist()
        numbers[f"{modality}_teacher_distance"] = math.sqrt(apart / size) if size else 0.0
    return numbers


@torch.no_grad()
def squared_distance(pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    """[2]: Σ‖student − teacher‖² and Σ‖student‖² over pairs of tensors."""
    apart = [(student - teacher).norm() for student, teacher in pairs]  # one difference in memory at a time
    lengths = torch._foreach_norm([student for student, _ in pairs])
    return torch.stack([torch.stack(apart).square().sum(), torch.stack(lengths).square().sum()])


def collapse(row: dict[str, float], prototypes: int, clips: int) -> str | None:
    """One sentence if a row of metrics tells of a teacher that has collapsed; None otherwise.

    ``clips``: how many clips the row's mean predictions were taken over; so few cannot differ by more than ln(clips).
    """
    largest = math.log(prototypes)
    for modality in MODALITIES:
        sharp, mean = row[f"{modality}_teacher_entropy"], row[f"{modality}_teacher_mean_entropy"]
        temperature = f"model.objective.{modality}_teacher_temperature"
        if sharp > UNIFORM * largest:
            return (
                f"the {modality} teacher predicts all {prototypes} prototypes alike (entropy {sharp:.2f} of ln {prototypes} = "
                f"{largest:.2f}): distillation teaches nothing; lower {temperature}, or raise the momenta in ema"
            )
        if clips > 1 and mean < ALIKE * min(largest, math.log(clips)):
            return (
                f"the {modality} teacher predicts the same prototype for every clip (entropy of its mean prediction "
                f"{mean:.2f}): distillation teaches nothing; raise {temperature}, or lower model.objective.centre_momentum"
            )
    return None
