"""Trainable tensors sorted by how the optimiser treats them, and where their numbers lie once ZeRO has shared them out."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn


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


@dataclass(frozen=True)
class Piece:
    """Numbers of one tensor within a flat buffer."""

    tensor: int  # its place in its group
    start: int  # the first number's place in the buffer
    count: int


def slice_of(sizes: list[int], start: int, length: int) -> list[Piece]:
    """What the slice [start, start + length) of tensors laid end to end holds: ZeRO 1 and 2."""
    pieces, position = [], 0
    for index, size in enumerate(sizes):
        begin, end = max(position, start), min(position + size, start + length)
        if begin < end:
            pieces.append(Piece(index, begin - start, end - begin))
        position += size
    return pieces


def shares_of(tensors: list[int], sizes: list[int], shares: list[int], rank: int) -> list[Piece]:
    """What a rank's buffer holds where every tensor is cut into equal shares, one per rank, padded at its end: ZeRO 3.

    Args:
        tensors: the places of the buffer's tensors in their group, in the buffer's order.
        sizes, shares: numbers of each of them, and of its share.
        rank: whose buffer it is.
    """
    pieces, position = [], 0
    for tensor, size, share in zip(tensors, sizes, shares, strict=True):
        count = max(0, min(share, size - rank * share))
        if count:
            pieces.append(Piece(tensor, position, count))
        position += share
    return pieces


def indices_on(places: list[int], device: torch.device) -> Tensor:
    """Places as a tensor on the device; the copy does not wait for it."""
    indices = torch.tensor(places, dtype=torch.long)
    return indices.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else indices
