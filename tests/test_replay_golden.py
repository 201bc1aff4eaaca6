"""The golden files, replayed: three training steps of the released model, every number that the files hold."""

import json

import pytest
import torch

from tests.replay_golden import FILES, GOLDEN, LOSS_NAMES, Errors, Golden, main, replay
from xkd_fast import reference

# AdamW's first update is g/(|g| + 1e-8): where a clipped gradient is itself near 1e-8, its rounding decides half the update.
FLOAT32_TOLERANCE = {"gradients": 2e-5, "weights": 2e-4, "weights_of_gradients_near_eps": 1e-3, "teachers": 2e-4}
NEAR_EPS = 5e-4  # the share of a file's numbers that are so, at most


@pytest.fixture(scope="module", params=FILES)
def golden(request):
    return Golden.read(GOLDEN / f"{request.param}.safetensors")


@pytest.mark.parametrize("implementation", ["reference", "fast"])
def test_float64_replay_stays_within_its_tolerances(golden, implementation):
    """Any slip in model, losses, clipping, AdamW, EMA or centres of any variant."""
    errors = replay(golden, torch.float64, implementation)
    losses = 1e-9 if golden.settings["variant"] == "XKD" else 1e-8
    tolerance = dict.fromkeys(errors.worst, 1e-6) | {"losses": losses}
    assert {kind: error for kind, (error, _) in errors.worst.items() if not error <= tolerance[kind]} == {}


@pytest.mark.parametrize("implementation", ["reference", "fast"])
def test_float32_replay_is_exact_to_float32_rounding(golden, implementation):
    """A float32 cancellation, say in the MMD's distances, or an accumulation in half precision."""
    errors = replay(golden, torch.float32, implementation)
    assert {k: e for k, (e, _) in errors.worst.items() if not e <= FLOAT32_TOLERANCE.get(k, 5e-6)} == {}
    numbers = sum(tensor.numel() for name, tensor in golden.tensors.items() if name.startswith("step0.grad."))
    assert errors.near_eps < NEAR_EPS * numbers


@pytest.mark.parametrize(
    "name", ["xkd_global", "xkd_local", *(pytest.param(f"{name}_global", marks=pytest.mark.slow) for name in ("mas", "mats"))]
)
def test_float32_replay_through_the_kernels(name):
    """Any slip of a kernel, or in how the model packs for it: segments, order of heads, gradients."""
    errors = replay(Golden.read(GOLDEN / f"{name}.safetensors"), torch.float32, "fast", "triton")
    assert {k: e for k, (e, _) in errors.worst.items() if not e <= FLOAT32_TOLERANCE.get(k, 5e-6)} == {}


def test_nothing_that_a_file_holds_is_left_uncompared(golden):
    """A replay that skips tensors, for instance those whose name it fails to map."""
    compared = replay(golden, torch.float64).compared
    names = list(golden.tensors)
    # What is stored twice: head.mlp.4 = head.mlp.1. A shared block stack has a place in the state under both names.
    final = [name for name in names if name.startswith("final.") and ".head.mlp.4." not in name]
    expected = {
        "losses": sum(".loss." in name for name in names),
        "gradients": sum(name.startswith("step0.grad.") for name in names),
        "logits": sum(name.startswith("step0.logits.") for name in names),
        "refinement_weights": sum(name.startswith("step0.refinement_weight.") for name in names),
        "centres": sum(name.endswith(".center") for name in final),
        "teachers": sum("_teacher." in name for name in final),
    }
    expected["weights"] = len(final) - expected["centres"] - expected["teachers"]
    assert compared == expected
    assert expected["losses"] == 3 * len(LOSS_NAMES)
    kinds = (".loss.", ".grad.", ".logits.", ".refinement_weight.", ".input.", ".mask_noise.")
    rest = [name for name in names if not name.startswith(("init.", "final.")) and not any(kind in name for kind in kinds)]
    assert rest == []


