"""A recorded pass gives what the model gives, and the model does nothing that a CUDA graph cannot record."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from tests.host_traffic import HostTraffic
from tests.tiny import random_batch, tiny_options
from xkd_fast import reference
from xkd_fast.data.views import MaskNoise, Views
from xkd_fast.engine.ema import Teachers
from xkd_fast.errors import UserError
from xkd_fast.model.build import build_model
from xkd_fast.model.graphs import Pass
from xkd_fast.model.options import ModelOptions
from xkd_fast.model.xkd import XKD
from xkd_fast.objective.losses import Losses

VARIANTS = ("xkd", "mas", "mats")


def run_again(run: Pass, device: torch.device) -> Pass:
    """What stands in for a graph where there is no GPU: the same pass from the same places into the same places."""
    run()
    return run


def batches(options: ModelOptions, count: int, dtype: torch.dtype) -> list[tuple[Views, MaskNoise]]:
    """Random batches, all different."""
    return [random_batch(options, 3, seed=seed, dtype=dtype) for seed in range(count)]


def gradients(model: reference.XKD) -> dict[str, torch.Tensor | None]:
    """The model's gradients by name, taken away from it."""
    taken = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    return taken


def scalars(losses: Losses) -> dict[str, float]:
    """The losses' terms as numbers."""
    return {name: value.item() for name, value in losses.terms().items()}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_recorded_pass_is_the_models(variant: str) -> None:
    """Red if inputs are not taken over, gradients are not added up or scaled, or one pass overwrites what another returned."""
    options = tiny_options(variant=variant)
    model = build_model(options, seed=2).double()
    assert isinstance(model, XKD)
    several = batches(options, 3, torch.float64)
    expected = []
    for views, masks in several:
        losses = model(views, masks)
        (losses.total / 4).backward()
        expected.append(losses)
    plain = gradients(model)
    got = []
    for views, masks in several:
        losses = model.recorded_losses(views, masks, run_again)
        (losses.total / 4).backward()
        got.append(losses)
    for ours, theirs in zip(got, expected, strict=True):
        assert scalars(ours) == pytest.approx(scalars(theirs), rel=1e-12)
        for kind in ("student_logits", "teacher_logits", "refinement_weights", "teacher_means"):
            for modality in ("video", "audio"):
                assert torch.equal(getattr(ours.outputs, kind)[modality], getattr(theirs.outputs, kind)[modality])
    recorded = gradients(model)
    for name, gradient in plain.items():
        assert (gradient is None) == (recorded[name] is None), name
        if gradient is not None:
            torch.testing.assert_close(recorded[name], gradient, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_recorded_backward_pass_does_not_run_under_autocast(variant: str) -> None:
    """Red if it does: its float32 products are then rounded to bfloat16, and gradients are off by half a per cent."""
    options = tiny_options(variant=variant)
    model = build_model(options, seed=2)
    assert isinstance(model, XKD)
    views, masks = random_batch(options, 3, dtype=torch.float32)
    both = []
    for recorded in (False, True):
        with torch.autocast("cpu", torch.bfloat16):
            losses = model.recorded_losses(views, masks, run_again) if recorded else model(views, masks)
        losses.total.backward()
        both.append(gradients(model))
    for name, gradient in both[0].items():
        if gradient is not None:
            assert both[1][name] is not None, name
            assert (both[1][name] - gradient).norm() <= 1e-6 * gradient.norm(), name


def test_a_recording_follows_weights_teachers_and_autocast() -> None:
    """Red if a recording goes on with casts of old weights, old teachers, old centres or another precision."""
    options = tiny_options()
    model = build_model(options, seed=2)
    assert isinstance(model, XKD)
    optimizer = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.1)
    video, audio = ((model.student(m), model.teacher(m)) for m in reference.MODALITIES)
    update_teachers = Teachers(video, audio)
    for views, masks in batches(options, 3, torch.float32):
        for half in (True, False):
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                expected, got = model(views, masks), model.recorded_losses(views, masks, run_again)
            assert scalars(got) == pytest.approx(scalars(expected), rel=1e-6), half
        got.total.backward()
        optimizer.step()
        update_teachers(0.5, 0.5)
        reference.update_centres(model, got.outputs.teacher_means)
        model.set_teacher_temperatures(0.05, 0.06)


