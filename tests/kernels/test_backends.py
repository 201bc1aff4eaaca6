"""The choice of a backend: never silent, the same for the same question, from the committed measurements."""

from __future__ import annotations

import logging
import os
import subprocess
import sys

import pytest
import torch
import triton

import xkd_kernels
from xkd_kernels import BackendError, backends, bias_gelu, choose, packed_attention, residual_layer_norm

CPU, GPU = torch.device("cpu"), torch.device("cuda")
WHERE = GPU if torch.cuda.is_available() else CPU  # kernels run here, compiled or interpreted


@pytest.fixture
def measured(monkeypatch):
    """A GPU on which one shape has been measured."""
    kinds = {"3072": "triton", "1536": "torch", "192": "compiled", "96": "xformers"}
    table = {"H": {"bias_gelu": {"bfloat16": kinds}}}
    monkeypatch.setattr(backends, "measured", lambda: table)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "H")
    choose.cache_clear()
    backends._tell_once.cache_clear()
    yield
    choose.cache_clear()
    backends._tell_once.cache_clear()


@pytest.mark.parametrize(
    ("shape", "dtype", "backend", "reason"),
    [
        ("3072", torch.bfloat16, "triton", "measured to be the fastest on H"),
        ("1536", torch.bfloat16, "torch", "measured to be the fastest"),
        ("192", torch.bfloat16, "torch", "torch.compile of its twin was measured to be faster than the kernel on H"),
        ("96", torch.bfloat16, "torch", "xformers was measured to be faster than the kernel on H"),
        ("768", torch.bfloat16, "torch", "has not timed it against its rivals on H"),
        ("3072", torch.float32, "torch", "has not timed it against its rivals on H at this shape"),
        ("3072", torch.float64, "torch", "not in float64"),
    ],
)
def test_auto_follows_the_measurements(measured, shape, dtype, backend, reason):
    """Catches a default without a measurement behind it, one that ignores it, and a reason that is not true."""
    choice = choose("bias_gelu", GPU, dtype, shape)
    assert choice.backend == backend and reason in choice.reason


def test_auto_tells_what_it_takes_on_a_gpu(measured, caplog):
    """Catches a choice without a word, the same word again and again, and words where someone chose."""
    caplog.set_level(logging.WARNING, "xkd_kernels")
    for shape in ("3072", "768", "384", "3072", "192"):
        choose("bias_gelu", GPU, torch.bfloat16, shape)
    choose("bias_gelu", CPU, torch.float32, "3072")
    choose("bias_gelu", GPU, torch.bfloat16, "3072", "triton")
    choose("bias_gelu", GPU, torch.float64, "3072")
    assert [record.getMessage() for record in caplog.records if record.name == "xkd_kernels"] == [
        "bias_gelu on H: triton, measured to be the fastest on H",
        "bias_gelu on H: torch, test_kernels.py has not timed it against its rivals on H at this shape",
        "bias_gelu on H: torch, torch.compile of its twin was measured to be faster than the kernel on H",
        "bias_gelu on H: torch, its kernels compute in float32, bfloat16 and float16, not in float64",
    ]


def test_auto_on_a_cpu_is_torch():
    """Catches the interpreter taken for a fast path."""
    assert choose("bias_gelu", CPU, torch.float32, "3072").backend == "torch"


@pytest.mark.parametrize("operator", ["packed_attention", "cls_attention"])
def test_heads_that_are_too_wide_are_pytorchs(measured, monkeypatch, operator):
    """Catches a kernel launched at a width that nobody compiled, and one refused where it runs."""
    monkeypatch.setattr(backends, "measured", lambda: {"H": {operator: {"float32": {"16x256": "triton", "16x128": "triton"}}}})
    assert all(choose(operator, GPU, torch.float32, "16x128", asked).backend == "triton" for asked in ("auto", "triton"))
    choice = choose(operator, GPU, torch.float32, "16x256")
    assert choice.backend == "torch" and "heads of up to 128 numbers, not of 256" in choice.reason
    with pytest.raises(BackendError, match="heads of up to 128 numbers, not of 256; torch can"):
        getattr(xkd_kernels, operator)(torch.zeros(4, 3, 1, 256, device=WHERE), [(1, 4)], backend="triton")
    assert getattr(xkd_kernels, operator)(torch.zeros(4, 3, 1, 256, device=WHERE), [(1, 4)]).isfinite().all()


def test_float64_beside_float32_is_not_computed_in_float32():
    """Catches a kernel that rounds a float64 branch, weight or bias without a word."""
    x, weight, bias = (torch.ones(2, 8, device=CPU), *torch.ones(2, 8, device=CPU).unbind())
    for place in (1, 2, 3):
        tensors = [each.double() if i == place else each for i, each in enumerate((x, x, weight, bias))]
        with pytest.raises(BackendError, match="not in float64; torch can"):
            residual_layer_norm(*tensors, backend="triton")
        assert all(each.dtype == torch.float32 for each in residual_layer_norm(*tensors))
    with pytest.raises(BackendError, match="not in float64; torch can"):
        bias_gelu(x, bias.double(), backend="triton")
    assert bias_gelu(x, bias.double()).dtype == torch.float32


def test_an_explicit_choice_that_cannot_run_says_why(monkeypatch):
    """Catches a silent fallback."""
    choose.cache_clear()
    with pytest.raises(BackendError, match=r"triton of packed_attention cannot run here.*not in float64; torch can"):
        packed_attention(torch.zeros(4, 3, 1, 16, dtype=torch.float64, device=CPU), [(1, 4)], backend="triton")
    with pytest.raises(BackendError, match=r"backend .cuda. of packed_attention is not one of auto, triton, torch"):
        packed_attention(torch.zeros(4, 3, 1, 16, device=CPU), [(1, 4)], backend="cuda")
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    with pytest.raises(BackendError, match="set TRITON_INTERPRET=1 before xkd_kernels is imported; torch can"):
        choose("packed_attention", CPU, torch.float32, "16x16", "triton")
    choose.cache_clear()


def test_imports_alone():
    """Catches a dependency on the trainer or on anything beside torch and Triton."""
    blocked = ("xkd_fast", "deepspeed", "pydantic", "yaml", "nvidia.dali", "rich", "sklearn", "av", "safetensors", "psutil")
    blocked += ("numpy",)  # which Triton's interpreter alone needs
    code = (
        "import sys\n"
        f"for name in {blocked!r}: sys.modules[name] = None\n"
        "import torch, xkd_kernels as X\n"
        "print(X.packed_attention(torch.randn(6, 3, 2, 16), [(2, 3)]).shape)\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120)
    assert done.stdout == "torch.Size([6, 32])\n", done.stderr