def test_every_input_of_a_file_reaches_the_model(golden):
    """A view or mask noise that is read from the file but not used, or not read."""
    for step in range(3):
        views, noise = golden.inputs(step, torch.float64)
        used = [views.video_global, views.audio_global, *views.video_locals, *views.audio_locals, noise.video, noise.audio]
        stored = golden.group(f"step{step}.input.") | golden.group(f"step{step}.mask_noise.")
        assert len(used) == len(stored)
        assert sorted(x.double().sum().item() for x in used) == sorted(x.double().sum().item() for x in stored.values())


def test_mas_losses_differ_only_by_the_released_second_clipping_pass(monkeypatch):
    """A real error of ~1e-9 that hides in the wider tolerance of MAS: with the released second pass it must vanish."""
    golden = Golden.read(GOLDEN / "mas_global.safetensors")
    clip = reference.clip_gradients

    def clip_shared_stack_twice(model, max_norm):
        clip(model, max_norm)
        with torch.no_grad():
            for parameter in model.student("video").encoder.blocks.parameters():
                parameter.grad.mul_((max_norm / (parameter.grad.norm() + 1e-6)).clamp(max=1.0))

    single = replay(golden).worst["losses"][0]
    monkeypatch.setattr(reference, "clip_gradients", clip_shared_stack_twice)
    double = replay(golden).worst["losses"][0]
    assert double < 1e-10 < single


def test_errors_are_relative_to_the_largest_number_and_nan_counts_as_wrong():
    """A comparison that passes on NaN, on zeros, or on tensors broadcast against each other."""
    errors = Errors()
    errors.compare("kind", "exact", torch.zeros(2), torch.zeros(2))
    assert errors.worst["kind"][0] == 0
    errors.compare("kind", "off", torch.tensor([1.0, -3.0]), torch.tensor([1.0, -4.0]))
    assert errors.worst["kind"] == (0.25, "off")
    errors.compare("kind", "not zero", torch.tensor([0.0, 1e-30]), torch.zeros(2))
    assert errors.worst["kind"] == (1.0, "not zero")
    errors.compare("kind", "nan", torch.tensor([1.0, float("nan")]), torch.ones(2))
    assert errors.worst["kind"] == (float("inf"), "nan")
    with pytest.raises(ValueError, match=r"kind shape: shape \(1,\), expected \(2,\)"):
        errors.compare("kind", "shape", torch.ones(1), torch.ones(2))


def test_a_missing_gradient_is_reported(monkeypatch):
    """A parameter of the file that the model does not train."""
    golden = Golden.read(GOLDEN / "xkd_local.safetensors")
    golden.tensors["step0.grad.vid_student.backbone.unheard_of"] = torch.ones(1)
    with pytest.raises(ValueError, match=r"gradients in the file but not in the model: .*unheard_of"):
        replay(golden)


def test_command_line_prints_one_json_object_and_exits_by_the_tolerance(capsys):
    """A replay command whose exit code says green when an error is above the tolerance."""
    assert main(["xkd_local"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["passed"] and set(report["errors"]) == set(report["compared"]) == set(report["worst"])
    assert report["compared"] | {"losses": 30, "centres": 2, "teachers": 76} == report["compared"]
    assert report["tolerance"]["losses"] == 1e-9 < report["tolerance"]["weights"] == 1e-6
    assert main(["xkd_local", "--tolerance", "0"]) == 1
    capsys.readouterr()
    assert main(["xkd_local", "--tolerance", "1e-9"]) == 1
    assert json.loads(capsys.readouterr().out)["passed"] is False
    with pytest.raises(SystemExit) as stopped:
        main(["no_such_file"])
    assert stopped.value.code == 2
    assert "no_such_file does not exist" in capsys.readouterr().err


def test_options_come_from_the_file(golden):
    """A replay that falls back on defaults where the file's settings matter (views, variant, temperatures)."""
    options, settings = golden.options(), golden.settings
    assert options.variant == settings["variant"].lower().replace("xkd_", "")
    assert options.teacher_view == settings["teacher_view"]
    assert (options.video.local_views, options.audio.local_views) == (
        settings["local_views_video"],
        settings["local_views_audio"],
    )
    assert options.objective.audio_teacher_temperature.end == 0.07 != options.objective.video_teacher_temperature.end
