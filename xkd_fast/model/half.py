"""Teachers' linear weights in autocast's type, or in E4M3, cast once per update instead of once per use."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import nn

from xkd_fast.model.fp8 import Fp8Linear


class HalfCopy:
    """Copies of modules whose linear layers hold their weights in ``dtype``; every other parameter is the original's own.

    Shared layers stay shared. In the place of those that ``fp8`` stands for it stands itself, with a bias in ``dtype``. The
    copies follow their originals: :meth:`fresh` casts anew when any weight has changed since.
    """

    def __init__(self, originals: nn.ModuleDict, dtype: torch.dtype, fp8: Sequence[Fp8Linear] = ()) -> None:
        self.dtype, self._fp8 = dtype, fp8
        layers: dict[int, object] = {id(layer.original): layer for layer in fp8}
        eighths = {id(layer.original.weight): layer.original.weight for layer in fp8}
        linear = {
            id(p): p
            for m in originals.modules()
            if isinstance(m, nn.Linear)
            for p in m.parameters(recurse=False)
            if id(p) not in eighths
        }
        halves = {key: nn.Parameter(p.detach().to(dtype), requires_grad=False) for key, p in linear.items()}
        others: dict[int, object] = {id(p): p for p in originals.parameters() if id(p) not in linear}
        self._originals: list[torch.Tensor] = list(linear.values())
        self._halves: list[torch.Tensor] = list(halves.values())
        self._watched = [*self._originals, *eighths.values()]
        self._version = -1  # sum of the originals' when they were last copied; they only grow
        for layer in fp8:
            if layer.original.bias is not None:
                layer.bias = halves[id(layer.original.bias)]
        self._copies = copy.deepcopy(originals, others | halves | layers)

    def follows(self, weight: torch.Tensor, dtype: torch.dtype) -> bool:
        """Whether these are copies in ``dtype`` of the modules that hold ``weight``, where they are now."""
        is_among = any(weight is original for original in self._originals)
        return is_among and dtype == self.dtype and weight.device == self._halves[0].device

    def halves(self) -> dict[int, torch.Tensor]:
        """The cast weights by ``id`` of their originals."""
        return {id(original): half for original, half in zip(self._originals, self._halves, strict=True)}

    @torch.no_grad()
    def settle(self) -> None:
        """Somebody else has just cast every weight of :meth:`halves`."""
        for layer in self._fp8:
            layer.follow()
        self._version = self._version_now()

    def _version_now(self) -> int:
        return sum(parameter._version for parameter in self._watched)

    def expire(self) -> None:
        """The originals have changed in a way that their versions do not tell."""
        self._version = -1

    @torch.no_grad()
    def fresh(self) -> nn.ModuleDict:
        """The copies, cast anew if an original has changed."""
        if self._version_now() != self._version:
            torch._foreach_copy_(self._halves, self._originals)
            self.settle()
        return self._copies
