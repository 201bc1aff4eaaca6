"""Transformer blocks over packed tokens.

Sequences of different lengths stand one after another in a single matrix [M, D], sequences of equal length side by side
(segment-major). Everything but attention works on the whole matrix; attention sees each run of equal lengths as a view.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from xkd_fast.model.attention import Attend, patch_probabilities
from xkd_fast.model.layers import gelu_linear, norm_linear
from xkd_fast.reference import Block

BACKEND = "inductor"  # of torch.compile
PROGRAMS = 64  # compiled programs per function at most


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


def _joined(mixed: list[Tensor]) -> Tensor:
    rows = [part.flatten(0, 1) for part in mixed]
    return torch.cat(rows) if len(rows) > 1 else rows[0]


F = TypeVar("F", bound=Callable[..., object])


class BlockRunner:
    """How blocks are run: with which attention, compiled or not, keeping their insides for the backward pass or not.

    Args:
        attend: attention backend.
        compiled: pass every function through ``torch.compile``. All blocks of one kind and token count share the result.
        checkpointed: keep only what enters a block and compute the block again in the backward pass.
    """

    def __init__(self, attend: Attend, *, compiled: bool, checkpointed: bool) -> None:
        self.attend, self.checkpointed, self._compiled = attend, checkpointed, compiled
        self._programs: dict[Callable[..., object], Callable[..., object]] = {}
        if compiled:  # one program per token count, with and without gradient: more than the default admits
            torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, PROGRAMS)
        self.block = self.compile(run_block)
        self.last_block = self.compile(run_last_block)

    def compile(self, function: F) -> F:
        """``function``, compiled if that is wanted; the same one for the same function."""
        if not self._compiled:
            return function
        if function not in self._programs:
            self._programs[function] = torch.compile(function, dynamic=False, fullgraph=True, backend=BACKEND)
        return self._programs[function]  # type: ignore[return-value]

    def blocks(self, blocks: Sequence[nn.Module], x: Tensor, groups: Sequence[Group]) -> Tensor:
        """A stack of blocks on packed tokens [M, D]."""
        for block in blocks:
            if self.checkpointed and torch.is_grad_enabled():
                x = checkpoint(self.block, block, x, groups, self.attend, use_reentrant=False, preserve_rng_state=False)
            else:
                x = self.block(block, x, groups, self.attend)  # type: ignore[arg-type]
        return x
