"""The fast model computes the reference's numbers, for every variant and option, and keeps less for the backward pass."""

from __future__ import annotations

import copy
import math
import pickle
from dataclasses import replace

import pytest
import torch
from torch._dynamo.utils import counters

from benchmarks.measure import launches, saved_bytes
from tests.tiny import random_batch, tiny_options
from xkd_fast import reference
from xkd_fast.data.views import Views
from xkd_fast.engine.ema import Teachers
from xkd_fast.errors import UserError
from xkd_fast.model import vit
from xkd_fast.model.build import build_model
from xkd_fast.model.options import AudioOptions, ModelOptions, ObjectiveOptions, VideoOptions
from xkd_fast.objective.losses import Losses

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
VIDEO = {n: VideoOptions(8, 24, n, 4, 16, 2, 8, mask_ratio=0.7) for n in range(4)}
AUDIO = {n: AudioOptions(16, 64, n, 32, 4, 16, mask_ratio=0.6) for n in range(3)}
SAME_LENGTHS = {  # 16 tokens of either: a packed group holds both modalities
    "video": VideoOptions(8, 16, 1, 4, 8, 2, 8, mask_ratio=0.5),
    "audio": AudioOptions(16, 64, 1, 16, 4, 16, mask_ratio=0.5),
}
OPTIONS = {
    "xkd": {},
    "mas": {"variant": "mas", "video": VIDEO[3]},
    "mats": {"variant": "mats", "video": VIDEO[2], "audio": AUDIO[2]},
    "mats of one length": {"variant": "mats", **SAME_LENGTHS},
    "mas without cls, softmax": {"variant": "mas", "cls_token": False, "refinement": "softmax"},
    "no cls": {"cls_token": False},
    "softmax": {"refinement": "softmax"},
    "local teacher": {"teacher_view": "local"},
    "local teacher, no cls, mats": {"teacher_view": "local", "cls_token": False, "variant": "mats"},
    "no local views": {"video": VIDEO[0], "audio": AUDIO[0]},
    "eager attention": {"attention": "eager"},
    "recomputed attention": {"attention": "recompute"},
    "checkpointing": {"checkpointing": True},
    "checkpointing, mats": {"checkpointing": True, "variant": "mats"},
    "teachers beside": {"teacher_stream": True},
}


def both(options: ModelOptions, dtype: torch.dtype) -> tuple[reference.XKD, reference.XKD]:
    """The reference and the fast model with equal weights; teachers differ from students."""
    models = []
    for implementation in ("reference", "fast"):
        plain = {"checkpointing": False, "compile": False, "teacher_stream": False} if implementation == "reference" else {}
        model = build_model(replace(options, implementation=implementation, **plain), seed=3).to(dtype)
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            seen = set()
            for name, tensor in model.state_dict().items():
                if tensor.is_floating_point() and tensor.data_ptr() not in seen and not name.endswith("prototype_scale"):
                    seen.add(tensor.data_ptr())
                    tensor.add_(0.2 * torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(dtype))
        models.append(model)
    return models[0], models[1]


def step(model: reference.XKD, options: ModelOptions, dtype: torch.dtype, device: str = "cpu") -> Losses:
    """Forward and backward of one random batch."""
    views, masks = random_batch(options, 3, seed=5, dtype=dtype)
    losses = model(views.to(torch.device(device)), masks.to(torch.device(device)))
    losses.total.backward()
    return losses


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", OPTIONS)
def test_equals_the_reference(name: str, device: str) -> None:
    """Red if a token, view, position, mask or segment is mixed up, in any variant and option."""
    options = tiny_options(**OPTIONS[name])
    plain, fast = (model.to(device) for model in both(options, torch.float64))
    expected, got = (step(model, options, torch.float64, device) for model in (plain, fast))
    for term, value in expected.terms().items():
        assert got.terms()[term].item() == pytest.approx(value.item(), rel=1e-11), term
    for kind in ("student_logits", "teacher_logits", "refinement_weights", "teacher_means"):
        for modality in ("video", "audio"):
            ours, theirs = getattr(got.outputs, kind)[modality], getattr(expected.outputs, kind)[modality]
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    gradients = dict(plain.named_parameters())
    compared = 0
    for parameter_name, parameter in fast.named_parameters():
        other = gradients[parameter_name].grad
        assert (parameter.grad is None) == (other is None), parameter_name
        if other is not None:
            compared += 1
            error = (parameter.grad - other).norm() / other.norm().clamp_min(1e-12)
            assert error < 1e-9, f"{parameter_name}: {error:.1e}"
    assert compared > 30


