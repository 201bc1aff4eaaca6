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
from xkd_fast.errors import UserError
from xkd_fast.model.precision import as_written
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

    Raises:
        UserError: the pass cannot be recorded.
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
        self._signature = signature(views, masks)
        static_views, static_masks = with_tensors(views, masks, self._inputs)
        half = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None

        def run() -> None:
            # autocast must not remember casts of weights from outside: the recording would go on with old ones
            context = torch.autocast(device.type, half, enabled=half is not None, cache_enabled=False)
            with torch.enable_grad(), context:
                losses = losses_of(static_views, static_masks)
            with as_written(device):  # this is called under autocast, but a backward pass is not to run under it
                gradients = torch.autograd.grad(losses.total, parameters, allow_unused=True)
            self._losses, self._gradients = detached(losses), list(gradients)

        prepare()
        try:
            self._replay = record(run, device)
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:300]
            raise UserError(f"model.cuda_graph = true cannot be recorded here ({reason}); set it to false") from error

    def fits(self, views: Views, masks: MaskNoise) -> bool:
        """Whether a batch can pass: of the recorded shapes and types, under the recorded autocast."""
        return signature(views, masks) == self._signature

    def __call__(self, views: Views, masks: MaskNoise) -> Losses:
        """Losses of a batch; ``total`` can be differentiated, by the parameters alone, until the next call."""
        self._prepare()
        torch._foreach_copy_(self._inputs, tensors_of(views, masks))
        self._replay()
        assert self._losses is not None
        losses = cloned(self._losses)
        reached = [(p, g) for p, g in zip(self.parameters, self._gradients, strict=True) if g is not None]
        gradients = [gradient for _, gradient in reached]
        return replace(losses, total=_Replayed.apply(gradients, losses.total, *(parameter for parameter, _ in reached)))


class _Replayed(torch.autograd.Function):
    """A loss whose gradients are known."""

    @staticmethod
    def forward(ctx: Any, gradients: list[Tensor], total: Tensor, *parameters: Tensor) -> Tensor:
        ctx.gradients = gradients
        return total.view_as(total)

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> Any:  # type: ignore[override]
        return None, None, *torch._foreach_mul(ctx.gradients, scale)  # new tensors: the next pass overwrites the recorded ones


def signature(views: Views, masks: MaskNoise) -> tuple[object, ...]:
    """What batches of one recording have in common: autocast's type, and shape, type and device of every tensor."""
    kind = views.video_global.device.type
    half = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    return half, *((tuple(tensor.shape), tensor.dtype, tensor.device) for tensor in tensors_of(views, masks))


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
