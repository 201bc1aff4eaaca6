"""What `auto` takes follows the committed measurements."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import adopt, record, test_kernels, timing, tuning
from benchmarks.kernel_cases import CASES, FURTHER, SMALL
from xkd_fast.model import switches
from xkd_kernels import backends, configurations
from xkd_kernels.configurations import Launch

DEFAULT, FASTER, SLOWER = ({"meta": {"ROWS": rows}, "warps": 4, "stages": 2} for rows in (8, 16, 32))


def row(shape: str, memory: dict[str, int] | None = None, **seconds: tuple[float, ...]) -> dict[str, Any]:
    """A measured case: seconds of the passes, and the memory of both, by contestant."""
    ways = ("forward", "backward")[: len(next(iter(seconds.values())))]
    passes = {way: {name: {"median": times[i]} for name, times in seconds.items()} for i, way in enumerate(ways)}
    case = {"operator": "bias_gelu", "dtype": "bfloat16", "shape": shape, "launches": []}
    return {**case, "seconds": passes, "most_allocated": memory or {}}


def test_the_committed_tables_are_those_of_the_committed_results() -> None:
    """Red if a measurement is committed without `python -m benchmarks.adopt`, or a table is written by hand."""
    for path, table in adopt.tables(Path(record.__file__).parent / "results").items():
        assert path.read_text() == adopt.text(table)


def test_triton_wins_where_both_passes_together_are_the_fastest(tmp_path: Path) -> None:
    """Red if one pass or case decides alone, a rival is forgotten, renamed or missing in one, or devices are mixed up."""
    one = [
        row("768", fused=(2.0, 1.0), torch=(1.0, 3.0), flash=(2.0, 2.0)),
        row("384", fused=(1.0, 3.0), torch=(2.0, 3.0), compiled=(2.0, 1.0)),
        row("192", fused=(1.0,), torch=(0.9,)),
        row("96", fused=(1.0, 1.0), torch=(1.0, 2.0)),
        row("96", fused=(3.0, 1.0), torch=(1.0, 2.1)),
        row("96", fused=(1.0,), torch=(1.2,), flash=(0.1,)),
    ]
    other = [row("768", fused=(2.0, 2.0), torch=(1.0, 1.0))]
    for name, rows in (("kernels_one", one), ("kernels_other", other), ("step", [])):
        (tmp_path / f"{name}.json").write_text(json.dumps({"gpu": name, "rows": rows}))
    found = adopt.tables(tmp_path)[adopt.MEASURED]
    chosen = {"768": "triton", "384": "compiled", "192": "torch", "96": "triton"}
    assert found == {
        "kernels_one": {"bias_gelu": {"bfloat16": chosen}},
        "kernels_other": {"bias_gelu": {"bfloat16": {"768": "torch"}}},
    }


@pytest.mark.parametrize(
    ("fused", "memory", "winner"),
    [
        (1.01, {"fused": 5, "compiled": 9, "torch": 1}, "triton"),
        (1.03, {"fused": 5, "compiled": 9, "torch": 9}, "compiled"),
        (1.01, {"fused": 9, "compiled": 9, "torch": 99}, "compiled"),
        (1.01, {}, "compiled"),
        (0.99, {"fused": 9, "compiled": 9}, "compiled"),
        (0.99, {"fused": 5, "compiled": 9}, "triton"),
        (0.97, {"fused": 9, "compiled": 5}, "triton"),
    ],
)
def test_noise_decides_nothing_and_memory_at_equal_time(fused: float, memory: dict[str, int], winner: str) -> None:
    """Red if memory decides where time differs, is compared with another than the fastest, or does not count at all."""
    rows = [row("768", memory, fused=(fused,), compiled=(1.0,), torch=(2.0,))]
    assert adopt.winners([{"gpu": "H", "rows": rows}]) == {"H": {"bias_gelu": {"bfloat16": {"768": winner}}}}


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


def test_what_was_tuned_before_is_launched_in_a_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    """Red if the committed launches are measured by nobody, or a search begins elsewhere than at the default."""
    key: tuning.Key = ("bias_gelu_forward", tuning.torch.bfloat16, "3072")
    monkeypatch.setattr(configurations, "tuned", lambda: {"H": {key[0]: {"bfloat16": {"3072": FASTER}}}})
    configurations._launch.cache_clear()
    with tuning.launches({}):
        assert configurations._launch(key[0], "H", *key[1:]) == Launch(**FASTER)
    with tuning.launches({}, by_default=True):
        assert configurations._launch(key[0], "H", *key[1:]) == configurations.default_launch(*key)
    configurations._launch.cache_clear()


def test_rows_of_another_run_stay() -> None:
    """Red if a run without a search, or one that is cut off, loses what an earlier one has found."""
    launch = {"kernel": "bias_gelu_forward", "dtype": "bfloat16", "shape": "3072", "tried": []}
    earlier = [{"case": "a", "launches": [launch], "clips": 1}, {"case": "b", "launches": [], "clips": 1}]
    again = test_kernels.merged(earlier, {"case": "a", "launches": [], "clips": 2})
    assert again == [{"case": "a", "launches": [launch], "clips": 2}, earlier[1]]
    found = {**launch, "shape": "768"}
    assert test_kernels.merged(again, {"case": "a", "launches": [found], "clips": 3})[0]["launches"] == [found]
    assert test_kernels.merged(again, {"case": "c", "launches": []}) == [*again, {"case": "c", "launches": []}]


def test_a_search_goes_on_where_the_last_one_ended() -> None:
    """Red if what is tuned comes first again, or sizes that the base model lacks are never measured, or without a search."""
    first, *rest = CASES
    order = test_kernels.in_order(True, [{"case": first.name, "launches": [{}]}, {"case": rest[0].name, "launches": []}])
    assert order == [*rest, *FURTHER, first, *SMALL]
    assert test_kernels.in_order(False, []) == [*CASES, *SMALL]
    assert test_kernels.in_order(True, []) == [*CASES, *FURTHER, *SMALL]


@pytest.mark.parametrize(("ready_after", "calls"), [(1, 1), (5, 3), (float("inf"), 4)])
def test_a_host_that_falls_behind_is_given_more_time(ready_after: float, calls: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Red if a time with the host's gaps in it is taken for the device's, or a call that waits is made for ever."""
    waited: list[int] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            pass

        def record(self) -> None:
            pass

        def query(self) -> bool:
            return waited[-1] < ready_after * timing.WAIT

        def elapsed_time(self, end: object) -> float:
            return 1.0

    monkeypatch.setattr(timing, "CACHE", 1)
    for name, stub in (("Event", Event), ("_sleep", waited.append), ("synchronize", lambda device: None)):
        monkeypatch.setattr(timing.torch.cuda, name, stub)
    time_once = timing._DeviceSeconds()
    assert time_once(print, timing.torch.device("cpu")) == 1e-3 and len(waited) == calls
    assert time_once(print, timing.torch.device("cpu")) == 1e-3 and len(waited) == calls + 1


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
    """Red if a rival's model counts, a gain within noise or of a run short of memory is taken, or sizes or devices mix."""

    def row(clips: int, **seconds: float) -> dict[str, Any]:
        names = {"reference": "reference", "graph": "fast + cuda_graph", "both": "fast + teacher_stream + cuda_graph"}
        against = {names[name]: {"median": time} for name, time in seconds.items()}
        return {"clips": clips, "fast_against": against, "allocation_retries": {"fast + cuda_graph": 2} if clips == 16 else {}}

    rows = [
        row(32, reference=0.5, graph=0.8, both=0.7),
        row(128, reference=3.0, graph=0.99, both=1.1),
        row(64),
        row(16, graph=0.5),
    ]
    result = {"gpu": "H", "precision": "bfloat16", "rows": rows}
    (tmp_path / "step_cuda_xkd_bfloat16.json").write_text(json.dumps(result))
    (tmp_path / "step_cuda_mas_bfloat16.json").write_text(json.dumps({**result, "gpu": "other"}))
    table = adopt.tables(tmp_path)[switches.MEASURED]
    assert table == {"H": {"bfloat16": {"32": ["teacher_stream", "cuda_graph"], "128": [], "64": [], "16": []}}}
