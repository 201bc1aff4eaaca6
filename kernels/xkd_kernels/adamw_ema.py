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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.autograd.profiler import record_function
from torch.library import CustomOpDef

from xkd_kernels.backends import backend_of
from xkd_kernels.native import AdamW, library

OPERATOR = "adamw_ema"
WRITTEN_OUT = 1 << 25  # factors that scale_ writes out at a time: 128 MiB


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
        sizes, number = [tensor.numel() for tensor in tensors], len(tensors)
        parts = zip(self.tensor, self.start, self.count, strict=True)
        if all(0 <= tensor < number and start >= 0 <= count <= sizes[tensor] - start for tensor, start, count in parts):
            return
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
    if backend_of(OPERATOR, gradients[0].device, gradients[0].dtype, "", backend) == "torch":
        return _torch_norms(list(gradients), segments)
    norms: Tensor = _called(_squared_norms, [], list(gradients), segments.tensor, segments.start, segments.count)
    return norms


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
    p, g, m, v = list(parameters), list(gradients), list(firsts), list(seconds)
    arguments = (
        lr, betas[0], betas[1], eps, list(weight_decays), step,
        followers, taught, [follow[i] for i in taught], copied, copied_of,
    )  # fmt: skip
    if chosen == "torch":
        _torch_adamw_ema(p, g, m, v, scales, segments, *arguments)
    else:
        changed, places = [p, m, v, followers, copied], (segments.tensor, segments.start, segments.count)
        _called(_adamw_ema, changed, p, g, m, v, scales, *places, *arguments)


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
    arguments = (list(teachers), list(students), list(follow), copied, copied_of)
    if chosen == "torch":
        _torch_ema(*arguments)
    else:
        _called(_ema, [arguments[0], copied], *arguments)


def _check(*lists: Sequence[Tensor]) -> None:
    """Raise ``ValueError`` unless the lists hold tensors that fit together, one by one."""
    first = lists[0]
    if len({len(each) for each in lists}) > 1:
        raise ValueError(f"lists of {' and '.join(str(len(each)) for each in lists)} tensors do not fit together")
    wanted = [(tensor.numel(), first[0].dtype, first[0].device, True) for tensor in first]
    for other in lists:
        found = [(tensor.numel(), tensor.dtype, tensor.device, tensor.is_contiguous()) for tensor in other]
        if found == wanted:
            continue
        i = next(i for i, (one, two) in enumerate(zip(found, wanted)) if one != two)
        if found[i][:3] == wanted[i][:3]:
            raise ValueError(f"tensor {i}, of shape {list(other[i].shape)}, is not contiguous")
        (size, dtype, device, _), (right_size, right_dtype, right_device, _) = found[i], wanted[i]
        raise ValueError(
            f"tensor {i} has {size} numbers of {dtype} on {device}; {right_size} of {right_dtype} on {right_device} are wanted"
        )


def _given(tensors: Sequence[Tensor | None], like: Sequence[Tensor], name: str) -> tuple[list[Tensor], list[int]]:
    """Those of ``tensors`` that are not None, and their places."""
    if tensors and len(tensors) != len(like):
        raise ValueError(f"{len(tensors)} {name} for {len(like)} tensors")
    places = [i for i, tensor in enumerate(tensors) if tensor is not None]
    given: list[Tensor] = [tensor for tensor in tensors if tensor is not None]
    for tensor, i in zip(given, places):
        other = like[i]
        if tensor.numel() != other.numel() or tensor.device != other.device or not tensor.is_contiguous():
            raise ValueError(f"{name}[{i}], of shape {list(tensor.shape)}, does not lie in memory like its tensor {i}")
        if name == "teachers" and tensor.dtype != other.dtype:
            raise ValueError(f"teachers[{i}] is of type {tensor.dtype}, its tensor {i} of {other.dtype}")
    return given, places


def _only_torch(chosen: str, asked: str, reason: str) -> str:
    if asked == "native":
        raise ValueError(f"backend native does not make {reason}; torch does")
    return "torch" if chosen == "native" else chosen


# ------------------------------------------------------------------------------------------------------- PyTorch's operators


@torch.no_grad()
def _torch_norms(gradients: list[Tensor], segments: Segments) -> Tensor:
    pieces = _pieces(gradients, segments)
    if pieces[0].device.type == "cpu":  # PyTorch's norm takes twice the time there, and loses two digits in float32
        flat = (piece.reshape(-1) for piece in pieces)
        return torch.stack([torch.dot(numbers, numbers) for numbers in flat])
    return torch.stack(torch._foreach_norm(pieces)).square()


