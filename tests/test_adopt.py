"""What `auto` takes follows the committed measurements."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import adopt, record, tuning
from xkd_fast.model import switches
from xkd_kernels import backends, configurations
from xkd_kernels.configurations import Launch

DEFAULT, FASTER, SLOWER = ({"meta": {"ROWS": rows}, "warps": 4, "stages": 2} for rows in (8, 16, 32))


def row(shape: str, **seconds: tuple[float, ...]) -> dict[str, Any]:
    """A measured case: seconds of the passes, by contestant."""
    ways = ("forward", "backward")[: len(next(iter(seconds.values())))]
    passes = {way: {name: {"median": times[i]} for name, times in seconds.items()} for i, way in enumerate(ways)}
    return {"operator": "bias_gelu", "dtype": "bfloat16", "shape": shape, "seconds": passes, "launches": []}


def test_the_committed_tables_are_those_of_the_committed_results() -> None:
    """Red if a measurement is committed without `python -m benchmarks.adopt`, or a table is written by hand."""
    for path, table in adopt.tables(Path(record.__file__).parent / "results").items():
        assert path.read_text() == adopt.text(table)


def test_triton_wins_where_both_passes_together_are_the_fastest(tmp_path: Path) -> None:
    """Red if one pass or case decides alone, a rival is forgotten or missing in one, or devices are mixed up."""
    one = [
        row("768", fused=(2.0, 1.0), torch=(1.0, 3.0), flash=(2.0, 2.0)),
        row("384", fused=(1.0, 3.0), torch=(2.0, 3.0), compiled=(2.0, 1.0)),
        row("192", fused=(1.0,), torch=(0.9,)),
        row("96", fused=(1.0, 1.0), torch=(1.0, 2.0)),
        row("96", fused=(3.0, 1.0), torch=(1.0, 1.9)),
        row("96", fused=(1.0,), torch=(1.2,), flash=(0.1,)),
    ]
    other = [row("768", fused=(2.0, 2.0), torch=(1.0, 1.0))]
    for name, rows in (("kernels_one", one), ("kernels_other", other), ("step", [])):
        (tmp_path / f"{name}.json").write_text(json.dumps({"gpu": name, "rows": rows}))
    found = adopt.tables(tmp_path)[adopt.MEASURED]
    chosen = {"768": "triton", "384": "torch", "192": "torch", "96": "triton"}
    assert found == {
        "kernels_one": {"bias_gelu": {"bfloat16": chosen}},
        "kernels_other": {"bias_gelu": {"bfloat16": {"768": "torch"}}},
    }


@pytest.mark.parametrize(("seconds", "adopted"), [((1.0, 0.5, 2.0), True), ((1.0, 0.99, 2.0), False)])
def test_a_launch_is_taken_up_where_it_is_faster_than_noise(seconds: tuple[float, ...], adopted: bool) -> None:
    """Red if the default is replaced by nothing better, or the table is not what launches are made from."""
    tried = [{**launch, "seconds": time} for launch, time in zip((DEFAULT, FASTER, SLOWER), seconds, strict=True)]
    launched = {"kernel": "bias_gelu_forward", "dtype": "bfloat16", "shape": "3072", "tried": tried}
    found = adopt.launches([{"gpu": "H", "rows": [{"launches": [launched]}]}])
    assert found == ({"H": {"bias_gelu_forward": {"bfloat16": {"3072": FASTER}}}} if adopted else {})
    if adopted:
        assert Launch(**found["H"]["bias_gelu_forward"]["bfloat16"]["3072"]) == Launch({"ROWS": 16}, warps=4, stages=2)


def test_cases_that_share_a_launch_decide_together() -> None:
    """Red if the last one decides, or a launch that was not tried in all of them wins."""
    slow, quick = {**FASTER, "seconds": 1.2}, {**FASTER, "seconds": 0.5}

    def case(*tried: dict[str, Any]) -> dict[str, Any]:
        default = {**DEFAULT, "seconds": 1.0}
        return {"kernel": "bias_gelu_forward", "dtype": "bfloat16", "shape": "3072", "tried": [default, *tried]}

    def found(*cases: dict[str, Any]) -> dict[str, Any]:
        return adopt.launches([{"gpu": "H", "rows": [{"launches": [case]} for case in cases]}])

    taken = {"H": {"bias_gelu_forward": {"bfloat16": {"3072": FASTER}}}}
    assert found(case(quick), case(slow)) == found(case(slow), case(quick)) == taken
    assert found(case(slow), case(slow), case(quick)) == taken
    assert found(case(quick), case({**FASTER, "seconds": 1.6})) == {}
    assert found(case(quick), case({**SLOWER, "seconds": 0.1})) == {}


def test_the_search_goes_from_the_default_to_the_fastest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Red if what is slower is kept, one thing is never tried, or a late search loses what it has."""
    start = Launch({"ROWS": 8, "COLUMNS": 64}, warps=4, stages=2)
    monkeypatch.setattr(tuning, "default_launch", lambda *key: start)
    key: tuning.Key = ("a_kernel", tuning.torch.bfloat16, "64")

    def seconds(launch: Launch) -> float:
        off = abs(launch.warps - 8) + abs(launch.stages - 3) + abs(launch.meta["ROWS"] - 16) + abs(launch.meta["COLUMNS"] - 32)
        return 1.0 + off

    best, tried = tuning.tuned(key, seconds, lambda: False)
    assert best == Launch({"ROWS": 16, "COLUMNS": 32}, warps=8, stages=3)
    assert tried[0]["seconds"] == seconds(start) and len(tried) == 1 + 3 + 3 + 2 + 2
    assert tuning.tuned(key, seconds, lambda: True) == (start, tried[:1])
    assert tuning.tuned(key, lambda launch: float("inf"), lambda: False)[0] == start
    widths = [
        launch.meta["K_BLOCK"]
        for step in tuning.neighbours("packed_attention_forward", Launch({"K_BLOCK": 16}))
        for launch in step
    ]
    assert min(widths) == 16


