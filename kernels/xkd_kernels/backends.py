"""Which code computes an operator: the one place that decides, and that keeps and tells its reason.

``torch``  PyTorch's own operators; runs anywhere, in every type.
``triton`` this package's kernels; on a GPU, and on a CPU under ``TRITON_INTERPRET=1`` (for tests: it is slow).
``native`` this package's C++ and CUDA code (``kernels/csrc``), where it has been compiled.
``auto``   the fastest of them on this device at this shape, as the benchmark found it (``measured.json``); ``torch`` where it
           has not been measured, or where something else was the fastest. On a CPU ``native`` where an operator has it, or
           else ``torch``. What it takes on a GPU, and why, the logger ``xkd_kernels`` tells once.

An operator is offered by ``torch`` and by one of the two others.
"""

from __future__ import annotations

import json
import logging
import warnings
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import triton

from xkd_kernels import native

BACKENDS = ("auto", "triton", "native", "torch")
NATIVE = ("adamw_ema",)  # operators written in C++ and CUDA; the others are Triton's
OPERATORS = (
    "packed_attention",
    "cls_attention",
    "residual_layer_norm",
    "bias_gelu",
    "gather_patches",
    "distillation_loss",
    "unit_rows",
    "mmd_loss",
    "masked_patch_loss",
    "refine",
    "quantise_rows",
    "residual_layer_norm_fp8",
    "bias_gelu_fp8",
    *NATIVE,
)
FP8 = ("quantise_rows", "residual_layer_norm_fp8", "bias_gelu_fp8")
CAPABILITY = dict.fromkeys(FP8, (8, 9))  # of a GPU at least; other operators run on any
INTERPRETED = bool(triton.knobs.runtime.interpret)  # as the kernels were loaded; changing it later changes nothing
RIVALS = {  # who may be the fastest and is no backend: what ``measured.json`` calls them, and what they are
    "compiled": "torch.compile of its twin",
    "eager": "its twin, operator by operator,",
    "flash": "PyTorch's flash attention",
    "cudnn": "cuDNN's attention",
}
WIDEST_HEAD = {"packed_attention": 128, "cls_attention": 128}  # that the kernels were made and compiled for
LOG = logging.getLogger("xkd_kernels")
TRITON_TYPES = (torch.float32, torch.bfloat16, torch.float16)
MEASURED = Path(__file__).with_name("measured.json")


class BackendError(RuntimeError):
    """A backend that was asked for and cannot run; says why, and what can."""


@dataclass(frozen=True)
class Choice:
    """A backend and why it was chosen."""

    backend: str
    reason: str


@cache
def measured() -> dict[str, Any]:
    """Who is the fastest by device name, operator, type and shape class: a backend, or a rival that is none."""
    return json.loads(MEASURED.read_text(encoding="utf-8"))


def shape_class(size: int) -> str:
    """The class that a size is measured in: the next power of two."""
    return str(triton.next_power_of_2(size))


def offers(operator: str) -> tuple[str, ...]:
    """The backends of an operator, the one to prefer first."""
    return ("native" if operator in NATIVE else "triton", "torch")


def obstacle(device: torch.device, dtype: torch.dtype, backend: str = "triton") -> str | None:
    """Why this package's own code (``triton`` or ``native``) cannot run on ``dtype`` tensors of ``device``; None if it can."""
    if backend == "native":
        if dtype != torch.float32:
            return f"its code computes in float32, not in {str(dtype).removeprefix('torch.')}"
        return native.missing(device.type)
    if dtype not in TRITON_TYPES:
        return f"its kernels compute in float32, bfloat16 and float16, not in {str(dtype).removeprefix('torch.')}"
    if device.type == "cpu" and not (INTERPRETED and triton.knobs.runtime.interpret):
        return "on a CPU its kernels run only interpreted: set TRITON_INTERPRET=1 before xkd_kernels is imported"
    if device.type == "cuda" and not torch.cuda.is_available():
        return "torch sees no CUDA device here"
    if device.type not in ("cpu", "cuda"):
        return f"its kernels are written for CUDA devices, not for {device.type}"
    return None