def test_batches_of_another_shape_are_computed_here_and_now() -> None:
    """Red if a last, smaller batch is squeezed into the recording of another."""
    options = tiny_options()
    model = build_model(options, seed=2).double()
    assert isinstance(model, XKD)
    recordings = []
    for clips in (3, 2, 3):
        views, masks = random_batch(options, clips, dtype=torch.float64)
        got = model.recorded_losses(views, masks, run_again)
        assert got.total.item() == pytest.approx(model(views, masks).total.item(), rel=1e-12)
        recordings.append(model._recorded)
    assert recordings[0] is recordings[1] is recordings[2] is not None


def test_a_pass_that_cannot_be_recorded_says_so() -> None:
    """Red if it ends in a traceback of CUDA's."""

    def fail(run: Pass, device: torch.device) -> Pass:
        raise RuntimeError("operation not permitted when stream is capturing")

    options = tiny_options()
    model = build_model(options, seed=2)
    assert isinstance(model, XKD)
    with pytest.raises(
        UserError, match=r"model\.cuda_graph = true cannot be recorded here \(operation not permitted.*set it to false"
    ):
        model.recorded_losses(*random_batch(options, 2, dtype=torch.float32), fail)


@pytest.mark.parametrize("refinement", ("mean", "softmax"))
@pytest.mark.parametrize("variant", VARIANTS)
def test_nothing_waits_for_the_device(variant: str, refinement: str) -> None:
    """Red if the pass reads a value back, or makes a tensor on the host, such as a constant: either ends a recording."""
    options = tiny_options(variant=variant, refinement=refinement)
    model = build_model(options, seed=2)
    views, masks = random_batch(options, 3, dtype=torch.float32)
    raw = replace(
        views,
        video_global=(views.video_global * 50 + 128).clamp(0, 255).to(torch.uint8),
        video_locals=[(view * 50 + 128).clamp(0, 255).to(torch.uint8) for view in views.video_locals],
    )
    for batch in (views, raw):
        with HostTraffic() as traffic, torch.autocast("cpu", torch.bfloat16):
            model(batch, masks).total.backward()
        assert not traffic.met


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(
    ("variant", "more", "half"),
    [
        *itertools.product(VARIANTS, ({}, {"teacher_stream": True}, {"checkpointing": True}), (False, True)),
        ("mas", {"compile": True}, True),  # once: the compiler takes most of a minute
    ],
)
def test_a_cuda_graph_is_the_models_pass(variant: str, more: dict[str, bool], half: bool) -> None:
    """Red if a graph holds something that changes between steps: an input, a cast, a teacher, a centre, a temperature."""
    options = tiny_options(variant=variant, **more)
    models = [build_model(replace(options, cuda_graph=graph), seed=2).to("cuda") for graph in (False, True)]
    optimizers = [torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.2) for m in models]
    tolerance = 5e-3 if half else 1e-4
    several = batches(options, 8, torch.float32)
    for number in range(4):
        terms = []
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            for views, masks in several[2 * number : 2 * number + 2]:  # two are accumulated
                with torch.autocast("cuda", torch.bfloat16, enabled=half):
                    losses = model(views.to("cuda"), masks.to("cuda"))
                (losses.total / 2).backward()
            optimizer.step()
            video, audio = ((model.student(m), model.teacher(m)) for m in reference.MODALITIES)
            Teachers(video, audio)(0.3, 0.4)
            reference.update_centres(model, losses.outputs.teacher_means)
            model.set_teacher_temperatures(0.05 + 0.01 * number, 0.06)
            terms.append(scalars(losses))
        assert terms[1] == pytest.approx(terms[0], rel=tolerance), number
    for (name, one), other in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert (one - other).norm() <= tolerance * one.norm() + 1e-5, name
