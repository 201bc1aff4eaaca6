"""A step taken apart: the parts are all there and add up."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._inductor import cpp_builder
from torch._inductor.exc import InvalidCxxCompiler
from torch.utils._python_dispatch import TorchDispatchMode

from xkd_fast import cli
from xkd_fast.analysis import profile as profiling
from xkd_fast.analysis.profile import Profile, profile, tokens_of_parts
from xkd_fast.config import Config, load_config
from xkd_fast.errors import UserError
from xkd_fast.model import switches, vit
from xkd_fast.model.options import ModelOptions

CONFIG = load_config("demo", ["model.encoder={width: 24, depth: 2, heads: 2}", "model.decoder={width: 16, depth: 1, heads: 2}"])
FORWARD = ("teachers", "students", "decoders", "heads", "objectives")


@pytest.fixture(scope="module")
def result() -> Profile:
    return profile(CONFIG, clips=2, steps=3, say=lambda text: None)


def test_parts_are_named_and_their_arithmetic_adds_up(result: Profile) -> None:
    """Red if a part is missing, counted twice, or blamed for another's arithmetic."""
    parts = {part.name: part for part in result.parts}
    assert tuple(parts) == (*FORWARD, "backward", "clip and AdamW", "teacher update")
    assert all(part.seconds > 0 for part in result.parts)
    trained = sum(parts[name].forward_flops for name in ("students", "decoders", "heads"))
    once = trained + parts["teachers"].forward_flops
    assert once < result.flops < once + 2.2 * trained  # a backward pass is twice the forward one, but for the first layers
    assert result.utilisation == pytest.approx(result.flops / result.seconds / result.peak_flops_per_second)
    assert 0 < result.trainable < result.parameters


def test_teachers_keep_nothing(result: Profile) -> None:
    """Red if a graph is kept for what is never differentiated, or kept memory is blamed on the wrong part."""
    kept = {part.name: part.saved_bytes for part in result.parts}
    assert kept["teachers"] == 0
    assert min(kept[name] for name in ("students", "decoders", "heads", "objectives")) > 0


def test_tokens_of_the_base_model() -> None:
    """Red if CLS, local views or masking are forgotten: XKD.md section 2 gives the counts."""
    tokens = tokens_of_parts(ModelOptions())
    assert tokens == {
        "teachers": 393 + 561,
        "students": 60 + 73 + 113 + 141,
        "decoders": 393 + 561,
        "heads": 4,
    }


def test_command_writes_figures_and_a_trace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Red if the trace lacks the parts' ranges, or JSON and table disagree with the run."""
    small = ["model.encoder={width: 24, depth: 1, heads: 2}", "model.decoder={width: 16, depth: 1, heads: 2}"]
    files = ["--json", str(tmp_path / "step.json"), "--trace", str(tmp_path / "trace.json")]
    assert cli.main(["profile", "--clips", "2", "--steps", "2", *files, *small]) == 0
    assert "2 clips in" in capsys.readouterr().out
    assert json.loads((tmp_path / "step.json").read_text())["clips"] == 2
    names = {event.get("name") for event in json.loads((tmp_path / "trace.json").read_text())["traceEvents"]}
    assert {f"xkd::{name}" for name in (*FORWARD, "backward", "clip and AdamW", "teacher update")} <= names


@pytest.mark.parametrize(("arguments", "sentence"), [({"clips": 0}, "--clips 0"), ({"steps": 0}, "--steps 0")])
def test_wrong_counts_are_named(arguments: dict[str, int], sentence: str) -> None:
    """Red if a wrong count ends in a traceback."""
    with pytest.raises(UserError, match=sentence):
        profile(CONFIG, **({"clips": 2, "steps": 1} | arguments), say=lambda text: None)


def small(**options: object) -> Config:
    """The demo's configuration with a model that takes no time."""
    sizes = ["model.encoder={width: 24, depth: 2, heads: 2}", "model.decoder={width: 16, depth: 1, heads: 2}"]
    return load_config("demo", [*sizes, *(f"{key.replace('__', '.')}={value}" for key, value in options.items())])


def test_the_references_forward_pass_is_a_part() -> None:
    """Red if shares are of a whole without the forward pass, which the reference does not take apart."""
    plain = profile(small(model__implementation="reference"), clips=2, steps=1, say=lambda text: None)
    parts = {part.name: part for part in plain.parts}
    assert tuple(parts) == ("forward", "backward", "clip and AdamW", "teacher update")
    assert 0 < parts["forward"].forward_flops < plain.flops


def test_computing_again_is_no_work_of_the_models() -> None:
    """Red if checkpointing, which computes every block twice, looks like a better use of the machine."""
    usual, again = (
        profile(small(model__checkpointing=on), clips=2, steps=1, say=lambda text: None) for on in ("false", "true")
    )
    assert usual.flops == again.flops