@cache
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=3)


@cache
def _tell_once(message: str) -> None:
    LOG.warning(message)


@cache
def choose(operator: str, device: torch.device, dtype: torch.dtype, shape: str, asked: str = "auto") -> Choice:
    """The backend of ``operator`` for tensors of ``dtype`` on ``device``; the same answer for the same question.

    Args:
        operator: its name, such as "packed_attention".
        device: where its inputs are.
        dtype: their type.
        shape: their shape class, as the benchmark writes it into ``measured.json``.
        asked: "auto", or the backend to take.

    Raises:
        BackendError: ``asked`` is unknown or cannot run here.
    """
    if operator not in OPERATORS:
        raise BackendError(f"operator '{operator}' is not one of {', '.join(OPERATORS)}")
    own = offers(operator)[0]
    if asked not in ("auto", *offers(operator)):
        raise BackendError(f"backend '{asked}' of {operator} is not one of {', '.join(('auto', *offers(operator)))}")
    if asked == "torch":
        return Choice("torch", "asked for")
    reason = obstacle(device, dtype, own)
    if reason is None and own == "triton":
        reason = _too_wide(operator, shape) or _too_old(operator, device)
    if asked == own:
        if reason:
            raise BackendError(f"backend {own} of {operator} cannot run here: {reason}; torch can")
        return Choice(own, "asked for")
    if device.type == "cpu" and own == "triton":
        return Choice("torch", "it is the only one that is fast on a CPU")
    if reason and own == "native" and dtype == torch.float32:
        _warn_once(f"{operator} runs by PyTorch's operators, which is slower: {reason}")
    if device.type == "cpu":
        return Choice("torch", reason) if reason else Choice(own, "it passes over memory once")
    choice = Choice("torch", reason) if reason else _fastest(operator, device, dtype, shape)
    if device.type == "cuda":
        _tell_once(f"{operator} on {_name(device)}: {choice.backend}, {choice.reason}")
    return choice


def _too_old(operator: str, device: torch.device) -> str | None:
    """Why a GPU's architecture lacks what an operator's kernels write; None if it has it."""
    needed = CAPABILITY.get(operator)
    if needed is None or device.type != "cuda" or torch.cuda.get_device_capability(device) >= needed:
        return None
    return f"its kernels write 8-bit floats, which GPUs have from compute capability {needed[0]}.{needed[1]} on"


def _too_wide(operator: str, shape: str) -> str | None:
    """Why a Triton kernel does not take heads of the last of the sizes in ``shape``; None if it does."""
    widest = WIDEST_HEAD.get(operator)
    if widest is None or int(shape.split("x")[-1]) <= widest:
        return None
    return f"its kernels take heads of up to {widest} numbers, not of {shape.split('x')[-1]}"


def _fastest(operator: str, device: torch.device, dtype: torch.dtype, shape: str) -> Choice:
    name, kind = _name(device), str(dtype).removeprefix("torch.")
    fastest = measured().get(name, {}).get(operator, {}).get(kind, {}).get(shape)
    if fastest is None:
        return Choice("torch", f"test_kernels.py has not timed it against its rivals on {name} at this shape")
    if fastest in BACKENDS:
        return Choice(fastest, f"measured to be the fastest on {name}")
    return Choice("torch", f"{RIVALS.get(fastest, fastest)} was measured to be faster than the kernel on {name}")


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if torch.cuda.is_available() else "a GPU that is not there"


def backend_of(operator: str, device: torch.device, dtype: torch.dtype, shape: str, asked: str) -> str:
    """The name that :func:`choose` finds; a constant to the compiler."""
    return choose(operator, device, dtype, shape, asked).backend


# What torch.compiler.assume_constant_result sets, which imports the whole compiler.
backend_of._dynamo_marked_constant = True  # type: ignore[attr-defined]
