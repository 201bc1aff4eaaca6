"""Before the first step teachers in FP8 are compared with themselves in bfloat16: once, told, and ending the run if need be."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from tests.tiny import random_batch, tiny_options
from xkd_fast.config import load_config
from xkd_fast.engine.engine import Engine
from xkd_fast.errors import UserError
from xkd_fast.model import fp8
from xkd_fast.model.build import build_model
from xkd_fast.model.options import EncoderOptions
from xkd_fast.train import checked
from xkd_kernels import fp8_linear


def test_the_engine_tells_how_far_apart_they_are_or_ends_the_run(single_rank: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Red if the comparison is of float32 with itself, is not told, or lets broken teachers train."""
    model = build_model(tiny_options(encoder=EncoderOptions(32, 2, 4), teacher_precision="fp8"), seed=0)
    engine = SimpleNamespace(module=model, device=torch.device("cpu"))
    views, _ = random_batch(model.options, 4, dtype=torch.float32)
    told = Engine.check_teachers(engine, views)  # type: ignore[arg-type]
    assert told.startswith("FP8 teachers beside themselves in bfloat16: video weights_mean 0.0") and "audio" in told
    monkeypatch.setattr(fp8, "fp8_linear", lambda q, s, w, t, *more: fp8_linear(q, s, w, 2 * t, *more))
    with pytest.raises(UserError, match="too far apart to teach the same") as caught:
        Engine.check_teachers(engine, views)  # type: ignore[arg-type]
    assert not caught.value.is_told


def test_only_the_first_batch_is_checked() -> None:
    """Red if a batch is lost, taken twice or checked again."""
    batches = [(f"views {i}", i) for i in range(3)]
    seen, said = [], []
    engine = SimpleNamespace(check_teachers=lambda views: seen.append(views) or "near enough")
    found = checked(iter(batches), engine, SimpleNamespace(say=said.append))  # type: ignore[arg-type]
    assert next(found) == batches[0] and said == ["near enough"]
    assert list(found) == batches[1:]
    assert seen == ["views 0"] and said == ["near enough"]


def test_it_needs_bfloat16() -> None:
    """Red if products in bfloat16 are given to a run in float32 or float16."""
    with pytest.raises(UserError, match=r"teacher_precision = fp8 needs train\.precision = bfloat16.* it is float32"):
        load_config("demo", ["model.teacher_precision=fp8"])
    load_config("demo", ["model.teacher_precision=fp8", "train.precision=bfloat16"])
