"""Transformer blocks over packed tokens.

Sequences of different lengths stand one after another in a single matrix [M, D], sequences of equal length side by side
(segment-major). Everything but attention works on the whole matrix; attention sees each run of equal lengths as a view.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from xkd_fast.model.attention import Attend, patch_probabilities
from xkd_fast.model.layers import gelu_linear, norm_linear
from xkd_fast.reference import Block


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
    rows = [tokens.flatten(0, 1) for tokens in sequences]
    return (torch.cat(rows) if len(rows) > 1 else rows[0]), groups


def unpack(packed: Tensor, groups: Sequence[Group]) -> list[Tensor]:
    """Views [sequences, length, …] of each group's rows."""
    parts = packed.split([group.rows for group in groups])
    return [part.view(group.sequences, group.length, -1) for part, group in zip(parts, groups, strict=True)]


def heads_of(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Split [B, n, 3·D] into q, k and v [B, h, n, d], views."""
    batch, length, _ = qkv.shape
    q, k, v = qkv.view(batch, length, 3, heads, -1).permute(2, 0, 3, 1, 4)
    return q, k, v


def mlp(block: Block, x: Tensor) -> Tensor:
    """The second half of a block, any leading shape."""
    return x + gelu_linear(norm_linear(x, block.norm2, block.fc1), block.fc2)


def run_block(block: Block, x: Tensor, groups: Sequence[Group], attend: Attend) -> Tensor:
    """A block on packed tokens [M, D]."""
    mixed = [attend(*heads_of(part, block.heads)) for part in unpack(norm_linear(x, block.norm1, block.qkv), groups)]
    return mlp(block, x + block.proj(_joined(mixed)))


def run_last_block(
    block: Block, x: Tensor, groups: Sequence[Group], attend: Attend, *, has_cls: bool
) -> tuple[Tensor, list[Tensor]]:
    """A block on packed tokens, and each group's probabilities of the patches, [sequences, h, N]."""
    mixed, probabilities = [], []
    for part in unpack(norm_linear(x, block.norm1, block.qkv), groups):
        q, k, v = heads_of(part, block.heads)
        probabilities.append(patch_probabilities(q, k, has_cls=has_cls))
        mixed.append(attend(q, k, v))
    return mlp(block, x + block.proj(_joined(mixed))), probabilities


def run_blocks(blocks: nn.ModuleList, x: Tensor, groups: Sequence[Group], attend: Attend) -> Tensor:
    """A stack of blocks on packed tokens [M, D]."""
    for block in blocks:
        x = run_block(block, x, groups, attend)  # type: ignore[arg-type]
    return x


def _joined(mixed: list[Tensor]) -> Tensor:
    rows = [part.flatten(0, 1) for part in mixed]
    return torch.cat(rows) if len(rows) > 1 else rows[0]
