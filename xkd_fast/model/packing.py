"""Sequences of different lengths as one matrix of tokens [M, D], those of equal length side by side (segment-major)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Group:
    """A run of sequences of equal length in a packed matrix."""

    sequences: int
    length: int

    @property
    def rows(self) -> int:
        """Rows of the matrix that the run takes."""
        return self.sequences * self.length


def pack(sequences: Sequence[Tensor]) -> tuple[Tensor, list[Group]]:
    """Pack [B, n, D] tensors into one [M, D] matrix; neighbours of equal length become one group."""
    groups: list[Group] = []
    for tokens in sequences:
        count, length = tokens.shape[:2]
        if groups and groups[-1].length == length:
            groups[-1] = Group(groups[-1].sequences + count, length)
        else:
            groups.append(Group(count, length))
    return joined([tokens.flatten(0, 1) for tokens in sequences]), groups


def unpack(packed: Tensor, groups: Sequence[Group]) -> list[Tensor]:
    """Views [sequences, length, …] of each group's rows."""
    parts = packed.split([group.rows for group in groups])
    return [part.view(group.sequences, group.length, -1) for part, group in zip(parts, groups, strict=True)]


def added(x: Tensor, branch: Tensor | None) -> Tensor:
    """A stream and the branch that is still to be added to it; None = nothing."""
    return x if branch is None else x + branch


def joined(rows: Sequence[Tensor]) -> Tensor:
    """Matrices of one width below each other, [M, D]; a single one as it is."""
    return torch.cat(list(rows)) if len(rows) > 1 else rows[0]


def heads_of(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Split [B, n, 3·D] into q, k and v [B, h, n, d], views."""
    batch, length, _ = qkv.shape
    q, k, v = qkv.view(batch, length, 3, heads, -1).permute(2, 0, 3, 1, 4)
    return q, k, v