@torch.no_grad()
def _torch_adamw_ema(
    parameters: list[Tensor],
    gradients: list[Tensor],
    firsts: list[Tensor],
    seconds: list[Tensor],
    scales: Tensor,
    segments: Segments,
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
) -> None:
    p, g, m, v = (_pieces(tensors, segments) for tensors in (parameters, gradients, firsts, seconds))
    scale_(g, scales)
    for decay in sorted({weight_decays[i] for i in segments.tensor}):
        own = [j for j, i in enumerate(segments.tensor) if weight_decays[i] == decay]
        steps = [torch.full((), float(step), device=scales.device)] * len(own)  # read only
        torch._fused_adamw_(
            [p[j] for j in own], [g[j] for j in own], [m[j] for j in own], [v[j] for j in own], [], steps,
            lr=lr, beta1=beta1, beta2=beta2, weight_decay=decay, eps=eps, amsgrad=False, maximize=False,
        )  # fmt: skip
    of, copy_of = dict(zip(taught, zip(teachers, follow))), dict(zip(copied, copies))
    parts = enumerate(zip(segments.tensor, segments.start, segments.count))
    moved = [(j, i, at, n) for j, (i, at, n) in parts if i in of]
    followed = [of[i][0].view(-1).narrow(0, at, n) for _, i, at, n in moved]
    _follow(followed, [p[j].view(-1) for j, *_ in moved], [of[i][1] for _, i, _, _ in moved])
    halves = [(copy_of[i].view(-1).narrow(0, at, n), t) for (_, i, at, n), t in zip(moved, followed) if i in copy_of]
    _copy([half for half, _ in halves], [t for _, t in halves])
    increment_version([*parameters, *firsts, *seconds, *teachers, *copies])


@torch.no_grad()
def _torch_ema(
    teachers: list[Tensor], students: list[Tensor], follow: list[float], copies: list[Tensor], copied: list[int]
) -> None:
    _follow(teachers, students, follow)
    _copy(copies, [teachers[i] for i in copied])
    increment_version([*teachers, *copies])  # PyTorch 2.11's multi-tensor operators on a GPU do not tell of their writes


def _pieces(tensors: list[Tensor], segments: Segments) -> list[Tensor]:
    """One per segment; whole tensors as they are."""
    tensor, start, count = segments.tensor, segments.start, segments.count
    whole = tensor == list(range(len(tensors))) and not any(start) and all(t.numel() == n for t, n in zip(tensors, count))
    return tensors if whole else [tensors[i].view(-1).narrow(0, at, n) for i, at, n in zip(tensor, start, count)]


def scale_(tensors: Sequence[Tensor], scales: Tensor) -> None:
    """Multiply each tensor, in place, by its number of ``scales``, which lies on their device: a few launches on a GPU."""
    factors = scales.to(tensors[0].dtype)
    if factors.device.type == "cpu":
        torch._foreach_mul_(list(tensors), list(factors.unbind()))
    else:
        scale_by_written_out(tensors, factors, WRITTEN_OUT)


def scale_by_written_out(tensors: Sequence[Tensor], factors: Tensor, most: int) -> None:
    """:func:`scale_` with the factors written out, for as many tensors at a time as have ``most`` numbers together.

    PyTorch's multi-tensor product launches a kernel per tensor unless both lists agree in sizes and strides. Writing the
    factors out costs 8 bytes per number beside the product's own 8; where that matters, the compiled operator needs neither.
    """
    for begin, end in _bounded([tensor.numel() for tensor in tensors], most):
        some = tensors[begin:end]
        flat = torch.cat([factor.expand(tensor.numel()) for factor, tensor in zip(factors[begin:end].unbind(), some)])
        written = flat.split([tensor.numel() for tensor in some])
        torch._foreach_mul_(list(some), [numbers.view(tensor.shape) for numbers, tensor in zip(written, some)])


def _bounded(sizes: Sequence[int], most: int) -> Iterator[tuple[int, int]]:
    """Neighbours that go together, as (first, end): as many as have no more than ``most`` numbers, but at least one."""
    begin = total = 0
    for end, size in enumerate(sizes):
        if end > begin and total + size > most:
            yield begin, end
            begin, total = end, 0
        total += size
    if begin < len(sizes):
        yield begin, len(sizes)


def _follow(teachers: list[Tensor], students: list[Tensor], follow: list[float]) -> None:
    for weight in sorted(set(follow)):
        own = [i for i, each in enumerate(follow) if each == weight]
        torch._foreach_lerp_([teachers[i] for i in own], [students[i] for i in own], weight)


def _copy(copies: list[Tensor], teachers: list[Tensor]) -> None:
    if copies:
        torch._foreach_copy_(copies, [teacher.view_as(copy) for copy, teacher in zip(copies, teachers)])


# ------------------------------------------------------------------------------------------------------------- compiled code


