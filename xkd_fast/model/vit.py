"""Transformer blocks over packed tokens: everything but attention works on the whole matrix."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from xkd_fast.errors import UserError
from xkd_fast.model.attention import Attention, PackedAttend, patch_probabilities
from xkd_fast.model.layers import gelu_linear, norm_linear
from xkd_fast.model.packing import Group, heads_of, unpack
from xkd_fast.reference import Block

BACKEND = "inductor"  # of torch.compile
PROGRAMS = 64  # compiled programs per function at most


def mlp(block: Block, x: Tensor) -> Tensor:
    """The second half of a block, any leading shape."""
    return x + gelu_linear(norm_linear(x, block.norm2, block.fc1), block.fc2)


def run_block(block: Block, x: Tensor, groups: Sequence[Group], attend: PackedAttend) -> Tensor:
    """A block on packed tokens [M, D]."""
    return mlp(block, x + block.proj(attend(norm_linear(x, block.norm1, block.qkv), groups, block.heads)))


def run_last_block(
    block: Block, x: Tensor, groups: Sequence[Group], attend: PackedAttend, *, has_cls: bool
) -> tuple[Tensor, list[Tensor]]:
    """A block on packed tokens, and each group's probabilities of the patches, [sequences, h, N]."""
    qkv = norm_linear(x, block.norm1, block.qkv)
    probabilities = []
    for part in unpack(qkv, groups):
        q, k, _ = heads_of(part, block.heads)
        probabilities.append(patch_probabilities(q, k, has_cls=has_cls))
    return mlp(block, x + block.proj(attend(qkv, groups, block.heads))), probabilities


F = TypeVar("F", bound=Callable[..., object])


def require_compiler() -> None:
    """Make sure that torch.compile has what it compiles with.

    Raises:
        UserError: there is no C++ compiler that works.
    """
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise UserError(
            "model.compile = true needs a C++ compiler, and none is found that works; install g++ (Debian, Ubuntu: "
            "apt install g++), name one in CXX, or set model.compile=false"
        ) from error


class BlockRunner:
    """How blocks are run: with which attention, compiled or not, keeping their insides for the backward pass or not.

    Args:
        attention: its backend.
        compiled: pass every function through ``torch.compile``. All blocks of one kind and token count share the result.
        checkpointed: keep only what enters a block and compute the block again in the backward pass.
    """

    def __init__(self, attention: Attention, *, compiled: bool, checkpointed: bool) -> None:
        self.attention, self.checkpointed, self._compiled = attention, checkpointed, compiled
        self._programs: dict[Callable[..., object], Callable[..., object]] = {}
        if compiled:  # one program per token count, with and without gradient: more than the default admits
            torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, PROGRAMS)
        self.block = self.compile(run_block)
        self._last_block = self.compile(run_last_block)

    def compile(self, function: F) -> F:
        """``function``, compiled if that is wanted; the same one for the same function."""
        if not self._compiled:
            return function
        if function not in self._programs:
            self._programs[function] = torch.compile(function, dynamic=False, fullgraph=True, backend=BACKEND)
        return self._programs[function]  # type: ignore[return-value]

    def blocks(self, blocks: Sequence[nn.Module], x: Tensor, groups: Sequence[Group]) -> Tensor:
        """A stack of blocks on packed tokens [M, D]."""
        attend = self.attention.attend_packed
        for block in blocks:
            if self.checkpointed and torch.is_grad_enabled():
                x = checkpoint(self.block, block, x, groups, attend, use_reentrant=False, preserve_rng_state=False)
            else:
                x = self.block(block, x, groups, attend)  # type: ignore[arg-type]
        return x

    def last_block(self, block: Block, x: Tensor, groups: Sequence[Group], *, has_cls: bool) -> tuple[Tensor, list[Tensor]]:
        """:func:`run_last_block` with this attention."""
        return self._last_block(block, x, groups, self.attention.attend_packed, has_cls=has_cls)