@pytest.mark.parametrize(
    "backend", ["aot_eager", pytest.param(vit.BACKEND, marks=[pytest.mark.slow, pytest.mark.further], id="as users have it")]
)
def test_compiled_blocks_equal_the_reference_and_are_compiled_once(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Red if a block breaks its graph (that raises), computes something else compiled, or is compiled again at every step."""
    monkeypatch.setattr(vit, "BACKEND", backend)
    options = tiny_options(compile=True)
    plain, fast = both(options, torch.float64)
    expected, got = step(plain, options, torch.float64), step(fast, options, torch.float64)
    assert got.total.item() == pytest.approx(expected.total.item(), rel=1e-11)
    gradients = dict(plain.named_parameters())
    for name, parameter in fast.named_parameters():
        assert (parameter.grad is None) == (gradients[name].grad is None), name
        if parameter.grad is not None:
            assert (parameter.grad - gradients[name].grad).norm() < 1e-9 * gradients[name].grad.norm(), name
    programs = counters["stats"]["unique_graphs"]
    step(fast, options, torch.float64)
    assert counters["stats"]["unique_graphs"] == programs > 0


def test_eight_bit_pixels_are_normalised_patch_by_patch() -> None:
    """Red if a view of bytes is taken for floats, normalised with another channel's mean, or read in another memory order."""
    options = tiny_options(video=replace(VIDEO[2], pixel_mean=(0.5, 0.3, 0.1), pixel_std=(0.2, 0.3, 0.5)))
    views, masks = random_batch(options, 3, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)

    def frames(like: torch.Tensor) -> torch.Tensor:
        """Random bytes, channels last in memory."""
        batch, channels, *size = like.shape
        drawn = torch.randint(256, (batch, *size, channels), generator=generator, dtype=torch.uint8)
        return drawn.movedim(-1, 1)

    raw = replace(views, video_global=frames(views.video_global), video_locals=[frames(view) for view in views.video_locals])
    mean, std = (torch.tensor(x).view(3, 1, 1, 1) for x in (options.video.pixel_mean, options.video.pixel_std))
    ready = replace(
        raw,
        video_global=(raw.video_global / 255 - mean) / std,
        video_locals=[(view / 255 - mean) / std for view in raw.video_locals],
    )
    for model in both(options, torch.float32):
        given, expected = model(raw, masks), model(ready, masks)
        assert given.total.item() == pytest.approx(expected.total.item(), rel=1e-6)
        assert given.reconstruction.item() == pytest.approx(expected.reconstruction.item(), rel=1e-6)


def test_state_is_the_references() -> None:
    """Red if a checkpoint of one implementation does not load into the other, or the same seed gives other weights."""
    for variant in ("xkd", "mas", "mats"):
        states = [
            build_model(tiny_options(variant=variant, implementation=name), seed=1).state_dict()
            for name in ("fast", "reference")
        ]
        assert list(states[0]) == list(states[1])
        assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_bfloat16_stays_near_float64() -> None:
    """Red if a loss, a softmax or a norm is computed in bfloat16, or the teachers' cached weights are stale."""
    options = tiny_options(video=VIDEO[2])
    plain, fast = both(options, torch.float64)
    exact = step(plain, options, torch.float64)
    rounding = both(options, torch.float32)[0]
    fast.float()
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            rounded, usual = step(fast, options, torch.float32), step(rounding, options, torch.float32)
        assert rounded.total.dtype == torch.float32
        for term, value in exact.terms().items():
            error, usual_error = (abs(losses.terms()[term].item() - value.item()) for losses in (rounded, usual))
            assert error < 3 * usual_error + 0.01 * abs(value.item()) + 0.002, f"{term}: {error:.2g} against {usual_error:.2g}"
        for model in (plain, rounding, fast):  # the teachers move as in training, and so must what is cached of them
            video, audio = ((model.student(m), model.teacher(m)) for m in reference.MODALITIES)
            Teachers(video, audio)(0.3, 0.3)
        exact = step(plain, options, torch.float64)


def test_less_is_kept_and_launched() -> None:
    """Red if an attention matrix, an invisible token's embedding or an unmasked prediction is kept for the backward pass."""
    options = tiny_options(
        video=VideoOptions(16, 64, 1, 4, 32, 2, 8, mask_ratio=0.85), audio=AudioOptions(32, 128, 1, 32, 4, 8, mask_ratio=0.8)
    )
    kept, launched = {}, {}
    for name, model in zip(("reference", "fast"), both(options, torch.float32), strict=True):
        views, masks = random_batch(options, 4, dtype=torch.float32)
        kept[name] = saved_bytes(lambda model=model, views=views, masks=masks: model(views, masks).total)
        launched[name] = launches(lambda model=model, views=views, masks=masks: model(views, masks).total.backward())
    for depth in (1, 2, 3):
        encoder = replace(options.encoder, depth=depth)
        frugal = both(replace(options, checkpointing=True, encoder=encoder), torch.float32)[1]
        kept[f"checkpointing {depth}"] = saved_bytes(lambda model=frugal: model(views, masks).total)
    clips = (options.video, options.audio)
    tokens = sum(2 + clip.keep + math.prod(clip.local_grid) for clip in clips)  # of one clip, with both CLS tokens
    one_more_block = kept["checkpointing 3"] - kept["checkpointing 2"]
    assert one_more_block == 4 * 4 * tokens * options.encoder.width, "what enters a block, and nothing else"
    kept["checkpointing"] = kept[f"checkpointing {options.encoder.depth}"]
    assert kept["fast"] < 0.6 * kept["reference"], kept
    assert kept["checkpointing"] < 0.85 * kept["fast"], kept
    assert launched["fast"] < 0.85 * launched["reference"], launched


def test_an_attention_that_cannot_run_says_why() -> None:
    """Red if an explicit choice falls back silently."""
    if torch.cuda.is_available():
        pytest.skip("needs a machine without a GPU")
    with pytest.raises(UserError, match=r"model\.attention = xformers cannot run here .*use sdpa or auto"):
        build_model(tiny_options(attention="xformers"), seed=0)


WRONG_BATCHES = {
    "a lower picture": (
        lambda v, m: replace(v, video_global=v.video_global[..., 16:, :]),
        r"views\.video_global has the shape",
    ),
    "a shorter sound": (lambda v, m: replace(v, audio_global=v.audio_global[..., 16:]), r"views\.audio_global has the shape"),
    "a sound less": (lambda v, m: replace(v, audio_global=v.audio_global[1:]), r"views\.audio_global has .* \[3, .* \[4, .*"),
    "a picture without clips": (lambda v, m: replace(v, video_global=v.video_global[0]), r"views\.video_global has the shape"),
    "no local views": (lambda v, m: replace(v, video_locals=[]), r"views\.video_locals holds 0 views, but .*options say 2"),
    "a lower local view": (
        lambda v, m: replace(v, video_locals=[v.video_locals[0], v.video_locals[1][..., 16:, :]]),
        r"views\.video_locals\[1\] has the shape .* is wanted",
    ),
    "a shorter local sound": (
        lambda v, m: replace(v, audio_locals=[a[..., 16:] for a in v.audio_locals]),
        r"views\.audio_locals\[0\] has the shape .* is wanted",
    ),
    "a local view of fewer clips": (
        lambda v, m: replace(v, video_locals=[v.video_locals[0][:2], v.video_locals[1]]),
        r"views\.video_locals\[0\] has the shape \[2, .* \[4, .* is wanted: .* 4 as views\.video_global has clips",
    ),
    "whole numbers": (
        lambda v, m: replace(v, video_locals=[v.short() for v in v.video_locals]),
        r"video_locals\[0\] is of torch\.int16",
    ),
    "a sound of bytes": (
        lambda v, m: replace(v, audio_global=v.audio_global.byte()),
        r"audio_global is of torch\.uint8; numbers in",
    ),
    "masks of too few tokens": (lambda v, m: replace(m, video=m.video[:, 1:]), r"masks\.video has the shape .* is wanted"),
    "masks of too few clips": (lambda v, m: replace(m, audio=m.audio[:1]), r"masks\.audio has the shape \[1, .* \[4, "),
}


@pytest.mark.parametrize(("change", "message"), WRONG_BATCHES.values(), ids=WRONG_BATCHES)
def test_views_and_masks_of_another_size_are_refused(change, message) -> None:
    """Red if a clip that is too small wraps around and gives a loss all the same, or missing views go unnoticed."""
    views, masks = random_batch(tiny_options(), 4)
    changed = change(views, masks)
    views, masks = (changed, masks) if isinstance(changed, Views) else (views, changed)
    with pytest.raises(ValueError, match=message):
        build_model(tiny_options(), seed=0).double()(views, masks)


def test_a_copy_casts_its_own_weights() -> None:
    """Red if a copied model goes on with casts of weights that it had before others were loaded."""
    options, first = tiny_options(), build_model(tiny_options(), seed=1)
    batch, other = random_batch(options, 2, dtype=torch.float32), copy.deepcopy(build_model(options, seed=0))

    def total(model: torch.nn.Module) -> float:
        with torch.autocast("cpu", torch.bfloat16):
            return model(*batch).total.item()

    other.load_state_dict(build_model(options, seed=2).state_dict())  # once, as its copies below
    expected, before = total(first), total(other)
    for model in (copy.deepcopy(other), pickle.loads(pickle.dumps(other))):
        model.load_state_dict(first.state_dict())
        assert total(model) == expected != before


def test_every_weight_counts() -> None:
    """Red if an objective's weight is ignored by the fast model."""
    for weights in ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)):
        options = tiny_options(objective=ObjectiveOptions(*weights))
        losses = build_model(options, seed=0).double()(*random_batch(options, 2))
        parts = (losses.reconstruction, losses.distillation, losses.alignment)
        expected = sum(weight * part for weight, part in zip(weights, parts, strict=True))
        assert losses.total.item() == pytest.approx(expected.item())
