"""AdamW with per-tensor gradient clipping, over whole tensors (ZeRO 0) or this rank's flat shard of them (ZeRO 1, 2).

XKD clips each parameter tensor's gradient by its own L2 norm (XKD.md section 8). Under ZeRO 1 and 2 a rank holds a slice of
the parameters of a group laid end to end, so a tensor's norm is the sum over the ranks that hold a piece of it: one
all-reduce of a vector with one number per tensor.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

CLIP_EPS = 1e-6


@dataclass
class ParameterGroup:
    """Trainable tensors that share weight decay, clipping and freezing."""

    weight_decay: float
    clipped: bool
    last_layer: bool
    names: list[str] = field(default_factory=list)
    parameters: list[nn.Parameter] = field(default_factory=list)


def group_parameters(named_parameters: Iterable[tuple[str, nn.Parameter]], weight_decay: float) -> list[ParameterGroup]:
    """Sort trainable parameters into groups: decay or not (biases and 1-D tensors), clipped or not, last head layer apart.

    Students are clipped, the autoencoders' own tensors (``*_decoder.*``) are not.
    """
    groups: dict[tuple[bool, bool, bool], ParameterGroup] = {}
    for name, parameter in named_parameters:
        if not parameter.requires_grad:
            continue
        decayed, clipped, last_layer = parameter.ndim > 1, "_student." in name, name.endswith(".head.prototypes")
        default = ParameterGroup(weight_decay if decayed else 0.0, clipped, last_layer)
        group = groups.setdefault((decayed, clipped, last_layer), default)
        group.names.append(name)
        group.parameters.append(parameter)
    return list(groups.values())


def segment_overlaps(sizes: list[int], start: int, length: int) -> list[tuple[int, int, int]]:
    """Where tensors laid end to end fall into the slice [start, start + length): (tensor, offset in the slice, count)."""
    overlaps, position = [], 0
    for index, size in enumerate(sizes):
        begin, end = max(position, start), min(position + size, start + length)
        if begin < end:
            overlaps.append((index, begin - start, end - begin))
        position += size
    return overlaps


def _norms(tensors: list[Tensor]) -> Tensor:
    """L2 norm of each; PyTorch's on a CPU takes twice the time of a dot product, and loses two digits in float32."""
    if tensors[0].device.type == "cpu":
        flat = (tensor.reshape(-1) for tensor in tensors)
        return torch.stack([torch.dot(numbers, numbers) for numbers in flat]).sqrt()
    return torch.stack(torch._foreach_norm(tensors))


class ClippedAdamW(torch.optim.AdamW):
    """``torch.optim.AdamW`` (decoupled decay) preceded by per-tensor gradient clipping and last-layer freezing.

    DeepSpeed may replace the parameters of each group by one flat shard and may step the groups one at a time; both are
    recognised from the parameters found in the group.

    Attributes:
        squared_norms: per group, the squared gradient norm of every tensor before clipping, from the latest step (float32).
        last_layer_frozen: drop the last head layers' gradients, so that neither update nor decay acts on them.
    """

    def __init__(
        self,
        groups: list[ParameterGroup],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        clip_norm: float | None,
    ) -> None:
        self.clip_norm = clip_norm
        self.last_layer_frozen = False
        self.squared_norms: dict[int, Tensor] = {}
        self._flags = [(group.clipped, group.last_layer) for group in groups]
        self._sizes = [[p.numel() for p in group.parameters] for group in groups]
        self._segments: dict[int, tuple[list[tuple[int, int, int]], Tensor, Tensor]] = {}
        parameters: list[dict[str, Any]] = [
            {"params": group.parameters, "weight_decay": group.weight_decay, "index": index}
            for index, group in enumerate(groups)
        ]
        super().__init__(parameters, lr=lr, betas=betas, eps=eps, fused=True)

    def set_learning_rate(self, lr: float) -> None:
        """Set every group's learning rate."""
        for group in self.param_groups:
            group["lr"] = lr

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Clip, drop frozen gradients, and take an AdamW step on the groups present."""
        for group in self.param_groups:
            clipped, last_layer = self._flags[group["index"]]
            if last_layer and self.last_layer_frozen:
                for parameter in group["params"]:
                    parameter.grad = None
                self.squared_norms.pop(group["index"], None)
                continue
            self._clip(group, self.clip_norm if clipped else None)
        super().step()

    def _clip(self, group: dict[str, Any], max_norm: float | None) -> None:
        index, sizes = group["index"], self._sizes[group["index"]]
        parameters = group["params"]
        if len(parameters) == len(sizes) and all(p.numel() == n for p, n in zip(parameters, sizes, strict=True)):
            gradients = [p.grad for p in parameters if p.grad is not None]
            if not gradients:
                return
            norms = _norms(gradients)
            self.squared_norms[index] = norms.square()
            if max_norm is not None:
                torch._foreach_mul_(gradients, list((max_norm / (norms + CLIP_EPS)).clamp(max=1.0).unbind()))
        else:
            self._clip_shard(index, parameters[0].grad, max_norm)

    def _clip_shard(self, index: int, gradient: Tensor, max_norm: float | None) -> None:
        overlaps, tensors, counts = self._segment_table(index, gradient)
        squared = gradient.new_zeros(len(self._sizes[index]))
        if overlaps:
            pieces = [gradient.narrow(0, offset, count) for _, offset, count in overlaps]
            squared[tensors] = _norms(pieces).square()
        if dist.is_initialized():
            dist.all_reduce(squared)
        self.squared_norms[index] = squared
        if max_norm is not None and overlaps:
            scale = (max_norm / (squared.sqrt() + CLIP_EPS)).clamp(max=1.0)[tensors]
            covered = sum(count for _, _, count in overlaps)
            gradient[:covered].mul_(scale.repeat_interleave(counts, output_size=covered))

    def _segment_table(self, index: int, gradient: Tensor) -> tuple[list[tuple[int, int, int]], Tensor, Tensor]:
        """Which tensors this rank's shard holds pieces of; made once per group, for the shard's device."""
        if index not in self._segments:
            length, sizes = gradient.numel(), self._sizes[index]
            world = dist.get_world_size() if dist.is_initialized() else 1
            if not sum(sizes) <= length * world:
                raise RuntimeError(f"a shard of {length} numbers on each of {world} ranks cannot hold {sum(sizes)}")
            rank = dist.get_rank() if dist.is_initialized() else 0
            overlaps = segment_overlaps(sizes, rank * length, length)
            tensors = torch.tensor([tensor for tensor, _, _ in overlaps], dtype=torch.long, device=gradient.device)
            counts = torch.tensor([count for _, _, count in overlaps], dtype=torch.long, device=gradient.device)
            self._segments[index] = (overlaps, tensors, counts)
        return self._segments[index]

    def gradient_norm(self) -> Tensor:
        """L2 norm of all gradients of the latest step before clipping, a 0-d tensor on their device."""
        return torch.cat(list(self.squared_norms.values())).sum().sqrt()
