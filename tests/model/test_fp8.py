"""Teachers in FP8, emulated where there is no GPU: what changes, what must not, that they follow, and that the gate sees."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from benchmarks import tuning
from benchmarks.contestants import autocast
from tests.host_traffic import HostTraffic
from tests.tiny import random_batch, tiny_options
from xkd_fast.engine.ema import Teachers
from xkd_fast.errors import UserError
from xkd_fast.model import fp8, kernels, vit
from xkd_fast.model.build import build_model
from xkd_fast.model.graphs import Pass
from xkd_fast.model.options import EncoderOptions, ModelOptions
from xkd_fast.model.packing import Group
from xkd_fast.model.xkd import XKD
from xkd_fast.reference import MODALITIES
from xkd_kernels import fp8_linear, naive_quantise_rows

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CLIPS, DEPTH = 8, 2
VARIANTS = ("xkd", "mas", "mats")
LAYERS = ("qkv", "proj", "fc1", "fc2")
HALF = torch.bfloat16


def options(**changes: object) -> ModelOptions:
    """Tiny, of widths that such products take."""
    return tiny_options(**{"encoder": EncoderOptions(32, DEPTH, 4), "teacher_precision": "fp8", **changes})


def trained_like(options: ModelOptions) -> XKD:
    """Teachers that are not their students: sharper attention, gains and biases, distributions far from uniform."""
    model = build_model(options, seed=1)
    assert isinstance(model, XKD)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "_teacher." in name and parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
            elif "_teacher." in name and "prototype" not in name:
                noise = torch.randn(parameter.shape, generator=generator) * parameter.square().mean().sqrt()
                parameter.mul_(1.4).add_(0.5 * noise)
    return model.to(DEVICE)


def taught(options: ModelOptions, clips: int = CLIPS, dtype: torch.dtype = HALF) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Logits and refinement weights of one batch."""
    model, views = trained_like(options), random_batch(options, clips, dtype=torch.float32)[0].to(DEVICE)
    with autocast(DEVICE, dtype):
        return model.teach(model.teacher_clips(views))


def copies(model: XKD) -> list[tuple[torch.nn.Linear, fp8.Fp8Linear]]:
    """The blocks' linear layers and what stands for them, brought up to date."""
    with autocast(DEVICE, HALF):
        fast = model.teachers_for(DEVICE)
    pairs = [(model.teacher(m).encoder.blocks, fast[m].encoder.blocks) for m in MODALITIES]
    blocks = [pair for both in pairs for pair in zip(*both, strict=True)]
    return [(getattr(block, name), getattr(copy, name)) for block, copy in blocks for name in LAYERS]


@pytest.mark.parametrize("changes", [*({"variant": variant} for variant in VARIANTS), {"cls_token": False}], ids=str)
def test_teachers_are_near_themselves_in_bfloat16_and_not_the_same(changes: dict) -> None:
    """Red if a layer, bias or scale is another's, or if nothing is computed in FP8 at all."""
    ours = options(**changes)
    (logits, weights), (exact_logits, exact_weights) = map(taught, (ours, replace(ours, teacher_precision="autocast")))
    for m in MODALITIES:
        assert 1e-3 < ((logits[m] - exact_logits[m]).norm() / exact_logits[m].norm()).item() < 0.08
        assert 1e-3 < ((weights[m] - exact_weights[m]).norm() / exact_weights[m].norm()).item() < 0.15


def test_a_block_by_hand() -> None:
    """Red if a bias is left out or added twice, a branch or norm is another's, or an input is quantised at another place."""
    model = trained_like(options()).cpu()
    original, copy = (t.encoder.blocks[1] for t in (model.teacher("audio"), model.teachers_for(torch.device("cpu"))["audio"]))
    with torch.no_grad():
        for parameter in original.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        model.teachers_for(torch.device("cpu"))

        def through(layer: torch.nn.Linear, x: Tensor) -> Tensor:
            rows, weight = (q.float() * scale for q, scale in map(naive_quantise_rows, (x, layer.weight)))
            return torch.nn.functional.linear(rows, weight, layer.bias)

        x, branch, groups = torch.randn(10, 32), torch.randn(10, 32), [Group(2, 5)]
        stream = x + branch
        mixed = model.attention.attend_packed(through(original.qkv, original.norm1(stream)), groups, original.heads)
        stream = stream + through(original.proj, mixed)
        hidden = torch.nn.functional.gelu(through(original.fc1, original.norm2(stream)))
        found = vit.run_block(copy, x, branch, groups, model.attention.attend_packed, "torch")
    for mine, expected in zip(found, (stream, through(original.fc2, hidden)), strict=True):
        assert ((mine - expected).norm() / expected.norm()).item() < 2e-3  # a number that is rounded the other way