def test_chosen_launches_hold_for_their_time_only() -> None:
    """Red if a trial launch outlives its trial, or another kernel's is taken."""
    key, other = (("bias_gelu_forward", tuning.torch.bfloat16, width) for width in ("3072", "1536"))
    chosen, asked = Launch({"ROWS": 1, "COLUMNS": 128}), set()
    with tuning.launches({key: chosen}, asked):
        assert configurations._launch(key[0], None, *key[1:]) == chosen
        assert configurations._launch(other[0], None, *other[1:]) == configurations.default_launch(*other)
    assert asked == {key, other}
    assert configurations._launch(key[0], None, *key[1:]) == configurations.default_launch(*key)


@pytest.mark.parametrize(
    ("backend", "ratios", "winner"),
    [("native", (1.8, 1.1), "native"), ("native", (3.0, 0.9), "torch"), ("torch", (2, 2), "torch")],
)
def test_the_compiled_optimiser_is_the_default_where_it_beats_every_rival(
    backend: str, ratios: tuple[float, float], winner: str, tmp_path: Path
) -> None:
    """Red if one rival is enough, another backend's win counts, or kernels of the same GPU are forgotten."""
    rivals = {str(number): {"ratio": {"median": ratio}} for number, ratio in enumerate(ratios)}
    (tmp_path / "optimizer_cuda.json").write_text(json.dumps({"gpu": "H", "backend": backend, "rivals": rivals}))
    (tmp_path / "kernels_cuda.json").write_text(json.dumps({"gpu": "H", "rows": [row("3072", fused=(1.0,), naive=(2.0,))]}))
    table = adopt.tables(tmp_path)[backends.MEASURED]
    assert table == {"H": {"bias_gelu": {"bfloat16": {"3072": "triton"}}, "adamw_ema": {"float32": {"": winner}}}}


def test_the_switches_of_the_fastest_step_are_the_default(tmp_path: Path) -> None:
    """Red if a rival's model counts, a gain within noise is taken, or batch sizes, variants or devices mix."""

    def row(clips: int, **seconds: float) -> dict[str, Any]:
        names = {"reference": "reference", "graph": "fast + cuda_graph", "both": "fast + teacher_stream + cuda_graph"}
        return {"clips": clips, "fast_against": {names[name]: {"median": time} for name, time in seconds.items()}}

    rows = [row(32, reference=0.5, graph=0.8, both=0.7), row(128, reference=3.0, graph=0.99, both=1.1), row(64)]
    result = {"gpu": "H", "precision": "bfloat16", "rows": rows}
    (tmp_path / "step_cuda_xkd_bfloat16.json").write_text(json.dumps(result))
    (tmp_path / "step_cuda_mas_bfloat16.json").write_text(json.dumps({**result, "gpu": "other"}))
    table = adopt.tables(tmp_path)[switches.MEASURED]
    assert table == {"H": {"bfloat16": {"32": ["teacher_stream", "cuda_graph"], "128": [], "64": []}}}
