"""The optimiser's step in a few launches: gradient norms, then clipping + AdamW + EMA teacher + its bfloat16 copy.

All tensors of a step go together, as lists: whole parameters, or flat buffers in which ZeRO keeps pieces of many. A table of
segments says which numbers belong to one parameter, because gradients are clipped one parameter at a time. Per number p with
gradient g, moments m and v, teacher t (scale: what clipping makes of g):

    m ← m + (1 − β₁)(scale·g − m)              v ← β₂·v + (1 − β₂)(scale·g)²
    p ← p·(1 − lr·decay) − lr/(1 − β₁ⁿ) · m / (√v / √(1 − β₂ⁿ) + ε)
    t ← t + (1 − momentum)(p − t)

Floor in bytes per number: 4 for a norm, 28 for AdamW, 8 more for the teacher and 2 for its copy.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from xkd_kernels.backends import backend_of
from xkd_kernels.native import AdamW, library

OPERATOR = "adamw_ema"


@dataclass(frozen=True)
class Segments:
    """Stretches of numbers in a list of tensors: the i-th is ``count[i]`` numbers of ``tensor[i]`` from ``start[i]`` on."""

    tensor: list[int]
    start: list[int]
    count: list[int]

    @classmethod
    def whole(cls, tensors: Sequence[Tensor]) -> Segments:
        """One segment per tensor, all of it."""
        return cls(list(range(len(tensors))), [0] * len(tensors), [tensor.numel() for tensor in tensors])

    def check(self, tensors: Sequence[Tensor]) -> None:
        """Raise ``ValueError`` where a segment leaves its tensor."""
        for i, (tensor, start, count) in enumerate(zip(self.tensor, self.start, self.count, strict=True)):
            if not 0 <= tensor < len(tensors):
                raise ValueError(f"segment {i} is of tensor {tensor}, but there are {len(tensors)}")
            if start < 0 or count < 0 or start + count > tensors[tensor].numel():
                size = tensors[tensor].numel()
                raise ValueError(f"segment {i}, numbers {start} to {start + count}, leaves its tensor {tensor} of {size}")


# ---------------------------------------------------------------------------------------------------------------- naive twins


def naive_squared_norms(gradients: Sequence[Tensor], segments: Segments) -> Tensor:
    """The definition: the sum of the squares of every segment, [segments]."""
    parts = zip(segments.tensor, segments.start, segments.count, strict=True)
    return torch.stack([gradients[i].reshape(-1)[start : start + count].square().sum() for i, start, count in parts])


def naive_adamw_ema(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    firsts: Sequence[Tensor],
    seconds: Sequence[Tensor],
    scales: Tensor,
    segments: Segments,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decays: Sequence[float],
    step: int,
    teachers: Sequence[Tensor | None] = (),
    follow: Sequence[float] = (),
) -> None:
    """The definition, in place, one segment after the other, in the type of its tensors."""
    parts = zip(segments.tensor, segments.start, segments.count, scales.tolist(), strict=True)
    for i, start, count, scale in parts:
        p, g, m, v = (t[i].reshape(-1)[start : start + count] for t in (parameters, gradients, firsts, seconds))
        g = g * scale
        m.add_((1 - betas[0]) * (g - m))
        v.mul_(betas[1]).add_((1 - betas[1]) * g * g)
        root = v.sqrt() / math.sqrt(1 - betas[1] ** step) + eps
        p.mul_(1 - lr * weight_decays[i]).sub_(lr / (1 - betas[0] ** step) * m / root)
        teacher = teachers[i] if teachers else None
        if teacher is not None:
            t = teacher.reshape(-1)[start : start + count]
            t.add_(follow[i] * (p - t))


# --------------------------------------------------------------------------------------------------------------------- calls


def squared_norms(gradients: Sequence[Tensor], segments: Segments, *, backend: str = "auto") -> Tensor:
    """The squared L2 norm of every segment.

    Args:
        gradients: contiguous tensors of one device and floating type.
        segments: which of their numbers belong together.
        backend: see :mod:`xkd_kernels.backends`.

    Returns:
        [segments], float32, or wider where the gradients are.

    Raises:
        ValueError: a segment leaves its tensor, or tensors that do not fit together.
        BackendError: a backend that cannot run here.
    """
    _check(gradients)
    segments.check(gradients)
    if not segments.count:
        return torch.empty(0)
    chosen = backend_of(OPERATOR, gradients[0].device, gradients[0].dtype, "", backend)
    return _squared_norms(list(gradients), segments.tensor, segments.start, segments.count, chosen)


def adamw_ema_(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    firsts: Sequence[Tensor],
    seconds: Sequence[Tensor],
    scales: Tensor,
    segments: Segments,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decays: Sequence[float],
    step: int,
    teachers: Sequence[Tensor | None] = (),
    follow: Sequence[float] = (),
    copies: Sequence[Tensor | None] = (),
    backend: str = "auto",
) -> None:
    """One AdamW step on every segment, in place, and teachers that follow. Numbers outside of all segments stay as they are.

    Args:
        parameters, gradients, firsts, seconds: contiguous tensors, four of the same size and type each: parameters, their
            gradients (which are read, and may be scaled in place), AdamW's moments.
        scales: [segments] float32, what to multiply each segment's gradient by before it is used.
        segments: which numbers to move.
        lr, betas, eps: AdamW's.
        weight_decays: decoupled weight decay per parameter tensor.
        step: AdamW's steps so far, this one included: 1 is the first.
        teachers: per parameter tensor, one of its size that follows it, or None; () = none at all.
        follow: per parameter tensor, 1 − the EMA momentum of its teacher.
        copies: per parameter tensor, a tensor of its teacher's size that receives the teacher in its own type, or None.
        backend: see :mod:`xkd_kernels.backends`.

    Raises:
        ValueError: tensors or numbers that do not fit together.
        BackendError: a backend that cannot run here.
    """
    _check(parameters, gradients, firsts, seconds)
    segments.check(parameters)
    if scales.shape != (len(segments.count),):
        raise ValueError(f"scales has the shape {list(scales.shape)}, but [{len(segments.count)}], one per segment, is wanted")
    if len(weight_decays) != len(parameters):
        raise ValueError(f"{len(weight_decays)} weight decays for {len(parameters)} parameters")
    if step < 1:
        raise ValueError(f"step = {step} must be 1 or more")
    if not segments.count:
        return
    followers, taught = _given(teachers, parameters, "teachers")
    copied, copied_of = _given(copies, parameters, "copies")
    if followers and len(follow) != len(parameters):
        raise ValueError(f"{len(follow)} numbers in follow for {len(parameters)} parameters")
    if not set(copied_of) <= set(taught):
        raise ValueError("a copy is given where there is no teacher to copy")
    chosen = backend_of(OPERATOR, parameters[0].device, parameters[0].dtype, "", backend)
    if any(copy.dtype != torch.bfloat16 for copy in copied):
        chosen = _only_torch(chosen, backend, "copies in another type than bfloat16")
    _adamw_ema(
        list(parameters), list(gradients), list(firsts), list(seconds), scales,
        segments.tensor, segments.start, segments.count,
        lr, betas[0], betas[1], eps, list(weight_decays), step,
        followers, taught, [follow[i] for i in taught], copied, copied_of, chosen,
    )  # fmt: skip


def ema_(
    teachers: Sequence[Tensor],
    students: Sequence[Tensor],
    follow: Sequence[float],
    *,
    copies: Sequence[Tensor | None] = (),
    backend: str = "auto",
) -> None:
    """Teachers follow their students, in place: ``t += follow · (s − t)``; copies receive the teachers in their own type.

    Args:
        teachers, students: contiguous tensors, in pairs of the same size and type.
        follow: 1 − the EMA momentum of each pair.
        copies: per teacher, a tensor of its size or None; () = none at all.
        backend: see :mod:`xkd_kernels.backends`.

    Raises:
        ValueError: tensors or numbers that do not fit together.
        BackendError: a backend that cannot run here.
    """
    _check(teachers, students)
    if len(follow) != len(teachers):
        raise ValueError(f"{len(follow)} numbers in follow for {len(teachers)} teachers")
    if not teachers:
        return
    copied, copied_of = _given(copies, teachers, "copies")
    chosen = backend_of(OPERATOR, teachers[0].device, teachers[0].dtype, "", backend)
    if any(copy.dtype != torch.bfloat16 for copy in copied):
        chosen = _only_torch(chosen, backend, "copies in another type than bfloat16")
    _ema(list(teachers), list(students), list(follow), copied, copied_of, chosen)


def _check(*lists: Sequence[Tensor]) -> None:
    """Raise ``ValueError`` unless the lists hold tensors that fit together, one by one."""
    first = lists[0]
    for other in lists:
        if len(other) != len(first):
            raise ValueError(f"lists of {' and '.join(str(len(each)) for each in lists)} tensors do not fit together")
        for i, (one, two) in enumerate(zip(first, other, strict=True)):
            if two.numel() != one.numel() or two.dtype != first[0].dtype or two.device != first[0].device:
                raise ValueError(
                    f"tensor {i} has {two.numel()} numbers of {two.dtype} on {two.device}; "
                    f"{one.numel()} of {first[0].dtype} on {first[0].device} are wanted"
                )
            if not two.is_contiguous():
                raise ValueError(f"tensor {i}, of shape {list(two.shape)}, is not contiguous")


def _given(tensors: Sequence[Tensor | None], like: Sequence[Tensor], name: str) -> tuple[list[Tensor], list[int]]:
    """Those of ``tensors`` that are not None, and their places."""
    if tensors and len(tensors) != len(like):
        raise ValueError(f"{len(tensors)} {name} for {len(like)} tensors")
    given = [(tensor, i) for i, tensor in enumerate(tensors) if tensor is not None]
    for tensor, i in given:
        if tensor.numel() != like[i].numel() or tensor.device != like[i].device or not tensor.is_contiguous():
            raise ValueError(f"{name}[{i}], of shape {list(tensor.shape)}, does not lie in memory like its tensor {i}")
        if name == "teachers" and tensor.dtype != like[i].dtype:
            raise ValueError(f"teachers[{i}] is of type {tensor.dtype}, its tensor {i} of {like[i].dtype}")
    return [tensor for tensor, _ in given], [i for _, i in given]


def _only_torch(chosen: str, asked: str, reason: str) -> str:
    if asked == "native":
        raise ValueError(f"backend native does not make {reason}; torch does")
    return "torch" if chosen == "native" else chosen


# ------------------------------------------------------------------------------------------------------------------ operators


@torch.library.custom_op("xkd_kernels::squared_norms", mutates_args=())
def _squared_norms(gradients: list[Tensor], tensor: list[int], start: list[int], count: list[int], backend: str) -> Tensor:
    if backend == "native":
        table = _table(tensor, start, count, gradients=gradients)
        return _native_norms(table, count, gradients[0])
    whole = _is_whole(gradients, tensor, start, count)
    pieces = gradients if whole else [gradients[i].view(-1).narrow(0, at, n) for i, at, n in zip(tensor, start, count)]
    if pieces[0].device.type == "cpu":  # PyTorch's norm takes twice the time there, and loses two digits in float32
        flat = (piece.reshape(-1) for piece in pieces)
        return torch.stack([torch.dot(numbers, numbers) for numbers in flat])
    return torch.stack(torch._foreach_norm(pieces)).square()


@_squared_norms.register_fake
def _(gradients: list[Tensor], tensor: list[int], start: list[int], count: list[int], backend: str) -> Tensor:
    return gradients[0].new_empty(len(count))


@torch.library.custom_op(
    "xkd_kernels::adamw_ema", mutates_args=("parameters", "gradients", "firsts", "seconds", "teachers", "copies")
)
def _adamw_ema(
    parameters: list[Tensor],
    gradients: list[Tensor],
    firsts: list[Tensor],
    seconds: list[Tensor],
    scales: Tensor,
    tensor: list[int],
    start: list[int],
    count: list[int],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decays: list[float],
    step: int,
    teachers: list[Tensor],
    taught: list[int],
    follow: list[float],
    copies: list[Tensor],
    copied: list[int],
    backend: str,
) -> None:
    if backend == "native":
        table = _table(
            tensor, start, count,
            parameters=parameters, gradients=gradients, firsts=firsts, seconds=seconds,
            teachers=dict(zip(taught, teachers)), copies=dict(zip(copied, copies)),
            keep=[1 - lr * decay for decay in weight_decays], follow=dict(zip(taught, follow)),
        )  # fmt: skip
        options = AdamW(beta1, beta2, eps, lr / (1 - beta1**step), math.sqrt(1 - beta2**step))
        _native_adamw(table, count, scales.float().contiguous(), options)
        return
    whole = _is_whole(gradients, tensor, start, count)

    def pieces(tensors: list[Tensor]) -> list[Tensor]:
        return tensors if whole else [tensors[i].view(-1).narrow(0, at, n) for i, at, n in zip(tensor, start, count)]

    p, g, m, v = pieces(parameters), pieces(gradients), pieces(firsts), pieces(seconds)
    torch._foreach_mul_(g, list(scales.to(g[0].dtype).unbind()))
    for decay in sorted({weight_decays[i] for i in tensor}):
        own = [j for j, i in enumerate(tensor) if weight_decays[i] == decay]
        steps = [torch.full((), float(step), device=scales.device)] * len(own)  # read only
        torch._fused_adamw_(
            [p[j] for j in own], [g[j] for j in own], [m[j] for j in own], [v[j] for j in own], [], steps,
            lr=lr, beta1=beta1, beta2=beta2, weight_decay=decay, eps=eps, amsgrad=False, maximize=False,
        )  # fmt: skip
    of, copy_of = dict(zip(taught, zip(teachers, follow))), dict(zip(copied, copies))
    moved = [(j, i, at, n) for j, (i, at, n) in enumerate(zip(tensor, start, count)) if i in of]
    followed = [of[i][0].view(-1).narrow(0, at, n) for _, i, at, n in moved]
    _follow(followed, [p[j].view(-1) for j, *_ in moved], [of[i][1] for _, i, _, _ in moved])
    halves = [(copy_of[i].view(-1).narrow(0, at, n), t) for (_, i, at, n), t in zip(moved, followed) if i in copy_of]
    _copy([half for half, _ in halves], [t for _, t in halves])


@_adamw_ema.register_fake
def _(*arguments: object) -> None:
    return None


@torch.library.custom_op("xkd_kernels::ema", mutates_args=("teachers", "copies"))
def _ema(
    teachers: list[Tensor],
    students: list[Tensor],
    follow: list[float],
    copies: list[Tensor],
    copied: list[int],
    backend: str,
) -> None:
    if backend == "native":
        whole = Segments.whole(teachers)
        table = _table(
            whole.tensor, whole.start, whole.count,
            parameters=students, teachers=dict(enumerate(teachers)), copies=dict(zip(copied, copies)),
            follow=dict(enumerate(follow)),
        )  # fmt: skip
        _native_ema(table, whole.count, teachers[0])
        return
    _follow(teachers, students, follow)
    _copy(copies, [teachers[i] for i in copied])


@_ema.register_fake
def _(*arguments: object) -> None:
    return None


def _is_whole(tensors: list[Tensor], tensor: list[int], start: list[int], count: list[int]) -> bool:
    """Whether every tensor is one segment, in order."""
    return tensor == list(range(len(tensors))) and not any(start) and all(t.numel() == n for t, n in zip(tensors, count))


def _follow(teachers: list[Tensor], students: list[Tensor], follow: list[float]) -> None:
    for weight in sorted(set(follow)):
        own = [i for i, each in enumerate(follow) if each == weight]
        torch._foreach_lerp_([teachers[i] for i in own], [students[i] for i in own], weight)


def _copy(copies: list[Tensor], teachers: list[Tensor]) -> None:
    if copies:
        torch._foreach_copy_(copies, [teacher.view_as(copy) for copy, teacher in zip(copies, teachers)])


# ------------------------------------------------------------------------------------------------------------- compiled code


def _table(
    tensor: list[int],
    start: list[int],
    count: list[int],
    *,
    parameters: list[Tensor] | None = None,
    gradients: list[Tensor] | None = None,
    firsts: list[Tensor] | None = None,
    seconds: list[Tensor] | None = None,
    teachers: dict[int, Tensor] | None = None,
    copies: dict[int, Tensor] | None = None,
    keep: list[float] | None = None,
    follow: dict[int, float] | None = None,
) -> Tensor:
    """The array of ``xkd_segment`` of the header, [segments, 8] 64-bit words on the CPU."""

    def addresses(tensors: list[Tensor] | dict[int, Tensor] | None) -> dict[int, tuple[int, int]]:
        pairs = tensors.items() if isinstance(tensors, dict) else enumerate(tensors or ())
        return {i: (each.data_ptr(), each.element_size()) for i, each in pairs}

    places = [addresses(each) for each in (parameters, gradients, firsts, seconds, teachers, copies)]
    nowhere = (0, 0)
    rows = [
        [*(base + size * at for base, size in (each.get(i, nowhere) for each in places)), n, 0]
        for i, at, n in zip(tensor, start, count)
    ]
    table = torch.tensor(rows, dtype=torch.int64)
    numbers = [[keep[i] if keep else 1.0, (follow or {}).get(i, 0.0)] for i in tensor]
    table[:, 7:].view(torch.float32).copy_(torch.tensor(numbers, dtype=torch.float64))
    return table


def _pointer(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def _on_device(table: Tensor, device: torch.device) -> Tensor:
    """The table in the device's memory, copied without waiting for it."""
    return table.pin_memory().to(device, non_blocking=True)