def test_compiled_blocks_can_be_taken_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Red if counting meets a compiled block, which no counter sees into, and the profile ends in its traceback."""
    monkeypatch.setattr(vit, "BACKEND", "aot_eager")
    compiled = profile(small(model__compile="true"), clips=2, steps=1, say=lambda text: None)
    assert next(part for part in compiled.parts if part.name == "students").forward_flops > 0


def test_what_cannot_be_done_here_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Red if a traceback, or a profile without the file that was asked for, is all the user gets."""
    assert cli.main(["profile", "--trace", str(tmp_path)]) == 2
    assert cli.main(["profile", "--trace", ""]) == 2
    os.mkfifo(tmp_path / "pipe")
    assert cli.main(["profile", "--json", str(tmp_path / "pipe")]) == 2 and (tmp_path / "pipe").is_fifo()
    (tmp_path / "pipe").unlink()
    with pytest.raises(UserError, match=r"--clips 1000000000 do not fit into the CPU's memory; name fewer"):
        profile(small(train__device="cpu"), clips=10**9, steps=1, say=lambda text: None)
    assert cli.main(["profile", "--trace", f"{tmp_path}/x.json", "--json", f"{tmp_path}/../{tmp_path.name}/x.json"]) == 2
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="--nvtx marks ranges for Nsight Systems, which needs a GPU"):
            profile(small(), clips=2, steps=1, nvtx=True, say=lambda text: None)
    monkeypatch.setattr(torch.profiler.profile, "export_chrome_trace", lambda self, path: None)  # fails without a word
    with pytest.raises(UserError, match=r"trace\.json cannot be written"):
        profile(small(), clips=2, steps=1, trace=tmp_path / "trace.json", say=lambda text: None)
    assert list(tmp_path.iterdir()) == []


def test_compiling_needs_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Red if a machine without a compiler answers model.compile=true with the compiler stack's traceback."""

    def none_found() -> str:
        raise InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", none_found)
    with pytest.raises(UserError, match=r"model\.compile = true needs a C\+\+ compiler.*set model\.compile=false"):
        profile(small(model__compile="true"), clips=2, steps=1, say=lambda text: None)


def test_the_peak_is_of_the_type_that_products_are_computed_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Red if numbers are multiplied in a type that the model avoids here, which costs a run half a minute at its start."""
    device, met = torch.device("cpu"), []
    monkeypatch.setattr(profiling, "multiplied_in", lambda dtype, where: met.append((dtype, where)) or torch.float64)

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.ops.aten.mm.default:
                met.append(args[0].dtype)
            return func(*args, **(kwargs or {}))

    with Products():
        assert profiling.measured_peak(device, torch.bfloat16, 64) > 0
        assert met == [(torch.bfloat16, device), *[torch.float64] * 6]
        monkeypatch.setattr(profiling, "PEAK_SECONDS", 0)
        profiling.measured_peak(device, torch.bfloat16, 64)
    assert met[7:] == [(torch.bfloat16, device), torch.float64]


@pytest.mark.parametrize(("measured", "is_compiled"), [(["compile"], True), (["compile", "cuda_graph"], True), ([], False)])
def test_switches_are_those_of_a_run(measured: list[str], is_compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Red if a profile leaves `auto` off where a run turns a switch on, or says nothing of the one that it cannot have."""
    monkeypatch.setattr(vit, "BACKEND", "eager")
    table = {"cpu": {"float32": {"2": measured}}}
    monkeypatch.setattr(switches, "measured_steps", lambda: table)
    met: list[bool] = []
    monkeypatch.setattr(vit.BlockRunner, "blocks", _noting(vit.BlockRunner.blocks, met, lambda runner: runner._compiled))
    told: list[str] = []
    profile(small(train__device="cpu"), clips=2, steps=1, say=told.append)
    assert set(met) == {is_compiled}
    assert (profiling.HIDES_PARTS in told) == ("cuda_graph" in measured) and not any("cuda_graph: on" in line for line in told)
    assert any(line.startswith("compile: on" if is_compiled else "compile: off") for line in told)


def _noting(method: Any, met: list[Any], what: Any) -> Any:
    """A method that notes ``what`` its object is at every call."""

    def noting(self: Any, *args: Any) -> Any:
        met.append(what(self))
        return method(self, *args)

    return noting


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_whole_step_is_taken_as_configured(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Red if what is timed runs in another precision, clips otherwise, leaves teachers and centres, or meets another peak."""
    config = small(train__precision=precision, train__device="cpu", optimizer__clip_norm=0.125)
    met: list[object] = []
    follow = profiling.LocalUpdate.follow
    monkeypatch.setattr(
        vit.BlockRunner, "blocks", _noting(vit.BlockRunner.blocks, met, lambda runner: torch.is_autocast_enabled("cpu"))
    )
    monkeypatch.setattr(profiling, "measured_peak", lambda device, dtype, size: met.append(dtype) or 1.0)
    monkeypatch.setattr(profiling.LocalUpdate, "follow", lambda self, means: met.append("follows") or follow(self, means))
    steps: list[profiling.Step] = []
    monkeypatch.setattr(profiling.Step, "forward", _noting(profiling.Step.forward, steps, lambda step: step))
    profile(config, clips=2, steps=1, say=lambda text: None)
    assert set(met) == {precision == "bfloat16", "follows", getattr(torch, precision)}
    assert steps[0].local.optimizer.clip_norm == 0.125 and steps[0].model.video_centre.abs().max() > 0
