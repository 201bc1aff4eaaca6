"""Which of ``xkd_kernels``' operators the fast model takes, as ``model.kernels`` says it; ``attention`` chooses its own."""

from __future__ import annotations

import torch
from torch import Tensor

from xkd_fast.errors import UserError
from xkd_fast.model.options import ModelOptions, VideoOptions
from xkd_fast.model.precision import product_dtype
from xkd_kernels import obstacle
from xkd_kernels.backends import backend_of, choose, shape_class


def require_kernels(name: str) -> None:
    """Make sure that the kernels that were asked for can run here.

    Raises:
        UserError: they cannot; says why, and what can.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    reason = obstacle(device, torch.bfloat16) if name == "triton" else None
    if reason:
        raise UserError(f"model.kernels = triton cannot run here: {reason}; use torch or auto")


def wants(operator: str, kernels: str, x: Tensor, shape: str) -> bool:
    """Whether an operator on a tensor like ``x`` is computed by its Triton kernel; a constant to the compiler.

    Args:
        operator: its name in ``xkd_kernels``.
        kernels: "auto", "triton" or "torch".
        x: on the device, in the type of the stream or of products.
        shape: its shape class.

    Raises:
        BackendError: ``kernels`` is "triton", which cannot run for a tensor like this.
    """
    dtype = x.dtype if operator == "residual_layer_norm" else product_dtype(x)
    return backend_of(operator, x.device, dtype, shape, kernels) == "triton"


def described(options: ModelOptions, device: torch.device, dtype: torch.dtype) -> list[str]:
    """Who computes the fast model's operators on ``device`` with products in ``dtype``, and why: a line for each answer."""
    answers: dict[str, list[str]] = {}
    for operator, kind, shape in _questions(options, dtype):
        choice = choose(operator, device, kind, shape, options.kernels)
        answers.setdefault(f"{choice.backend}, {choice.reason}", []).append(f"{operator} {shape}")
    alone = len(answers) == 1
    lines = [f"kernels: {answer}{'' if alone else ': ' + ', '.join(operators)}" for answer, operators in answers.items()]
    if options.teacher_precision == "fp8":
        emulated = "emulated on a CPU, which is slower than without; " if device.type == "cpu" else ""
        lines.append(f"teachers: FP8 in their blocks, {emulated}no GPU has measured what it gains")
    return lines


def _questions(options: ModelOptions, dtype: torch.dtype) -> list[tuple[str, torch.dtype, str]]:
    """Operator, type and shape class of everything that the fast model asks for."""
    found: dict[tuple[str, torch.dtype, str], None] = {}
    head_width = options.encoder.width // options.encoder.heads
    if options.teacher_precision == "fp8":
        width, hidden = options.encoder.width, int(options.encoder.width * options.mlp_ratio)
        found["residual_layer_norm_fp8", torch.float32, str(width)] = None
        found["bias_gelu_fp8", dtype, str(hidden)] = None
        for kind, size in ((dtype, width), (torch.float32, width), (torch.float32, hidden)):  # attention's output and weights
            found["quantise_rows", kind, str(size)] = None
    for width in (options.encoder.width, options.decoder.width):
        found["residual_layer_norm", torch.float32, str(width)] = None
        found["bias_gelu", dtype, str(int(width * options.mlp_ratio))] = None
    found["refine", torch.float32, str(options.encoder.width)] = None
    for clip in (options.video, options.audio):
        predicted = torch.float32 if options.decoder.width == clip.patch_numbers else dtype  # no product, the stream itself
        found["masked_patch_loss", predicted, str(clip.patch_numbers)] = None
        kind = dtype if isinstance(clip, VideoOptions) else torch.float32  # of the result where the clip is 8-bit
        found["gather_patches", kind, str(clip.patch_numbers)] = None
        if options.cls_token:
            found["cls_attention", dtype, f"{shape_class(1 + clip.tokens)}x{head_width}"] = None
    found["unit_rows", dtype, str(options.head.bottleneck)] = None  # of the head's vectors; of its prototypes:
    found["unit_rows", torch.float32, str(options.head.bottleneck)] = None
    found["mmd_loss", torch.float32, str(options.head.prototypes)] = None
    found["distillation_loss", torch.float32, str(options.head.prototypes)] = None
    return list(found)
