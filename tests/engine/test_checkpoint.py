"""Checkpoints that need no DeepSpeed: what is found, what is refused, random states."""

from __future__ import annotations

import json
import random
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist

from xkd_fast.config import load_config
from xkd_fast.engine.checkpoint import (
    Checkpoints,
    TrainState,
    check_same_options,
    flat_options,
    random_states,
    read_state,
    restore_random_states,
)
from xkd_fast.engine.launch import free_port
from xkd_fast.errors import UserError
from xkd_fast.weights import write_safetensors

STATE = TrainState(step=12, seed=0, samples=100, data_crc32=9, global_batch=8, world_size=2, zero_stage=1)


def make(directory: Path, step: int) -> Path:
    """A checkpoint's folder with its state."""
    path = directory / f"step-{step:08d}"
    path.mkdir(parents=True)
    (path / "state.json").write_text(json.dumps(asdict(replace(STATE, step=step))))
    return path


def test_auto_takes_the_newest_whole_checkpoint(tmp_path: Path) -> None:
    """Red if an interrupted write (.partial) or text order (9 before 10) is taken for the newest."""
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.resolve("auto") is None
    make(tmp_path, 9)
    newest = make(tmp_path, 10)
    (tmp_path / "step-00000011.partial").mkdir()
    assert checkpoints.resolve("auto") == newest
    assert checkpoints.resolve("none") is None
    assert checkpoints.resolve(str(newest)) == newest
    assert checkpoints.resolve(str(tmp_path)) == newest


def test_a_replacement_cut_in_two_loses_nothing(tmp_path: Path) -> None:
    """Red if the old checkpoint of a step is gone before the new one of the same step carries its name."""
    checkpoints = Checkpoints(tmp_path)
    make(tmp_path, 5)
    make(tmp_path, 6).rename(tmp_path / "step-00000006.replaced")  # killed between the two renamings
    make(tmp_path, 7)
    make(tmp_path, 8).rename(tmp_path / "step-00000007.replaced")  # killed after them
    checkpoints.recover()
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["step-00000005", "step-00000006", "step-00000007"]
    assert read_state(tmp_path / "step-00000007").step == 7


def test_a_path_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    """Red if a typing error starts a run from scratch."""
    with pytest.raises(UserError, match="holds no checkpoint"):
        Checkpoints(tmp_path).resolve(str(tmp_path / "nowhere"))


def test_due_follows_the_interval() -> None:
    """Red if 0 (off) divides, or the interval is off by one."""
    assert [step for step in range(1, 10) if Checkpoints(Path(), every_steps=4).due(step)] == [4, 8]
    assert not any(Checkpoints(Path()).due(step) for step in range(1, 10))


@pytest.mark.parametrize("name", ["seed", "samples", "data_crc32", "global_batch", "world_size", "zero_stage"])
def test_resuming_another_run_is_refused(name: str) -> None:
    """Red if a run goes on with another order of clips or other optimiser shards, unnoticed."""
    STATE.check_same(replace(STATE, step=3), Path("x"))
    with pytest.raises(UserError, match=str(getattr(STATE, name))):
        STATE.check_same(replace(STATE, **{name: 77}), Path("x"))


def test_unreadable_state_is_one_clear_error(tmp_path: Path) -> None:
    """Red if a torn state.json gives a traceback."""
    path = make(tmp_path, 3)
    (path / "state.json").write_text('{"step": 3, "se')
    with pytest.raises(UserError, match="cannot be read"):
        read_state(path)


def test_loading_restores_this_ranks_random_states(tmp_path: Path) -> None:
    """Red if a resumed run draws what another rank, or a fresh run, would."""

    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    config = load_config("demo")
    path = make(tmp_path, 12)
    (path / "options.json").write_text(json.dumps(config.as_dict()))
    write_safetensors({"weight": torch.ones(1)}, path / "model.safetensors", {})
    torch.save(random_states(), path / "random-00000.pt")
    expected = draw()
    engine = SimpleNamespace(
        deepspeed=SimpleNamespace(load_checkpoint=lambda *_, **__: ("found", {"loss_scale": {}})),
        restored=lambda state, loss_scale: None,
    )
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{free_port()}", rank=0, world_size=1)
    try:
        assert Checkpoints.load(engine, path, STATE, config) == STATE  # type: ignore[arg-type]
    finally:
        dist.destroy_process_group()
    assert draw() == expected


def test_random_states_round_trip(tmp_path: Path) -> None:
    """Red if a generator is forgotten, or the file needs unpickling of code."""

    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    torch.save(random_states(), tmp_path / "random.pt")
    expected = draw()
    assert draw() != expected
    restore_random_states(torch.load(tmp_path / "random.pt", weights_only=True))
    assert draw() == expected


def test_checkpoints_from_before_an_option_existed_go_on(tmp_path: Path) -> None:
    """Red if what they were trained with counts as another value, or a buffer that does nothing counts at all."""
    config = load_config("demo", [])
    saved = flat_options(config.as_dict())
    before = {key: value for key, value in saved.items() if key not in ("data.order", "data.shuffle_buffer")}
    check_same_options(before, config, tmp_path)
    check_same_options(saved, load_config("demo", ["data.shuffle_buffer=64"]), tmp_path)
    for other in (["data.order=sequential"], ["train.lr=1"] if "train.lr" in saved else ["seed=7"]):
        with pytest.raises(UserError, match="was written with"):
            check_same_options(before, load_config("demo", other), tmp_path)
    in_order = load_config("demo", ["data.order=sequential"])
    with pytest.raises(UserError, match=r"data\.shuffle_buffer = 2048 \(now 64\)"):
        check_same_options(
            flat_options(in_order.as_dict()), load_config("demo", ["data.order=sequential", "data.shuffle_buffer=64"]), tmp_path
        )


def test_signatures_stay_in_the_runs_folder() -> None:
    """Red if weights that are shared, or a dashboard, hold the signature of an address, or lose the rest of the options."""
    config = load_config("demo", ['data.train=["https://host/set?sig=SECRET", "local?name"]'])
    shared = config.shareable()
    assert shared.data.train == ("https://host/set", "local?name") and "SECRET" not in json.dumps(shared.as_dict())
    assert replace(shared, data=config.data) == config