def _called(operator: CustomOpDef, changed: list[list[Tensor]], *arguments: Any) -> Any:
    """Call a compiled operator: through PyTorch's dispatcher where something watches or traces, or else directly.

    The dispatcher takes lists of tensors apart several times over: 8 ms on the host for the base model's 412 trainable ones,
    when all of a GPU's work for them takes 3. ``changed``: what the operator writes into.
    """
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return operator(*arguments)
    with record_function(f"xkd_kernels::{operator._name}"):
        found = operator._init_fn(*arguments)
    for tensors in changed:
        increment_version(tensors)
    return found


@torch.library.custom_op("xkd_kernels::squared_norms", mutates_args=())
def _squared_norms(gradients: list[Tensor], tensor: list[int], start: list[int], count: list[int]) -> Tensor:
    return _native_norms(_table(tensor, start, count, gradients[0].device, gradients=gradients), count, gradients[0])


@_squared_norms.register_fake
def _(gradients: list[Tensor], tensor: list[int], start: list[int], count: list[int]) -> Tensor:
    return gradients[0].new_empty(len(count))


@torch.library.custom_op("xkd_kernels::adamw_ema", mutates_args=("parameters", "firsts", "seconds", "teachers", "copies"))
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
) -> None:
    table = _table(
        tensor, start, count, scales.device,
        parameters=parameters, gradients=gradients, firsts=firsts, seconds=seconds,
        teachers=(teachers, taught), copies=(copies, copied),
        keep=[1 - lr * decay for decay in weight_decays], follow=(follow, taught),
    )  # fmt: skip
    options = AdamW(beta1, beta2, eps, lr / (1 - beta1**step), math.sqrt(1 - beta2**step))
    _native_adamw(table, count, scales.float().contiguous(), options)


@_adamw_ema.register_fake
def _(*arguments: object) -> None:
    return None


@torch.library.custom_op("xkd_kernels::ema", mutates_args=("teachers", "copies"))
def _ema(teachers: list[Tensor], students: list[Tensor], follow: list[float], copies: list[Tensor], copied: list[int]) -> None:
    whole, every = Segments.whole(teachers), list(range(len(teachers)))
    table = _table(
        whole.tensor, whole.start, whole.count, teachers[0].device,
        parameters=students, teachers=(teachers, every), copies=(copies, copied), follow=(follow, every),
    )  # fmt: skip
    _native_ema(table, whole.count, teachers[0])


@_ema.register_fake
def _(*arguments: object) -> None:
    return None


def _table(
    tensor: list[int],
    start: list[int],
    count: list[int],
    device: torch.device,
    *,
    parameters: list[Tensor] | None = None,
    gradients: list[Tensor] | None = None,
    firsts: list[Tensor] | None = None,
    seconds: list[Tensor] | None = None,
    teachers: tuple[list[Tensor], list[int]] = ([], []),
    copies: tuple[list[Tensor], list[int]] = ([], []),
    keep: list[float] | None = None,
    follow: tuple[list[float], list[int]] = ([], []),
) -> Tensor:
    """The array of ``xkd_segment`` of the header, [segments, 8] 64-bit words in the host's memory, pinned for a GPU.

    Column by column, because row by row takes Python longer than a GPU takes for the step. ``teachers``, ``copies`` and
    ``follow`` are given with the places of the tensors that they belong to.
    """
    of, begin, size = torch.tensor(tensor), torch.tensor(start), len(parameters or gradients or ())
    table = torch.zeros(len(tensor), 8, dtype=torch.int64, pin_memory=device.type == "cuda")
    whole = [(each, None) for each in (parameters, gradients, firsts, seconds)]
    for column, (tensors, places) in enumerate([*whole, teachers, copies]):
        if not tensors:
            continue
        bases = torch.tensor([each.data_ptr() for each in tensors])
        if places is not None:
            bases = torch.zeros(size, dtype=torch.int64).index_copy_(0, torch.tensor(places), bases)
        addresses = bases[of]
        table[:, column] = torch.where(addresses == 0, 0, addresses + begin * tensors[0].element_size())
    table[:, 6] = torch.tensor(count)
    numbers = table[:, 7:].view(torch.float32)
    numbers[:, 0] = torch.tensor(keep, dtype=torch.float64)[of] if keep else 1.0
    if follow[0]:
        weights = torch.tensor(follow[0], dtype=torch.float64)
        numbers[:, 1] = torch.zeros(size, dtype=torch.float64).index_copy_(0, torch.tensor(follow[1]), weights)[of]
    return table


def _pointer(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def _on_device(table: Tensor, device: torch.device) -> Tensor:
    """The pinned table in the device's memory, copied without waiting for it; its own is not used again before that is done."""
    return table.to(device, non_blocking=True)


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
