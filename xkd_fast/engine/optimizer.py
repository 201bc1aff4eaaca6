"""AdamW with per-tensor gradient clipping: the same step on whole tensors (ZeRO 0) and on a rank's shard of them (ZeRO 1–3).

XKD clips each parameter tensor's gradient by its own L2 norm (XKD.md section 8). A rank may hold only pieces of a tensor, so
its norm is a sum over ranks: one all-reduce of a vector with one number per tensor. From these norms alone every rank also
knows whether any gradient overflowed, which float16 needs to know.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from xkd_fast.engine.ema import Teachers
from xkd_fast.engine.groups import ParameterGroup, Piece, indices_on, slice_of
from xkd_fast.engine.updates import Update
from xkd_kernels import Segments, squared_norms

CLIP_EPS = 1e-6


@dataclass(frozen=True)
class Share:
    """A tensor that the optimiser moves: a whole parameter, or a flat buffer with pieces of several."""

    group: dict[str, Any]  # torch's: options of the update
    parameter: Tensor
    gradient: Tensor
    slots: list[int]  # per piece: its tensor's place among all trainable tensors
    pieces: list[Piece]


class ClippedAdamW(torch.optim.Optimizer):
    """AdamW (decoupled decay) preceded by per-tensor gradient clipping, loss unscaling and last-layer freezing.

    DeepSpeed replaces the parameters of each group by a flat shard and steps the groups one at a time. Shards are recognised;
    with :meth:`expect` all groups of a step are gathered first and then moved together.

    Attributes:
        squared_norms: the squared gradient norm of every trainable tensor before clipping, in the groups' order, from the
            latest step; a frozen tensor's is 0. Float32, or wider where the gradients are.
        scales: what each tensor's gradient was multiplied by, loss unscaling included.
        last_layer_frozen: drop the last head layers' gradients, so that neither update nor decay acts on them.
        inverse_scale: 1 / the factor that the loss was multiplied by.
        watches_overflow: skip a step whose gradients are not all finite. Waits for the device.
        skipped: whether the latest step was.
        backend: of the norms, as ``squared_norms`` knows it.
        places: of every whole tensor by its ``id``: its group, and its place in it.
    """

    def __init__(
        self,
        groups: list[ParameterGroup],
        *,
        lr: float,
        clip_norm: float | None,
        update: Update,
        teachers: Teachers | None = None,
    ) -> None:
        """``teachers``: those that the update itself may move, where a student's parameter is whole and on its device."""
        self.clip_norm, self.update, self.teachers = clip_norm, update, teachers
        self.last_layer_frozen = self.watches_overflow = self.skipped = False
        self.inverse_scale, self.backend = 1.0, "auto"
        self.squared_norms = self.scales = torch.zeros(0)
        self._groups, self._sizes = groups, [[p.numel() for p in group.parameters] for group in groups]
        starts = [sum(len(group.names) for group in groups[:index]) for index in range(len(groups))]
        self._slots = [list(range(start, start + len(group.names))) for start, group in zip(starts, groups, strict=True)]
        self.places = {
            id(p): (index, tensor) for index, group in enumerate(groups) for tensor, p in enumerate(group.parameters)
        }
        self._clipped_slots: Tensor | None = None
        self._layouts: dict[int, list[Piece]] = {}
        self._calls, self._made = 1, 0
        self._waiting: list[Share] = []
        self._after: Callable[[], None] = lambda: None
        parameters: list[dict[str, Any]] = [
            {"params": group.parameters, "weight_decay": group.weight_decay, "index": index}
            for index, group in enumerate(groups)
        ]
        super().__init__(parameters, {**update.defaults, "lr": lr})

    def expect(self, calls: int, layouts: Mapping[int, list[Piece]], after: Callable[[], None]) -> None:
        """From now on a step consists of so many calls of :meth:`step`, each with some of the groups.

        Args:
            calls: calls per step; the last one moves everything.
            layouts: what flat buffers hold, by their ``id``; of others a slice of the group laid end to end is assumed.
            after: called when everything has moved.
        """
        self._calls, self._layouts, self._after = calls, dict(layouts), after

    def set_learning_rate(self, lr: float) -> None:
        """Set every group's learning rate."""
        for group in self.param_groups:
            group["lr"] = lr

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Clip, drop frozen gradients, and take an AdamW step, once all groups are there."""
        for group in self.param_groups:
            frozen = self.last_layer_frozen and self._groups[group["index"]].last_layer
            for parameter in group["params"]:
                if parameter.grad is None or frozen:
                    continue
                self._waiting.append(self._share(group, parameter))
                self.update.prepare(self.state[parameter], parameter)
        self._made += 1
        if self._made < self._calls:
            return
        shares, self._waiting, self._made = self._waiting, [], 0
        self._move(shares)
        self._after()

    def _share(self, group: dict[str, Any], parameter: Tensor) -> Share:
        place, gradient = self.places.get(id(parameter)), parameter.grad
        assert gradient is not None
        if place is not None and parameter.numel() == self._sizes[place[0]][place[1]]:
            pieces = [Piece(place[1], 0, parameter.numel())]
        else:
            if id(parameter) not in self._layouts:
                self._layouts[id(parameter)] = self._slice(group["index"], parameter.numel())
            pieces = self._layouts[id(parameter)]
        slots = [self._slots[group["index"]][piece.tensor] for piece in pieces]
        return Share(group, parameter, gradient, slots, pieces)

    def _slice(self, index: int, length: int) -> list[Piece]:
        sizes, world = self._sizes[index], dist.get_world_size() if dist.is_initialized() else 1
        if not sum(sizes) <= length * world:
            raise RuntimeError(f"a shard of {length} numbers on each of {world} ranks cannot hold {sum(sizes)}")
        return slice_of(sizes, (dist.get_rank() if dist.is_initialized() else 0) * length, length)

    def _move(self, shares: list[Share]) -> None:
        segments = Segments(
            [number for number, share in enumerate(shares) for _ in share.pieces],
            [piece.start for share in shares for piece in share.pieces],
            [piece.count for share in shares for piece in share.pieces],
        )
        gradients = [share.gradient for share in shares]
        slots = [slot for share in shares for slot in share.slots]
        is_sharded = any(id(share.parameter) not in self.places for share in shares)
        self.squared_norms = self._norms_of_tensors(gradients, segments, slots, is_sharded)
        self.skipped = self.watches_overflow and not bool(self.squared_norms.isfinite().all())
        self.squared_norms = self.squared_norms * self.inverse_scale**2
        if self.skipped:
            return
        self.scales = self._clipping(self.squared_norms) * self.inverse_scale
        places = indices_on(slots, self.scales.device)
        self.update(shares, segments, self.scales[places], self.state, None if is_sharded else self.teachers)

    def _norms_of_tensors(self, gradients: list[Tensor], segments: Segments, slots: list[int], is_sharded: bool) -> Tensor:
        """Squared norms by slot, of all ranks' pieces where tensors are shared out."""
        count = sum(len(each) for each in self._slots)
        own = squared_norms(gradients, segments, backend=self.backend) if segments.count else torch.zeros(0)
        found = own.new_zeros(count, device=gradients[0].device if gradients else None)
        if slots:
            found.index_copy_(0, indices_on(slots, found.device), own)  # a rank has at most one piece of a tensor
        if is_sharded and dist.is_initialized():
            found = _summed_over_ranks(found)
        return found

    def _clipping(self, squared: Tensor) -> Tensor:
        """What to multiply each tensor's unscaled gradient by."""
        if self.clip_norm is None:
            return torch.ones_like(squared)
        if self._clipped_slots is None or self._clipped_slots.device != squared.device:
            flags = [int(group.clipped) for group in self._groups for _ in group.names]
            self._clipped_slots = indices_on(flags, squared.device).bool()
        scale = (self.clip_norm / (squared.sqrt() + CLIP_EPS)).clamp(max=1.0)
        return torch.where(self._clipped_slots, scale, 1.0)

    def gradient_norm(self) -> Tensor:
        """L2 norm of all gradients of the latest step before clipping, a 0-d tensor on their device."""
        return self.squared_norms.sum().sqrt()

    def clipped_gradient_norm(self) -> Tensor:
        """The same after clipping."""
        return (self.squared_norms * (self.scales / self.inverse_scale).square()).sum().sqrt()


def _summed_over_ranks(numbers: Tensor) -> Tensor:
    """Where they are; NCCL wants offloaded ones on the GPU."""
    on_device = numbers.cuda() if dist.get_backend() == "nccl" else numbers
    dist.all_reduce(on_device)
    return on_device.to(numbers.device)
