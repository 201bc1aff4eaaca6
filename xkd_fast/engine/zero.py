"""What ZeRO does with the model's tensors, and how this trainer's optimiser, teachers and checkpoints find them again.

Everything here reads DeepSpeed's own attributes (0.19): where it keeps its flat buffers and in which order. Tests hold every
stage against a plain single-process step, so that a change of theirs is noticed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from xkd_fast.engine.ema import Teachers
from xkd_fast.engine.groups import Piece, shares_of
from xkd_fast.engine.optimizer import ClippedAdamW
from xkd_fast.objective.losses import Losses


def gather_whole_model(model: nn.Module) -> None:
    """Before DeepSpeed takes a model over at ZeRO 3: all tensors are gathered for a pass, and let go of in the step after it.

    The fast model uses tensors outside of the modules that own them, so the unit of gathering is the whole model; ZeRO 3 saves
    the memory of gradients, moments and weights between passes. What the forward pass returns becomes a pair, because
    DeepSpeed finds the tensor to begin its backward pass with in tuples alone; :func:`told_losses` undoes it.
    """
    from deepspeed.runtime.zero.partition_parameters import register_external_parameter

    for parameter in model.parameters():
        register_external_parameter(model, parameter)
    forward = model.forward

    def forward_in_pairs(*arguments: Any) -> tuple[Tensor, Losses]:
        losses: Losses = forward(*arguments)
        return losses.total, losses

    model.forward = forward_in_pairs  # type: ignore[method-assign]


def told_losses(found: Losses | tuple[Tensor, Losses]) -> Losses:
    """The losses that a forward pass returned, with the total that DeepSpeed handed on."""
    if isinstance(found, Losses):
        return found
    total, losses = found
    return replace(losses, total=total)


def arrange(deepspeed: Any, optimizer: ClippedAdamW, teachers: Teachers, stage: int) -> None:
    """Tell the optimiser and the teachers what DeepSpeed has made of their tensors; to be called once after it started."""
    wrapped = deepspeed.optimizer
    if stage in (1, 2):
        if wrapped.cpu_offload:
            # it would take a norm that nobody uses, and skip a step without a word where it is not finite; and look at every
            # gradient, waiting for each
            wrapped.scaled_global_norm = lambda *_, **__: 0.0
            wrapped.update_offload_overflow_tracker = lambda gradient: None
        else:
            _one_copy_of_weights(wrapped)
        optimizer.expect(len(wrapped.bit16_groups), {}, lambda: _publish_partitions(wrapped))
    if stage == 3:
        layouts = _layouts(wrapped, optimizer)
        optimizer.expect(len(wrapped.fp16_groups), layouts, lambda: _publish_shares(wrapped))
        # it would take a norm that nobody uses, wait for it, and skip a step without a word where it is not finite
        wrapped._get_norm_groups = lambda: [0.0]
        teachers.share_of = _share_of


def _share_of(tensor: Tensor) -> Tensor:
    """This rank's share of a tensor at ZeRO 3, flat, without the padding at its end: nobody ever writes that."""
    share: Tensor = tensor.ds_tensor.data  # type: ignore[attr-defined]
    held = tensor.ds_numel - dist.get_rank() * share.numel()  # type: ignore[attr-defined]
    return share[: max(0, min(share.numel(), held))]


def _one_copy_of_weights(wrapped: Any) -> None:
    """ZeRO 1 and 2 keep float32 weights twice where the model's own are float32: let the partition be a part of the model's.

    DeepSpeed's views of the partition that was, one per parameter, would keep its memory; they become views of the new one.
    """
    rank = dist.get_rank()
    for partition, parts, parameters in zip(
        wrapped.single_partition_of_fp32_groups,
        wrapped.parallel_partitioned_bit16_groups,
        wrapped.bit16_groups,
        strict=True,
    ):
        own = parts[rank].data
        if own.dtype != partition.dtype or own.device != partition.device:
            continue
        partition.data = own
        for parameter in parameters:
            mapping = parameter._hp_mapping
            if mapping is not None:
                place = mapping.hp_fragment_address
                mapping.hp_fragment = own.narrow(0, place.start, place.numel)


@contextmanager
def partitions_apart(deepspeed: Any) -> Iterator[None]:
    """Inside, partitions that are a part of the model have memory of their own: saving a view saves all that it looks at."""
    wrapped = deepspeed.optimizer
    partitions = getattr(wrapped, "single_partition_of_fp32_groups", [])
    places = [partition.data for partition in partitions]
    for partition in partitions:
        partition.data = partition.data.clone()
    try:
        yield
    finally:
        for partition, place in zip(partitions, places, strict=True):
            partition.data = place


def _publish_partitions(wrapped: Any) -> None:
    """Copy the moved partitions to the model, where they are not a part of it."""
    rank = dist.get_rank()
    for partition, parts in zip(
        wrapped.single_partition_of_fp32_groups, wrapped.parallel_partitioned_bit16_groups, strict=True
    ):
        if partition.data_ptr() != parts[rank].data_ptr():
            parts[rank].data.copy_(partition.data)


def _publish_shares(wrapped: Any) -> None:
    """The same at ZeRO 3."""
    for own, moved in zip(wrapped.fp16_partitioned_groups_flat, wrapped.fp32_partitioned_groups_flat, strict=True):
        if own.data_ptr() != moved.data_ptr():
            own.data.copy_(moved.data)


def _layouts(wrapped: Any, optimizer: ClippedAdamW) -> dict[int, list[Piece]]:
    """What each flat buffer of ZeRO 3 holds: equal shares of tensors, in DeepSpeed's order."""
    places = optimizer.places
    layouts = {}
    for flat, parameters in zip(wrapped.fp32_partitioned_groups_flat, wrapped.fp16_groups, strict=True):
        tensors = [places[id(parameter)][1] for parameter in parameters]
        sizes = [parameter.ds_numel for parameter in parameters]
        shares = [parameter.partition_numel() for parameter in parameters]
        assert sum(shares) == flat.numel()
        layouts[id(flat)] = shares_of(tensors, sizes, shares, dist.get_rank())
    return layouts


@contextmanager
def whole(parameters: list[nn.Parameter], *, writing: bool = False) -> Iterator[None]:
    """Inside, parameters have all of their numbers on every rank, also at ZeRO 3; ``writing`` keeps what rank 0 writes."""
    if not any(hasattr(parameter, "ds_id") for parameter in parameters):
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(parameters, modifier_rank=0 if writing else None):
        yield


def states_on(device: torch.device, stage: int, offloaded: bool) -> torch.device:
    """Where the optimiser moves parameters."""
    return torch.device("cpu") if offloaded and stage > 0 else device