def _stream(device: torch.device) -> ctypes.c_void_p:
    return ctypes.c_void_p(torch.cuda.current_stream(device).cuda_stream)


def _succeed(code: int) -> None:
    if code:
        raise RuntimeError(f"the CUDA kernel was not started: error {code}")


def _native_norms(table: Tensor, count: list[int], like: Tensor) -> Tensor:
    number, norms = ctypes.c_int64(len(count)), torch.empty(len(count), dtype=torch.float32, device=like.device)
    if like.device.type == "cpu":
        library("cpu").xkd_squared_norms_cpu(_pointer(table), number, _pointer(norms), torch.get_num_threads())
        return norms
    code, largest = library("cuda"), ctypes.c_int64(max(count))
    with torch.cuda.device(like.device):
        partial = torch.empty(len(count), code.xkd_pieces(largest), dtype=torch.float32, device=like.device)
        there = _on_device(table, like.device)
        pointers = (_pointer(partial), _pointer(norms), _stream(like.device))
        _succeed(code.xkd_squared_norms_cuda(_pointer(there), number, largest, *pointers))
    return norms


def _native_adamw(table: Tensor, count: list[int], scales: Tensor, options: AdamW) -> None:
    number, reference = ctypes.c_int64(len(count)), ctypes.byref(options)
    if scales.device.type == "cpu":
        library("cpu").xkd_adamw_ema_cpu(_pointer(table), number, _pointer(scales), reference, torch.get_num_threads())
        return
    largest = ctypes.c_int64(max(count))
    with torch.cuda.device(scales.device):
        there = _on_device(table, scales.device)
        arguments = (_pointer(there), number, largest, _pointer(scales), reference, _stream(scales.device))
        _succeed(library("cuda").xkd_adamw_ema_cuda(*arguments))


def _native_ema(table: Tensor, count: list[int], like: Tensor) -> None:
    number = ctypes.c_int64(len(count))
    if like.device.type == "cpu":
        library("cpu").xkd_ema_cpu(_pointer(table), number, torch.get_num_threads())
        return
    with torch.cuda.device(like.device):
        there = _on_device(table, like.device)
        largest = ctypes.c_int64(max(count))
        _succeed(library("cuda").xkd_ema_cuda(_pointer(there), number, largest, _stream(like.device)))
