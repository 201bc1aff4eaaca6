"""A linear layer of 8-bit floats: rows and weights in E4M3 with a scale for each row of either, sums in float32.

    y[m, n] = scale[m] · weight_scale[n] · Σ_k q[m, k] · weight_q[n, k] + bias[n]

By PyTorch's scaled product on GPUs that have one. Elsewhere it is emulated: the same numbers up to the order of summation,
slower than a product of half types; of a GPU without, the logger ``xkd_kernels`` tells once. Legend: M rows, K inputs, N
outputs.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from xkd_kernels.backends import LOG
from xkd_kernels.checks import require_float_type, require_floats, require_no_gradient, require_one_device
from xkd_kernels.quantise import E4M3

CAPABILITY = (8, 9)  # the first whose matrix units take E4M3
MULTIPLE = 16  # what inputs and outputs of the scaled product must be multiples of


def naive_fp8_linear(
    q: Tensor, scale: Tensor, weight_q: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """The definition; in float32, or wider where the scales are."""
    with torch.autocast(q.device.type, enabled=False):
        rows, weight = (x.to(s.dtype) * s for x, s in ((q, scale), (weight_q, weight_scale)))
        product = rows @ weight.t()
        return (product if bias is None else product + bias).to(dtype)


def fp8_linear(
    q: Tensor, scale: Tensor, weight_q: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """A linear layer on what :func:`xkd_kernels.quantise_rows` made of its inputs and of its weight. Forward only.

    Args:
        q, scale: [..., K] in E4M3 and [..., 1] in float32, the inputs.
        weight_q, weight_scale: [N, K] in E4M3 and [N, 1] in float32.
        bias: [N], or None; on a GPU it is added in bfloat16.
        dtype: of the result; bfloat16 on a GPU.

    Returns:
        [..., N] in ``dtype``.

    Raises:
        ValueError: shapes, types or devices that do not fit; K or N that is no multiple of 16.
    """
    if (
        weight_q.ndim != 2
        or q.ndim < 1
        or q.shape[-1] != weight_q.shape[1]
        or scale.shape != (*q.shape[:-1], 1)
        or weight_scale.shape != (len(weight_q), 1)
    ):
        shapes = ", ".join(str(list(tensor.shape)) for tensor in (q, scale, weight_q, weight_scale))
        raise ValueError(
            f"q, scale, weight_q, weight_scale have the shapes {shapes}; [..., K], [..., 1], [N, K], [N, 1] are wanted"
        )
    outputs, inputs = weight_q.shape
    if inputs % MULTIPLE or outputs % MULTIPLE or not inputs or not outputs:
        raise ValueError(f"weight_q has the shape [{outputs}, {inputs}], but multiples of {MULTIPLE} are wanted")
    for name, tensor in (("q", q), ("weight_q", weight_q)):
        if tensor.dtype != E4M3:
            raise ValueError(f"{name} is of type {str(tensor.dtype).removeprefix('torch.')}; float8_e4m3fn is wanted")
    for name, tensor in (("scale", scale), ("weight_scale", weight_scale)):
        if tensor.dtype != torch.float32:
            raise ValueError(f"{name} is of type {str(tensor.dtype).removeprefix('torch.')}; float32 is wanted")
    more = {} if bias is None else {"bias": bias}
    if bias is not None and bias.shape != (outputs,):
        raise ValueError(f"bias has the shape {list(bias.shape)}, but [{outputs}] is wanted")
    require_floats(**more)
    require_float_type(dtype)
    require_one_device(q=q, scale=scale, weight_q=weight_q, weight_scale=weight_scale, **more)
    require_no_gradient(scale=scale, weight_scale=weight_scale, **more)
    if missing_scaled_product(q.device):
        return naive_fp8_linear(q, scale, weight_q, weight_scale, bias, dtype)
    if dtype != torch.bfloat16:
        raise ValueError(f"dtype = {str(dtype).removeprefix('torch.')}; a GPU's scaled product gives bfloat16")
    found = torch._scaled_mm(
        q.reshape(-1, inputs).contiguous(),
        weight_q.contiguous().t(),  # the second operand must be column-major
        scale_a=scale.reshape(-1, 1).contiguous(),
        scale_b=weight_scale.reshape(1, -1).contiguous(),
        bias=None if bias is None else bias.to(dtype),
        out_dtype=dtype,
        use_fast_accum=False,  # sums in float32: the fast ones keep fewer bits
    )
    return found.view(*q.shape[:-1], outputs)


def missing_scaled_product(device: torch.device) -> str | None:
    """Why ``device`` has no scaled product by rows; None if it has one. Tried once; a constant to the compiler."""
    return _tried(device)


missing_scaled_product._dynamo_marked_constant = True  # type: ignore[attr-defined]


@cache
def _tried(device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"a {device.type.upper()} has none"
    if reason := _refused(device):
        LOG.warning(f"fp8_linear has no scaled product on {torch.cuda.get_device_name(device)} and is emulated there: {reason}")
        return reason
    return None


def _refused(device: torch.device) -> str | None:
    """Why a GPU computes no scaled product by rows; None if it does."""
    capability = torch.cuda.get_device_capability(device)
    if capability < CAPABILITY:
        here, first = (".".join(map(str, version)) for version in (capability, CAPABILITY))
        return f"{torch.cuda.get_device_name(device)} has compute capability {here}; {first} is the first with E4M3"
    rows, weight = (torch.ones(size, MULTIPLE, device=device).to(E4M3) for size in (3, 2 * MULTIPLE))
    ones = torch.ones(3, 1, device=device), torch.ones(1, 2 * MULTIPLE, device=device)
    bias = torch.zeros(2 * MULTIPLE, dtype=torch.bfloat16, device=device)
    try:
        torch._scaled_mm(rows, weight.t(), scale_a=ones[0], scale_b=ones[1], bias=bias, out_dtype=torch.bfloat16)
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        return f"torch {torch.__version__} cannot compute it on {torch.cuda.get_device_name(device)} ({reason})"
    return None
