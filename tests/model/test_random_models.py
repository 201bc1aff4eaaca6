"""Models of random shape: the fast one computes the reference's losses and every gradient."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.model.test_fast_model import both
from tests.tiny import random_batch, tiny_options
from xkd_fast.model.options import AudioOptions, DecoderOptions, EncoderOptions, ModelOptions, VideoOptions, kept_tokens


def mask_ratios(tokens: int) -> st.SearchStrategy[float]:
    """Ratios that leave a token visible and hide one."""
    return st.floats(0.1, 0.95).filter(lambda ratio: 0 < kept_tokens(tokens, ratio) < tokens)


@st.composite
def videos(draw: st.DrawFn, min_views: int) -> VideoOptions:
    """Sizes of video views; a local view may be as large as the clip."""
    time, side = draw(st.integers(1, 4)), draw(st.integers(2, 4))
    local_time, local_side = draw(st.integers(1, time)), draw(st.integers(1, side))
    frames, patch = draw(st.sampled_from((1, 2))), draw(st.sampled_from((2, 4)))
    return VideoOptions(
        frames=time * frames,
        size=side * patch,
        local_views=draw(st.integers(min_views, 3)),
        local_frames=local_time * frames,
        local_size=local_side * patch,
        patch_frames=frames,
        patch_size=patch,
        mask_ratio=draw(mask_ratios(time * side * side)),
    )


@st.composite
def audios(draw: st.DrawFn, min_views: int) -> AudioOptions:
    """Sizes of audio views."""
    high, long = draw(st.integers(1, 4)), draw(st.integers(2, 8))
    return AudioOptions(
        mel_bins=high * 2,
        frames=long * 4,
        local_views=draw(st.integers(min_views, 3)),
        local_frames=draw(st.integers(1, long)) * 4,
        patch_bins=2,
        patch_frames=4,
        mask_ratio=draw(mask_ratios(high * long)),
    )


@st.composite
def models(draw: st.DrawFn) -> ModelOptions:
    """Options of small models."""
    teacher_view = draw(st.sampled_from(("global", "local")))
    min_views = int(teacher_view == "local")
    return tiny_options(
        variant=draw(st.sampled_from(("xkd", "mas", "mats"))),
        teacher_view=teacher_view,
        refinement=draw(st.sampled_from(("mean", "softmax"))),
        cls_token=draw(st.booleans()),
        attention=draw(st.sampled_from(("auto", "recompute", "eager"))),
        checkpointing=draw(st.booleans()),
        mlp_ratio=draw(st.sampled_from((1.0, 4.0))),
        video=draw(videos(min_views)),
        audio=draw(audios(min_views)),
        encoder=EncoderOptions(*draw(st.sampled_from(((12, 1, 3), (16, 3, 2), (8, 2, 1))))),
        decoder=DecoderOptions(*draw(st.sampled_from(((12, 1, 3), (16, 2, 2))))),
    )


@settings(max_examples=60, deadline=None)
@given(options=models(), clips=st.integers(1, 5), seed=st.integers(0, 1000))
def test_random_models_agree(options: ModelOptions, clips: int, seed: int) -> None:
    """Red if any shape of model, from one patch to clips as large as their local views, takes another way to another number."""
    plain, fast = both(options, torch.float64)
    views, masks = random_batch(options, clips, seed)
    expected, got = plain(views, masks), fast(views, masks)
    expected.total.backward()
    got.total.backward()
    for term, value in expected.terms().items():
        assert abs(got.terms()[term].item() - value.item()) <= 1e-8 * max(1.0, abs(value.item())), term
    gradients = dict(plain.named_parameters())
    for name, parameter in fast.named_parameters():
        other = gradients[name].grad
        assert (parameter.grad is None) == (other is None), name
        if other is not None:
            assert (parameter.grad - other).abs().max() <= 1e-8 * other.abs().max().clamp_min(1e-6), name
