"""How much autograd keeps for the backward pass."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

import torch
from torch import Tensor


class Kept:
    """Bytes of distinct storages kept for the backward pass, parameters left out, by part of the step.

    Listen with it to the parts (``components.listening``); without, all counts as ``other``.
    """

    def __init__(self) -> None:
        self.bytes: dict[str, int] = defaultdict(int)
        self._part, self._seen = "other", set[int]()

    def enter(self, name: str) -> None:
        """A part begins."""
        self._part = name

    def leave(self, name: str) -> None:
        """It ends."""
        self._part = "other"

    def count(self, forward: Callable[[], Tensor]) -> None:
        """Run ``forward`` and count what its graph keeps."""
        with torch.autograd.graph.saved_tensors_hooks(self._keep, lambda tensor: tensor):
            result = forward()  # alive until all is counted: a freed storage's address would be used again
        del result

    def _keep(self, tensor: Tensor) -> Tensor:
        root = tensor._base if tensor._base is not None else tensor
        storage = tensor.untyped_storage()
        if not isinstance(root, torch.nn.Parameter) and storage.data_ptr() not in self._seen:
            self._seen.add(storage.data_ptr())
            self.bytes[self._part] += storage.nbytes()
        return tensor.detach()  # itself, the output of a node that keeps it would keep the node for ever
