"""Forward and backward pass as one recording: a CUDA graph launches all of their kernels with a single call.

Everything that a step changes lives at a fixed place: weights, teachers' casts, centres and temperatures are updated in place,
views and masks are copied into the recording's own inputs. What acts on gradients (hooks, reduction between ranks) stays
outside: a recorded pass hands its gradients to autograd as if it had just computed them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from xkd_fast.data.views import MaskNoise, Views
from xkd_fast.objective.losses import Losses, Outputs

WARM_UP = 3  # passes before recording: lazy initialisation, autotuning and compilation may not be recorded

Pass = Callable[[], None]
Recorder = Callable[[Pass, torch.device], Pass]


def record(run: Pass, device: torch.device) -> Pass:
    """A CUDA graph of ``run``, after some passes that get everything ready. Returns what repeats it."""
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            run()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # other threads may decode meanwhile
        run()
    return graph.replay


class RecordedPass:
    """Losses and gradients of batches of one shape.

    Args:
        losses_of: from views and masks to losses.
        parameters: what to differentiate by.
        views: the first batch; later ones must have its shapes and types.
        masks: its mask noise.
        prepare: brings up to date what the recording only reads, such as casts of weights; called before every pass.
        record: makes a repeatable pass out of one that writes into fixed places (:func:`record`).
    """

    def __init__(
        self,
        losses_of: Callable[[Views, MaskNoise], Losses],
        parameters: list[Tensor],
        views: Views,
        masks: MaskNoise,
        *,
        prepare: Callable[[], object],
        record: Recorder = record,
    ) -> None:
        self.parameters, self._prepare = parameters, prepare
        self._inputs = [tensor.clone() for tensor in tensors_of(views, masks)]
        self._losses: Losses | None = None
        self._gradients: list[Tensor | None] = []
        device = views.video_global.device
        static_views, static_masks = with_tensors(views, masks, self._inputs)
        half = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None

        def run() -> None:
            # autocast must not remember casts of weights from outside: the recording would go on with old ones
            context = torch.autocast(device.type, half, enabled=half is not None, cache_enabled=False)
            with torch.enable_grad(), context:
                losses = losses_of(static_views, static_masks)
            gradients = torch.autograd.grad(losses.total, parameters, allow_unused=True)
            self._losses, self._gradients = detached(losses), list(gradients)

        prepare()
        self._replay = record(run, device)

    def __call__(self, views: Views, masks: MaskNoise) -> Losses:
        """Losses of a batch; ``total`` can be differentiated, by the parameters alone, until the next call."""
        self._prepare()
        torch._foreach_copy_(self._inputs, tensors_of(views, masks))
        self._replay()
        assert self._losses is not None
        losses = cloned(self._losses)
        return replace(losses, total=_Replayed.apply(self._gradients, losses.total, *self.parameters))


class _Replayed(torch.autograd.Function):
    """A loss whose gradients are known."""

    @staticmethod
    def forward(ctx: Any, gradients: list[Tensor | None], total: Tensor, *parameters: Tensor) -> Tensor:
        ctx.gradients = gradients
        return total.view_as(total)

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> Any:  # type: ignore[override]
        present = [gradient for gradient in ctx.gradients if gradient is not None]
        scaled = iter(torch._foreach_mul(present, scale))  # new tensors: the recorded ones are overwritten by the next pass
        return None, None, *(None if gradient is None else next(scaled) for gradient in ctx.gradients)


def signature(views: Views, masks: MaskNoise) -> tuple[object, ...]:
    """What batches of one recording have in common: shapes, types and device of every tensor."""
    return tuple((tuple(tensor.shape), tensor.dtype, tensor.device) for tensor in tensors_of(views, masks))


def tensors_of(views: Views, masks: MaskNoise) -> list[Tensor]:
    """Every tensor that the model reads, in a fixed order."""
    clips = [views.video_global, *views.video_locals, views.audio_global, *views.audio_locals]
    return [*clips, masks.video, masks.audio]


def with_tensors(views: Views, masks: MaskNoise, tensors: list[Tensor]) -> tuple[Views, MaskNoise]:
    """The same structure around other tensors, in the order of :func:`tensors_of`."""
    rest = iter(tensors)
    video, video_locals = next(rest), [next(rest) for _ in views.video_locals]
    audio, audio_locals = next(rest), [next(rest) for _ in views.audio_locals]
    other = replace(views, video_global=video, video_locals=video_locals, audio_global=audio, audio_locals=audio_locals)
    return other, replace(masks, video=next(rest), audio=next(rest))


def detached(losses: Losses) -> Losses:
    """The same tensors without their graph."""
    return _mapped(losses, Tensor.detach)


def cloned(losses: Losses) -> Losses:
    """Copies that the next pass leaves alone."""
    return _mapped(losses, Tensor.clone)


def _mapped(losses: Losses, change: Callable[[Tensor], Tensor]) -> Losses:
    outputs = {f.name: {k: change(x) for k, x in getattr(losses.outputs, f.name).items()} for f in fields(Outputs)}
    terms = {f.name: change(getattr(losses, f.name)) for f in fields(Losses) if f.name != "outputs"}
    return Losses(**terms, outputs=Outputs(**outputs))
