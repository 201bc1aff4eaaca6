"""Matrix products of bfloat16 numbers on a processor that multiplies them the fastest in float32."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.tiny import random_batch, tiny_options
from xkd_fast.model import products
from xkd_fast.model.build import build_model
from xkd_fast.model.options import DecoderOptions, ModelOptions

ATEN = torch.ops.aten
PRODUCTS = {ATEN.mm, ATEN.addmm, ATEN.bmm, ATEN.baddbmm, ATEN._scaled_dot_product_flash_attention_for_cpu}


class ProductTypes(TorchDispatchMode):
    """The types of what is multiplied inside."""

    def __init__(self) -> None:
        super().__init__()
        self.met: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in PRODUCTS:
            self.met.update(each.dtype for each in args if isinstance(each, Tensor))
        return func(*args, **(kwargs or {}))


def one_pass(options: ModelOptions, *, autocast: bool = True) -> tuple[Tensor, dict[str, Tensor], set[torch.dtype]]:
    """The loss, every gradient, and the types of the products of one pass."""
    model, batch = build_model(options, seed=0), random_batch(options, 3, dtype=torch.float32)
    with ProductTypes() as watched:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            losses = model(*batch)
        losses.total.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return losses.total.detach(), gradients, watched.met


def deviation(gradients: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    """Of all gradients together, over their length."""
    assert gradients.keys() == exact.keys()
    away, length = (
        sum((each.double() ** 2).sum() for each in kind)
        for kind in ([gradients[name] - exact[name] for name in exact], exact.values())
    )
    return float((away / length) ** 0.5)


CASES = (
    {"variant": "mats"},
    {"cls_token": False, "checkpointing": True},
    {"variant": "mas", "decoder": DecoderOptions(24, 2, 2)},  # with a projection between encoder and decoder
)


@pytest.mark.parametrize("changes", CASES)
def test_no_product_is_left_in_bfloat16(changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Red if a product of the step, forward or backward, is forgotten, or numbers are not rounded to bfloat16."""
    options = tiny_options(**changes)
    found = {}
    for lacking in (False, True):
        monkeypatch.setattr(products, "LACKS_BFLOAT16", lacking)
        found[lacking] = one_pass(options)
    exact_loss, exact, _ = one_pass(options, autocast=False)
    assert torch.bfloat16 in found[False][2], "the watch sees nothing"
    assert found[True][2] == {torch.float32}
    native = deviation(found[False][1], exact)
    assert 0.3 * native < deviation(found[True][1], exact) < 3 * native
    assert abs(found[True][0] - exact_loss) < 3e-3 * exact_loss


@pytest.mark.parametrize("has_bias", (False, True))
@pytest.mark.parametrize("wanted", (False, True))
def test_linear_layer(has_bias: bool, wanted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Red if a gradient is another tensor's, wants a type or shape of its own, or more than the layer's input is kept."""
    monkeypatch.setattr(products, "LACKS_BFLOAT16", True)
    torch.manual_seed(0)
    layer, x = nn.Linear(24, 40, bias=has_bias), torch.randn(2, 5, 24, requires_grad=wanted)
    kept: list[Tensor] = []
    watch = torch.autograd.graph.saved_tensors_hooks(lambda each: kept.append(each) or each, lambda each: each)
    with watch, torch.autocast("cpu", torch.bfloat16):
        y = products.through(layer, x)
    assert y.dtype == torch.bfloat16
    outer = torch.randn(y.shape)
    (y * outer).sum().backward()
    assert sum(each.nbytes for each in kept if not isinstance(each, nn.Parameter)) == 2 * x.numel()

    twin, z = nn.Linear(24, 40, bias=has_bias).double(), x.detach().double().requires_grad_()
    twin.load_state_dict(layer.state_dict())
    (twin(z) * outer).sum().backward()
    pairs = [(layer.weight.grad, twin.weight.grad), *([(layer.bias.grad, twin.bias.grad)] if has_bias else [])]
    for got, expected in [*pairs, *([(x.grad, z.grad)] if wanted else [])]:
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), expected, rtol=0, atol=1e-2 * expected.abs().max().item())
    assert wanted or x.grad is None


def test_other_types_are_multiplied_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Red if float64, float16 or a GPU's bfloat16 goes through float32."""
    monkeypatch.setattr(products, "LACKS_BFLOAT16", True)
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    cases = [(torch.float64, cpu), (torch.float16, cpu), (torch.float32, cpu), (torch.bfloat16, gpu)]
    assert all(products.multiplied_in(*case) == case[0] for case in cases)
    assert products.multiplied_in(torch.bfloat16, cpu) == torch.float32
