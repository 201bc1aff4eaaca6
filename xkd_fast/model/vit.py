"""Transformer blocks over packed tokens: everything but attention works on the whole matrix."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from xkd_fast.errors import UserError
from xkd_fast.model.attention import Attention, PackedAttend, packed_patch_probabilities
from xkd_fast.model.layers import mlp, residual_norm_linear
from xkd_fast.model.packing import Group, added
from xkd_fast.model.products import through
from xkd_fast.reference import Block

BACKEND = "inductor"  # of torch.compile
PROGRAMS = 64  # compiled programs per function at most


def run_block(
    block: Block, x: Tensor, branch: Tensor | None, groups: Sequence[Group], attend: PackedAttend, kernels: str
) -> tuple[Tensor, Tensor]:
    """A block on packed tokens [M, D], in two parts that are still to be added: the stream, and the MLP's branch.

    What enters it is in two parts too (the branch of the first block is None), because a sum and the norm that follows it are
    one operator.
    """
    x, qkv = residual_norm_linear(x, branch, block.norm1, block.qkv, kernels)
    branch = through(block.proj, attend(qkv, groups, block.heads))
    return mlp(x, branch, block.norm2, block.fc1, block.fc2, kernels)


def run_last_block(
    block: Block,
    x: Tensor,
    branch: Tensor | None,
    groups: Sequence[Group],
    attend: PackedAttend,
    kernels: str,
    *,
    has_cls: bool,
) -> tuple[Tensor, list[Tensor]]:
    """A block on packed tokens, whole, and each group's probabilities of the patches, [sequences, h, N]."""
    x, qkv = residual_norm_linear(x, branch, block.norm1, block.qkv, kernels)
    probabilities = packed_patch_probabilities(qkv, groups, block.heads, kernels, has_cls=has_cls)
    branch = through(block.proj, attend(qkv, groups, block.heads))
    return added(*mlp(x, branch, block.norm2, block.fc1, block.fc2, kernels)), probabilities


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
    """How blocks are run: with which attention and kernels, compiled or not, their insides kept for the backward pass or not.

    Args:
        attention: its backend.
        kernels: who computes everything else, as ``model.kernels`` says it.
        compiled: pass every function through ``torch.compile``. All blocks of one kind and token count share the result.
        checkpointed: keep only what enters a block and compute the block again in the backward pass.
    """

    def __init__(self, attention: Attention, kernels: str, *, compiled: bool, checkpointed: bool) -> None:
        self.attention, self.kernels, self.checkpointed, self._compiled = attention, kernels, checkpointed, compiled
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

    def blocks(self, blocks: Sequence[nn.Module], x: Tensor, groups: Sequence[Group]) -> tuple[Tensor, Tensor | None]:
        """A stack of blocks on packed tokens [M, D]; the stream and a branch that is still to be added to it, as of a block."""
        branch: Tensor | None = None
        how = (groups, self.attention.attend_packed, self.kernels)
        for block in blocks:
            if self.checkpointed and torch.is_grad_enabled():  # added before, so that one matrix is kept and not two
                x, branch = added(x, branch), None
                x, branch = checkpoint(self.block, block, x, branch, *how, use_reentrant=False, preserve_rng_state=False)
            else:
                x, branch = self.block(block, x, branch, *how)  # type: ignore[arg-type]
        return x, branch

    def last_block(
        self, block: Block, x: Tensor, branch: Tensor | None, groups: Sequence[Group], *, has_cls: bool
    ) -> tuple[Tensor, list[Tensor]]:
        """:func:`run_last_block` with this attention and these kernels."""
        return self._last_block(block, x, branch, groups, self.attention.attend_packed, self.kernels, has_cls=has_cls)