def test_the_kernels_compute_the_same() -> None:
    """Red if an operator of a block is silently PyTorch's, or its kernel gets another's gain, bias or branch."""
    launched: set[tuning.Key] = set()
    # a GPU's products give bfloat16, which the interpreter cuts off instead of rounding it
    dtype, tolerance = (torch.float32, 0.01) if DEVICE.type == "cpu" else (HALF, 0.1)
    expected = taught(options(kernels="torch"), 1, dtype)
    with tuning.launches({}, launched):
        found = taught(options(kernels="triton"), 1, dtype)
    operators = ("quantise_rows", "residual_layer_norm_fp8", "bias_gelu_fp8")
    assert {key[0] for key in launched} >= {f"{operator}_forward" for operator in operators}
    for mine, theirs in zip(found, expected, strict=True):
        for m in MODALITIES:
            assert ((mine[m] - theirs[m]).norm() / theirs[m].norm()).item() < tolerance


@pytest.mark.parametrize("changes", [{}, {"variant": "mats", "checkpointing": True}, {"teacher_view": "local"}], ids=str)
def test_a_step_trains_the_same_parameters(changes: dict) -> None:
    """Red if the students' pass goes through FP8, a gradient is lost or not finite, or a loss is far from what it was."""
    found = []
    for precision in ("fp8", "autocast"):
        each = options(teacher_precision=precision, **changes)
        model = trained_like(each)
        views, masks = random_batch(each, CLIPS, dtype=torch.float32)
        with autocast(DEVICE, HALF):
            losses = model(views.to(DEVICE), masks.to(DEVICE))
        losses.total.backward()
        found.append((losses, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
    (losses, gradients), (exact, expected) = found
    for m in MODALITIES:
        assert torch.equal(losses.outputs.student_logits[m], exact.outputs.student_logits[m])
    assert torch.equal(losses.reconstruction, exact.reconstruction)
    assert losses.distillation != exact.distillation
    assert losses.total.item() == pytest.approx(exact.total.item(), rel=0.05)
    assert {n: g.shape for n, g in gradients.items()} == {n: g.shape for n, g in expected.items()}
    assert all(gradient.isfinite().all() for gradient in gradients.values())


def ema(model: XKD, *, told: bool) -> None:
    """Every teacher moves half way to its student; ``told``: as the engine does it, which knows of the copies."""
    pairs = [(model.student(m), model.teacher(m)) for m in MODALITIES]
    Teachers(*pairs, model if told else None)(0.5, 0.5)


@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize("variant", VARIANTS)
def test_weights_follow_an_update_in_their_places(variant: str, told: bool) -> None:
    """Red if a weight, scale or bias goes on with old numbers after an update, moves in memory (a recording reads it where it
    was), is quantised again though nothing has changed, or if MATS quantises its one stack twice."""
    model = trained_like(options(variant=variant))
    before = copies(model)
    places = [x.data_ptr() for _, copy in before for x in (copy.weight, copy.scale)]
    old = [copy.weight.float().clone() for _, copy in before]
    assert len({id(copy) for _, copy in before}) == len(LAYERS) * DEPTH * (1 if variant == "mats" else 2)
    ema(model, told=told)
    after = copies(model)
    assert [x.data_ptr() for _, copy in after for x in (copy.weight, copy.scale)] == places
    for (original, copy), stale in zip(after, old, strict=True):
        weight, scale = naive_quantise_rows(original.weight.detach())
        assert torch.equal(copy.weight.float(), weight.float()) and torch.equal(copy.scale, scale)
        assert not torch.equal(copy.weight.float(), stale)
        assert original.bias is None or torch.equal(copy.bias, original.bias.to(HALF))
    after[0][1].weight.zero_()  # who quantises again would write over it
    assert not copies(model)[0][1].weight.float().any()


def test_one_byte_per_weight_and_no_other_copy() -> None:
    """Red if the blocks' weights are kept in bfloat16 as well, or an update is asked to write them."""
    model = trained_like(options())
    pairs = copies(model)
    assert all(copy.weight.element_size() == 1 for _, copy in pairs)
    halves = model.halves()
    assert halves and not any(id(original.weight) in halves for original, _ in pairs)
    assert all(id(original.bias) in halves for original, _ in pairs if original.bias is not None)
    assert not any(isinstance(module, fp8.Fp8Linear) for module in model.modules()), "a checkpoint would hold them"


def test_nothing_waits_for_the_device_and_a_recording_follows() -> None:
    """Red if the pass reads a value back, which ends a recording, or a recording goes on with old weights."""
    model = trained_like(options())
    batch = random_batch(model.options, CLIPS, dtype=torch.float32)
    with HostTraffic() as traffic, torch.autocast(DEVICE.type, HALF):
        model(batch[0].to(DEVICE), batch[1].to(DEVICE)).total.backward()
    assert not traffic.met
    prepared = []

    def run_again(run: Pass, device: torch.device) -> Pass:
        def replay() -> None:
            prepared.append([copy.weight.float().clone() for _, copy in raw])
            run()

        run()
        return replay

    raw = copies(model)
    for _ in range(2):
        with autocast(DEVICE, HALF):
            model.recorded_losses(batch[0].to(DEVICE), batch[1].to(DEVICE), run_again)
        ema(model, told=False)
    assert not torch.equal(prepared[0][0], prepared[1][0]), "refreshed inside of the recording, or never"


def test_compiled_blocks_compute_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Red if a block in FP8 breaks its graph (that raises), or computes something else compiled."""
    torch._dynamo.reset()
    monkeypatch.setattr(vit, "BACKEND", "aot_eager")
    plain, compiled = map(taught, (options(), options(compile=True)))
    for found, expected in zip(compiled, plain, strict=True):
        for m in MODALITIES:
            torch.testing.assert_close(found[m], expected[m], rtol=0.02, atol=0.02)


# ------------------------------------------------------------------------------------------------------------------- the gate


def gate(changed: Callable[..., Tensor] | None, monkeypatch: pytest.MonkeyPatch, **changes: object) -> fp8.Agreement:
    """What the gate sees of trained-like teachers whose layers are computed by ``changed``."""
    if changed:
        monkeypatch.setattr(fp8, "fp8_linear", changed)
    model = trained_like(options(**changes))
    with autocast(DEVICE, HALF):
        return fp8.agreement(model, random_batch(model.options, CLIPS, dtype=torch.float32)[0].to(DEVICE))


BROKEN = {
    "weights' scale twice": lambda q, s, w, t, *more: fp8_linear(q, s, w, 2 * t, *more),
    "tokens' scales": lambda q, s, w, t, *more: fp8_linear(q, s.roll(1, 0), w, t, *more),
    "no number": lambda q, s, w, t, *more: fp8_linear(q, s * torch.nan, w, t, *more),
    "scales left out": lambda q, s, w, t, *more: fp8_linear(q, torch.ones_like(s), w, t, *more),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_gate_lets_good_teachers_pass(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Red if a limit is so tight that rounding alone breaks it, or a figure is not measured."""
    found = gate(None, monkeypatch, variant=variant)
    fp8.require_agreement(found)
    for figures in found.values():
        assert figures.keys() == fp8.LIMITS.keys()
        assert all(figures[name] > 0 for name in ("weights_mean", "weights_largest", "divergence", "angle"))
        assert figures["weights_mean"] < fp8.LIMITS["weights_mean"] / 2 and figures["angle"] < fp8.LIMITS["angle"] / 4


@pytest.mark.parametrize("name", BROKEN)
def test_the_gate_catches_broken_scales(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Red if a limit is so wide that wrong numbers pass."""
    found = gate(BROKEN[name], monkeypatch)
    with pytest.raises(UserError, match=r"video weights_mean .*divergence .*set model\.teacher_precision=autocast"):
        fp8.require_agreement(found)


def test_figures_are_what_they_are_called(monkeypatch: pytest.MonkeyPatch) -> None:
    """Red if a centre, temperature, direction or mean is another one; by hand, on teachers that are told what to say."""
    model = trained_like(options())
    model.set_teacher_temperatures(0.5, 2.0)
    for m in MODALITIES:
        model.get_buffer(f"{m}_centre").normal_(generator=torch.Generator(DEVICE).manual_seed(3))
    told = {}
    for which in ("found", "exact"):
        logits = {m: torch.randn(2, 40, device=DEVICE) for m in MODALITIES}
        told[which] = logits, {m: torch.rand(2, 6, device=DEVICE) + 0.1 for m in MODALITIES}
    monkeypatch.setattr(model, "teach", lambda clips, teachers=None: told["exact" if teachers else "found"])
    figures = fp8.agreement(model, random_batch(model.options, 2, dtype=torch.float32)[0])
    for m, temperature in zip(MODALITIES, (0.5, 2.0), strict=True):
        found, exact = told["found"][0][m], told["exact"][0][m]
        p, q = (((x - model.get_buffer(f"{m}_centre")) / temperature).softmax(dim=-1) for x in (exact, found))
        weights, other = told["exact"][1][m], told["found"][1][m]
        means = [(abs(a - b).mean() / b.mean()).item() for a, b in zip(other, weights, strict=True)]
        largest = [(abs(a - b).max() / b.max()).item() for a, b in zip(other, weights, strict=True)]
        cosines = [(a @ b / (a.norm() * b.norm())).item() for a, b in zip(found, exact, strict=True)]
        expected = {
            "weights_mean": sum(means) / 2,
            "weights_largest": max(largest),
            "divergence": (p * (p / q).log()).sum().item() / 2,
            "angle": 1 - sum(cosines) / 2,
            "other_top": (p.argmax(dim=-1) != q.argmax(dim=-1)).float().mean().item(),
        }
        assert figures[m] == pytest.approx(expected, rel=1e-4)
    parts = [{m: dict.fromkeys(fp8.LIMITS, x) for m in MODALITIES} for x in (1.0, 4.0)]
    assert fp8.together(parts)["audio"] == {**dict.fromkeys(fp8.LIMITS, 2.5), "weights_largest": 4.0}


# ----------------------------------------------------------------------------------------------------- what is asked and told


def test_what_cannot_be_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Red if sizes that a GPU refuses, the plain reference, or a GPU without such products are found out in the middle."""
    with pytest.raises(ValueError, match=r"model\.encoder\.width = 24 must be a multiple of 16 for .*teacher_precision = fp8"):
        tiny_options(teacher_precision="fp8")
    with pytest.raises(ValueError, match=r"width × model\.mlp_ratio = 40 must be a multiple of 16"):
        options(mlp_ratio=1.25)
    with pytest.raises(ValueError, match=r"fp8 needs model\.implementation = fast"):
        options(implementation="reference")
    assert options().as_reference().teacher_precision == "autocast"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(fp8, "missing_scaled_product", lambda device: "it is too old")
    with pytest.raises(UserError, match=r"teacher_precision = fp8 cannot run here: it is too old; use autocast"):
        fp8.require_fp8()


def test_who_computes_is_told() -> None:
    """Red if an emulation that is slower than without, or the choice of a quantisation, is kept from the user."""
    lines = kernels.described(replace(ModelOptions(), teacher_precision="fp8"), torch.device("cpu"), HALF)
    assert any("FP8" in line and "emulated on a CPU, which is slower than without" in line for line in lines)
    assert not any("FP8" in line for line in kernels.described(ModelOptions(), torch.device("cpu"), HALF))
    asked = kernels._questions(replace(ModelOptions(), teacher_precision="fp8"), HALF)
    assert {question for question in asked if "fp8" in question[0] or "quantise" in question[0]} == {
        ("residual_layer_norm_fp8", torch.float32, "768"),
        ("bias_gelu_fp8", HALF, "3072"),
        *(("quantise_rows", kind, size) for kind, size in ((HALF, "768"), (torch.float32, "768"), (torch.float32, "3072"))),
    }
