"""The fast model through ``xkd_kernels``, interpreted where there is no GPU, beside itself through PyTorch's operators."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from benchmarks import tuning
from benchmarks.contestants import autocast
from benchmarks.measure import saved_bytes
from tests.tiny import random_batch, tiny_options
from xkd_fast.errors import UserError
from xkd_fast.model import kernels, vit
from xkd_fast.model.build import build_model
from xkd_fast.model.options import EncoderOptions, ModelOptions
from xkd_kernels import Choice

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CLIPS = 3
TRAINED = ("residual_layer_norm", "bias_gelu")
OBJECTIVES = ("unit_rows", "distillation_loss", "masked_patch_loss")


def step(options: ModelOptions, dtype: torch.dtype, *, is_raw: bool) -> tuple[Tensor, dict[str, Tensor], set[str]]:
    """Loss, gradients and the kernels that one pass launches."""
    model = build_model(options, seed=0).to(DEVICE)
    views, masks = random_batch(options, CLIPS, dtype=torch.float32)
    if is_raw:
        generator = torch.Generator().manual_seed(1)
        pixels = [torch.randint(256, x.shape, generator=generator).byte() for x in (views.video_global, *views.video_locals)]
        channels_last = [x.contiguous(memory_format=torch.channels_last_3d) for x in pixels]
        views = replace(views, video_global=channels_last[0], video_locals=channels_last[1:])
    launched: set[tuning.Key] = set()
    with tuning.launches({}, launched), autocast(DEVICE, dtype):
        loss = model(views.to(DEVICE), masks.to(DEVICE)).total
        loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, {key[0] for key in launched}


@pytest.mark.parametrize(
    ("dtype", "changes", "is_raw", "error"),
    [
        (torch.float32, {}, True, 1e-5),
        (torch.float32, {"variant": "mats", "checkpointing": True}, False, 1e-5),
        (torch.bfloat16, {"variant": "mas"}, True, 0.08),  # the interpreter cuts bfloat16 off instead of rounding it
    ],
)
def test_a_step_through_every_kernel(dtype: torch.dtype, changes: dict, is_raw: bool, error: float) -> None:
    """Red if an operator is silently PyTorch's, or gets another's weights, bias, branch, segments, pixels or gradient."""
    options = tiny_options(encoder=EncoderOptions(24, 4, 3), **changes)
    loss, gradients, none = step(replace(options, kernels="torch"), dtype, is_raw=is_raw)
    found, ours, launched = step(replace(options, kernels="triton", attention="triton"), dtype, is_raw=is_raw)
    assert not none
    trained = (f"{name}_{way}" for name in (*TRAINED, *OBJECTIVES) for way in ("forward", "backward"))
    trained = (*trained, "mmd_loss_forward", "mmd_loss_backward_weights", "mmd_loss_backward_gradient")
    attention = ("packed_attention_forward", "packed_attention_whole_backward")
    assert launched >= {"gather_patches_forward", "cls_attention_forward", "refine_forward", *trained, *attention}
    assert found.item() == pytest.approx(loss.item(), rel=error / 4)
    assert set(ours) == set(gradients)
    least = 1e-3 * max(gradient.norm() for gradient in gradients.values())
    off = {name: ((ours[name] - g).norm() / g.norm().clamp(min=least)).item() for name, g in gradients.items()}
    assert {name: value for name, value in off.items() if not value < error} == {}


def test_the_kernels_keep_no_more_for_the_backward_pass() -> None:
    """Red if what a kernel hands out again in its backward pass, norms, GELU's output and targets, is kept all the same.

    The loss of masked patches reads the clips again, which are the batch's own and there anyway.
    """
    options = tiny_options(encoder=EncoderOptions(24, 4, 4))
    batch, kept = random_batch(options, CLIPS, dtype=torch.float32), {}
    for name in ("torch", "triton"):
        model = build_model(replace(options, kernels=name, attention="sdpa"), seed=0).to(DEVICE)
        kept[name] = saved_bytes(lambda model=model: model(*(part.to(DEVICE) for part in batch)).total)
    clips = batch[0].video_global.nbytes + batch[0].audio_global.nbytes
    assert kept["triton"] - clips <= 1.01 * kept["torch"]


def test_the_kernels_under_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Red if an operator breaks the graph (that raises) or, traced, computes something else."""
    torch._dynamo.reset()
    monkeypatch.setattr(vit, "BACKEND", "aot_eager")
    options = replace(tiny_options(), kernels="triton")
    loss, gradients, _ = step(options, torch.float32, is_raw=False)
    found, ours, launched = step(replace(options, compile=True), torch.float32, is_raw=False)
    assert launched >= {f"{name}_{way}" for name in TRAINED for way in ("forward", "backward")}
    assert found.item() == pytest.approx(loss.item(), rel=1e-6)
    for name, gradient in gradients.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-3, atol=1e-6)


def test_kernels_that_cannot_run_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Red if a choice that cannot be kept becomes another one without a word."""
    monkeypatch.setattr(kernels, "obstacle", lambda device, dtype: "it is not its day")
    with pytest.raises(UserError, match=r"model\.kernels = triton cannot run here: it is not its day; use torch or auto"):
        build_model(replace(tiny_options(), kernels="triton"), seed=0)
    build_model(replace(tiny_options(), kernels="auto"), seed=0)


def test_who_computes_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Red if an operator's choice is left out, or another shape's is told."""
    asked = []

    def choose(operator: str, device: torch.device, dtype: torch.dtype, shape: str, name: str) -> Choice:
        asked.append((operator, dtype, shape))
        return Choice("triton" if operator == "bias_gelu" else "torch", "measured")

    monkeypatch.setattr(kernels, "choose", choose)
    lines = kernels.described(ModelOptions(), DEVICE, torch.bfloat16)
    half, single = torch.bfloat16, torch.float32
    assert set(asked) == {
        *(("residual_layer_norm", single, width) for width in ("768", "384")),
        *(("bias_gelu", half, width) for width in ("3072", "1536")),
        *(("gather_patches", half, "3072"), ("gather_patches", single, "64")),
        *(("masked_patch_loss", half, numbers) for numbers in ("3072", "64")),
        ("refine", single, "768"),
        *(("cls_attention", half, shape) for shape in ("512x64", "1024x64")),
        *(("unit_rows", half, "256"), ("unit_rows", single, "256"), ("distillation_loss", single, "8192")),
        ("mmd_loss", single, "8192"),
    }
    assert len(lines) == 2 and "kernels: triton, measured: bias_gelu 3072, bias_gelu 1536" in lines
    monkeypatch.undo()
    assert kernels.described(ModelOptions(kernels="torch"), DEVICE, half) == ["kernels: torch, asked for"]
