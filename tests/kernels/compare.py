"""What every operator's test needs: outputs and gradients beside those of its naive twin in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# Relative to the norm of the exact result. An output in a half type is off by its own rounding, attention's also by that of the
# probabilities between its two products; each bound is about twice what was seen under the interpreter, which cuts bfloat16 off
# where a GPU rounds it. A GPU's float32 exponentials and roots are good to two last places; its sums have another order.
TOLERANCE = {torch.float32: 3e-6 if torch.cuda.is_available() else 1e-6, torch.float16: 6e-4, torch.bfloat16: 7e-3}


def relative_error(found: Tensor, exact: Tensor) -> float:
    """‖found − exact‖ / ‖exact‖; absolute where the exact one is 0."""
    exact = exact.double()
    norm = exact.norm().item()
    return (found.double() - exact).norm().item() / (norm or 1.0)


def assert_agrees(
    operator: Callable[..., object],
    naive: Callable[..., object],
    inputs: Sequence[Tensor],
    tolerance: float,
    *,
    gradients: bool = True,
) -> None:
    """``operator`` of ``inputs`` and its gradients agree with ``naive`` of the same inputs in float64.

    Inputs keep their strides; every floating one is differentiated, its gradient in its own type.
    """
    differentiated = [tensor.detach().requires_grad_(gradients and tensor.is_floating_point()) for tensor in inputs]
    wide = [tensor.detach().double() if tensor.is_floating_point() else tensor for tensor in inputs]
    wide = [tensor.requires_grad_(gradients and tensor.is_floating_point()) for tensor in wide]
    found, exact = operator(*differentiated), naive(*wide)
    found, exact = ([x] if isinstance(x, Tensor) else list(x) for x in (found, exact))  # type: ignore[call-overload]
    for number, (mine, theirs) in enumerate(zip(found, exact, strict=True)):
        assert mine.shape == theirs.shape
        error = relative_error(mine, theirs)
        assert error < tolerance, f"output {number}: {error:.2e}"
    if not gradients:
        return
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(x.shape, generator=generator).to(x.device, x.dtype) for x in found]
    torch.autograd.backward(found, weights)
    torch.autograd.backward(exact, [weight.double() for weight in weights])
    for number, (mine, theirs) in enumerate(zip(differentiated, wide, strict=True)):
        if mine.requires_grad:
            assert mine.grad is not None and theirs.grad is not None
            assert mine.grad.dtype == mine.dtype
            error = relative_error(mine.grad, theirs.grad)
            assert error < tolerance, f"gradient {number}: {error:.2e}"
