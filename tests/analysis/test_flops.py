"""The formulas of a step's arithmetic against a count of what really runs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.tiny import random_batch, tiny_options
from xkd_fast.analysis.flops import PARTS, flop_counter, savings, step_flops, total
from xkd_fast.model.build import build_model
from xkd_fast.model.components import listening
from xkd_fast.model.options import AudioOptions, DecoderOptions, EncoderOptions, ModelOptions, VideoOptions

CLIPS = 2
CASES = {
    "xkd": {},
    "mats without cls": {"variant": "mats", "cls_token": False},
    "local teacher, softmax": {"teacher_view": "local", "refinement": "softmax"},
    "no local views": {"video": VideoOptions(8, 24, 0, 4, 16, 2, 8, mask_ratio=0.7)},
    "decoder of the encoder's width": {"decoder": DecoderOptions(24, 2, 2)},
    "eager": {"attention": "eager"},
    "recompute": {"attention": "recompute"},
}


class Count:
    """Forward FLOPs by part."""

    def __init__(self, counter) -> None:
        self.counter, self.before, self.parts = counter, 0, dict.fromkeys(PARTS, 0)

    def enter(self, name: str) -> None:
        self.before = self.counter.get_total_flops()

    def leave(self, name: str) -> None:
        if name in self.parts:
            self.parts[name] += self.counter.get_total_flops() - self.before


@pytest.mark.parametrize("case", CASES)
def test_fast(case: str) -> None:
    """Red if a formula misses a layer, a token, a view or a pass of the fast model, in any part."""
    options = tiny_options(**CASES[case])
    views, masks = random_batch(options, CLIPS, dtype=torch.float32)
    model = build_model(options, seed=0)
    with flop_counter() as counter:
        count = Count(counter)
        with listening(count):
            losses = model(views, masks)
        forward = counter.get_total_flops()
        losses.total.backward()
    expected = step_flops(options)
    assert {part: flops // CLIPS for part, flops in count.parts.items()} == {part: expected[part].forward for part in PARTS}
    assert forward == CLIPS * total(expected).forward
    assert counter.get_total_flops() == CLIPS * total(expected).total


@pytest.mark.parametrize("case", [name for name in CASES if name not in ("eager", "recompute")])
def test_reference(case: str) -> None:
    """Red if the formulas of the reference, against which savings are told, are off."""
    options = replace(tiny_options(**CASES[case]), implementation="reference")
    views, masks = random_batch(options, CLIPS, dtype=torch.float32)
    with flop_counter() as counter:
        build_model(options, seed=0)(views, masks).total.backward()
    assert counter.get_total_flops() == CLIPS * total(step_flops(options)).total


def test_the_base_models() -> None:
    """Red if the base model's arithmetic is not what the method's description says, or the fast model's is not less."""
    outer_products = 2 * 12 * 2 * 392 * 560  # which the description counts as matrix products
    plain = total(step_flops(ModelOptions(implementation="reference"))).total
    assert (plain + outer_products) / 1e9 == pytest.approx(440.16, abs=0.005)
    assert total(step_flops(ModelOptions())).total < plain


@pytest.mark.parametrize("case", [name for name in CASES if name != "eager"])
def test_savings_are_the_difference(case: str) -> None:
    """Red if the list of what is saved leaves something out, or counts it twice."""
    options = tiny_options(**CASES[case])
    plain, fast = (total(step_flops(replace(options, implementation=name))).total for name in ("reference", "fast"))
    saved = savings(options)
    assert sum(saved.values()) == plain - fast
    assert [amount > 0 for amount in saved.values()] == [True, True, False, False]


def test_a_model_of_other_sizes_counts_otherwise() -> None:
    """Red if a size is ignored."""
    base = ModelOptions()
    sizes = [
        replace(base, encoder=EncoderOptions(768, 11, 12)),
        replace(base, decoder=DecoderOptions(384, 3, 12)),
        replace(base, mlp_ratio=3.0),
        replace(base, audio=AudioOptions(mask_ratio=0.7)),
        replace(base, video=VideoOptions(local_views=2)),
    ]
    counts = [total(step_flops(options)).total for options in (base, *sizes)]
    assert len(set(counts)) == len(counts)
