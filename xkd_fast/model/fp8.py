"""Teachers whose blocks multiply 8-bit floats, and how far they are from themselves without.

All four linear layers of every encoder block take E4M3 for their inputs and weights, with a scale for every token and for every
output; inputs are quantised where they are made (the norm, GELU), weights once per update of the teachers. Everything else,
attention and heads among it, is as without.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import fmean
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from xkd_fast.errors import UserError
from xkd_fast.reference import MODALITIES, Network
from xkd_kernels import fp8_linear, missing_scaled_product, quantise_rows

if TYPE_CHECKING:
    from xkd_fast.data.views import Views
    from xkd_fast.model.xkd import XKD


class Fp8Linear(nn.Module):
    """Stands for a linear layer: its weight in E4M3, one byte each, which :meth:`follow` brings up to date in its place.

    Attributes:
        original: the layer that it stands for.
        weight, scale: [N, K] in E4M3 and [N, 1] in float32, of no meaning until it has followed.
        bias: [N] in the type of products, or None; set and kept fresh by its owner.
    """

    weight: Tensor
    scale: Tensor
    bias: Tensor

    def __init__(self, original: nn.Linear, kernels: str) -> None:
        """``kernels``: who quantises, as ``model.kernels`` says it."""
        super().__init__()
        self._original, self._kernels = (original,), kernels  # a tuple hides it from what walks over modules
        weight = original.weight
        self.register_buffer("weight", torch.empty(weight.shape, dtype=torch.float8_e4m3fn, device=weight.device))
        self.register_buffer("scale", torch.empty(len(weight), 1, device=weight.device))
        self.register_parameter("bias", None)

    @property
    def original(self) -> nn.Linear:
        """The layer that it stands for."""
        return self._original[0]

    @torch.no_grad()
    def follow(self) -> None:
        """Quantise the original's weight."""
        weight, scale = quantise_rows(self.original.weight, backend=self._kernels)
        self.weight.copy_(weight)
        self.scale.copy_(scale)

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] → [..., N] in the type of ``x``."""
        return self.of_quantised(*quantise_rows(x, backend=self._kernels), x.dtype)

    def of_quantised(self, q: Tensor, scale: Tensor, dtype: torch.dtype, *, biased: bool = True) -> Tensor:
        """Inputs that are quantised already, [..., K] and [..., 1] → [..., N] in ``dtype``; ``biased``: add the bias."""
        return fp8_linear(q, scale, self.weight, self.scale, self.bias if biased else None, dtype)


def fp8_layers(teachers: Iterable[Network], kernels: str) -> list[Fp8Linear]:
    """One for each linear layer of the teachers' blocks, shared ones once.

    Raises:
        UserError: it cannot run here.
    """
    require_fp8()
    blocks = [block for teacher in teachers for block in teacher.encoder.blocks]
    layers = {id(layer): layer for block in blocks for layer in block.children() if isinstance(layer, nn.Linear)}
    return [Fp8Linear(layer, kernels) for layer in layers.values()]


def require_fp8() -> None:
    """Make sure that products of 8-bit floats can run here: on a GPU that has them, or emulated on a CPU.

    Raises:
        UserError: the GPU has none.
    """
    reason = missing_scaled_product(torch.device("cuda")) if torch.cuda.is_available() else None
    if reason:
        raise UserError(f"model.teacher_precision = fp8 cannot run here: {reason}; use autocast")


# ------------------------------------------------------------------------------------------------------------------- the gate

# The most that teachers in FP8 may be apart from themselves without, as `agreement` tells it. Emulated, new ones were at most
# 0.03, 0.15, 0.32, 0.004 and 0.33 apart (demo's model on its data and on noise, base model on noise; one of width 32 had an
# angle of 0.014), and 0.15, 0.45, 0.7, 0.004 and 0.75 with qkv's weights doubled, so that attention was sharp: about ten times
# as far as bfloat16 is from float32. Scales that are twice too large took new ones 0.58 or more apart in weights_mean.
LIMITS = {"weights_mean": 0.25, "weights_largest": 0.75, "divergence": 1.0, "angle": 0.05, "other_top": 0.8}
Agreement = dict[str, dict[str, float]]  # by modality, by what is told


@torch.no_grad()
def agreement(model: XKD, views: Views) -> Agreement:
    """How far the teachers in FP8 are from themselves without on a batch, under the caller's autocast.

    Returns:
        By modality, 0 where both agree:

        weights_mean, weights_largest: differences of the refinement weights, in parts of a clip's mean weight; and the largest,
            in parts of its largest weight.
        divergence: Kullback-Leibler, from the distribution without to that in FP8, nats; mean over clips.
        angle: 1 less the cosine of the logits; mean over clips.
        other_top: share of the clips whose most likely prototype is another one.
    """
    clips = model.teacher_clips(views)
    found_logits, found_weights = model.teach(clips)
    exact_logits, exact_weights = model.teach(clips, {modality: model.teacher(modality) for modality in MODALITIES})
    told = {}
    for modality in MODALITIES:
        found, exact = found_logits[modality].double(), exact_logits[modality].double()
        centre, temperature = (model.get_buffer(f"{modality}_{name}") for name in ("centre", "teacher_temperature"))
        logs = [((logits - centre) / temperature).log_softmax(dim=-1) for logits in (found, exact)]
        weights = exact_weights[modality]
        apart = (found_weights[modality] - weights).abs()
        figures = {
            "weights_mean": (apart.sum(dim=-1) / weights.sum(dim=-1)).mean(),
            "weights_largest": (apart.amax(dim=-1) / weights.amax(dim=-1)).max(),
            "divergence": (logs[1].exp() * (logs[1] - logs[0])).sum(dim=-1).mean(),
            "angle": 1 - torch.cosine_similarity(found, exact).mean(),
            "other_top": (logs[0].argmax(dim=-1) != logs[1].argmax(dim=-1)).double().mean(),
        }
        told[modality] = {name: figure.item() for name, figure in figures.items()}
    return told


def together(found: Sequence[Agreement]) -> Agreement:
    """Of parts of a batch, one of equal size on each rank: means, and the largest of what is a largest."""

    def figure(modality: str, name: str) -> float:
        parts = [part[modality][name] for part in found]
        return max(parts) if name == "weights_largest" else fmean(parts)

    return {modality: {name: figure(modality, name) for name in LIMITS} for modality in MODALITIES}


def described(found: Agreement) -> str:
    """All figures in a line, each with its limit."""
    parts = [
        f"{modality} " + ", ".join(f"{name} {figure:.2g} (at most {LIMITS[name]})" for name, figure in figures.items())
        for modality, figures in found.items()
    ]
    return f"FP8 teachers beside themselves in bfloat16: {'; '.join(parts)}"


def require_agreement(found: Agreement) -> None:
    """Hold the figures of :func:`agreement` against :data:`LIMITS`.

    Raises:
        UserError: a figure is above its limit, or no number.
    """
    if not all(figure <= LIMITS[name] for figures in found.values() for name, figure in figures.items()):
        raise UserError(f"{described(found)}; too far apart to teach the same: set model.teacher_precision=autocast")
