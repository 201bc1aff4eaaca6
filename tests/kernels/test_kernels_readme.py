"""The README's example runs as it is printed, and its figures are those of the code."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import xkd_kernels
from benchmarks import roofline


def test_example_runs():
    """Catches an example that the operators have left behind, or an operator without one."""
    text = (Path(__file__).parents[2] / "kernels" / "README.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    names: dict = {}
    exec(example, names)
    results = ("mixed", "looks", "total", "normalised", "activated", "patches", "error", "pooled", "weights")
    shapes = {name: tuple(names[name].shape) for name in results}
    assert shapes == {
        "mixed": (532, 768),
        "looks": (12, 532),
        "total": (532, 768),
        "normalised": (532, 768),
        "activated": (532, 3072),
        "patches": (2, 59, 3072),
        "error": (),
        "pooled": (4, 768),
        "weights": (4, 59),
    }
    named = {name.removeprefix("naive_") for name in xkd_kernels.__all__ if name.startswith("naive_")}
    operators = {name if name in xkd_kernels.__all__ else f"{name}_" for name in named}  # those that write in place
    assert all(f"X.{name}(" in example and f"`{name}`" in text for name in operators)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the floors are counted as where there is no GPU")
def test_shares_are_those_of_the_present_step():
    """Catches a share that an operator had in an older step, or an operator of the step without its share."""
    text = roofline.README.read_text(encoding="utf-8")
    assert text == roofline.readme_with(text, roofline.readme_text()), "python -m benchmarks.roofline --readme"
    kinds, own = roofline.step_floors(roofline.CLIPS)
    attention = {"packed_attention", "cls_attention"}
    assert attention | {"residual_layer_norm", "bias_gelu", "gather_patches"} <= set(own) <= set(xkd_kernels.backends.OPERATORS)
    assert all(f"\n| `{name}` | " in text for name in own)
    assert sum(own.values()) < kinds["all"][1] < kinds["all"][0]
