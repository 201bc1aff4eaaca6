"""What every operator asks of its inputs before a kernel reads memory by them."""

from __future__ import annotations

import operator

import torch
from torch import Tensor
from torch.autograd import forward_ad

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def require_floats(**tensors: Tensor) -> None:
    """Raise ``ValueError`` for a tensor that is not float64, float32, bfloat16 or float16."""
    for name, tensor in tensors.items():
        if tensor.dtype not in FLOATS:
            raise ValueError(f"{name} is of type {_short(tensor.dtype)}; float64, float32, bfloat16 or float16 is wanted")


def require_float_type(dtype: torch.dtype) -> None:
    """The same of the type of a result."""
    if dtype not in FLOATS:
        raise ValueError(f"dtype = {_short(dtype)}; float64, float32, bfloat16 or float16 is wanted")


def kernel_type(x: Tensor, *others: Tensor) -> torch.dtype:
    """The type by which a kernel is chosen: that of ``x``, or float64 where any other is so, which no kernel computes in."""
    return torch.float64 if any(other.dtype == torch.float64 for other in others) else x.dtype


def require_one_device(**tensors: Tensor) -> None:
    """Raise ``ValueError`` unless all lie on the first one's device."""
    (first, one), *others = tensors.items()
    for name, tensor in others:
        if tensor.device != one.device:
            raise ValueError(f"{name} is on {tensor.device}, {first} on {one.device}; all must be on one device")


def require_no_tangent(*tensors: Tensor) -> None:
    """Raise ``NotImplementedError`` under forward-mode differentiation, which a kernel would leave out without a word."""
    if has_tangent(*tensors):
        raise NotImplementedError("the kernels differentiate backward only; for forward mode take backend='torch'")


def has_tangent(*tensors: Tensor) -> bool:
    """Whether any is being differentiated forward; never in a compiled program."""
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return False
    return any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors if tensor.is_floating_point())


def require_no_gradient(**tensors: Tensor) -> None:
    """Raise ``ValueError`` for a tensor that is to be differentiated, by an operator that cannot be."""
    for name, tensor in tensors.items():
        if torch.is_grad_enabled() and tensor.requires_grad:
            raise ValueError(f"{name} requires a gradient, but this has none; detach it, or call this under torch.no_grad()")
    require_no_tangent(*tensors.values())


def whole_number(value: object) -> int:
    """A Python integer; a compiler's symbol becomes a constant of the program.

    Raises:
        TypeError: it is none.
    """
    return operator.index(value)  # type: ignore[arg-type]


def _short(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")
