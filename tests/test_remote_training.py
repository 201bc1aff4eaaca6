"""Training on and checking of shards behind a web server, as a user types them: the same numbers as from the folder."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.data.clip_shards import damage, write_shards
from tests.data.http_server import serving
from tests.distributed import REPOSITORY
from tests.test_training import environment, rows
from xkd_fast import cli
from xkd_fast.config import load_config
from xkd_fast.engine.checkpoint import check_same_options, read_options
from xkd_fast.errors import UserError

TINY = [
    "data.demo=null",
    "data.shuffle_buffer=5",
    "model.encoder={width: 24, depth: 1, heads: 2}",
    "model.decoder={width: 16, depth: 1, heads: 2}",
    "model.head={hidden: 16, bottleneck: 8, prototypes: 32}",
    "train.epochs=2",
    "train.global_batch=4",
    "train.threads=1",
    "optimizer.lr=8e-3",
    "optimizer.warmup_epochs=0",
    "log.every_steps=1",
    "log.tensorboard=false",
]
STEPS = 6


def start(output: Path, place: Path | str, *more: str) -> subprocess.Popen[str]:
    arguments = [f"output={output}", f"data.train=[{place}]", *TINY, *more]
    command = [sys.executable, "-m", "xkd_fast.cli", "train", *arguments]
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(command, cwd=REPOSITORY, env=environment(), text=True, **pipe)


def end(process: subprocess.Popen[str]) -> str:
    printed, _ = process.communicate(timeout=600)
    assert process.returncode == 0, printed[-4000:]
    return printed


def losses(output: Path) -> list[tuple[float, ...]]:
    names = ("step", "total", "reconstruction", "distillation", "alignment", "gradient_norm")
    return [tuple(row[name] for name in names) for row in rows(output)]


def test_training_from_an_address_equals_training_from_the_folder(tmp_path: Path) -> None:
    """Red if one clip, draw or label differs; or the cache or the place of the data bind a run that goes on elsewhere: this one
    is stopped in the middle of an epoch and goes on from the folder."""
    folder = write_shards(tmp_path / "set")
    with serving(tmp_path) as server:
        whole = start(tmp_path / "whole", folder, "data.order=sequential")
        cache = [f"data.cache.folder={tmp_path}/cache", "data.cache.gib=0.1"]
        part = start(tmp_path / "part", f"{server.url}/set", "data.order=sequential", "train.stop_after_steps=2", *cache)
        printed = [end(whole), end(part)]
    assert "Traceback" not in "".join(printed)
    assert server.asked(".tar") == ["", ""] and len(list((tmp_path / "cache").glob("*.tar"))) == 2
    end(start(tmp_path / "part", folder, "data.order=sequential", "--resume", "auto"))
    assert len(losses(tmp_path / "whole")) == STEPS
    assert losses(tmp_path / "part") == losses(tmp_path / "whole")
    (path, *_) = sorted((tmp_path / "part" / "checkpoints").iterdir())
    with pytest.raises(UserError, match=r"data\.order = sequential \(now random\), data\.shuffle_buffer = 5 \(now 2048\)"):
        check_same_options(read_options(path), load_config("demo", [*TINY, "data.shuffle_buffer=2048"]), path)


@pytest.mark.slow  # the order above, sample by sample, is held to in tests/data
def test_training_in_random_order_from_an_address(tmp_path: Path) -> None:
    """Red if reading sample by sample over the network trains on anything else."""
    folder = write_shards(tmp_path / "set")
    with serving(tmp_path) as server:
        runs = [start(tmp_path / name, place) for name, place in (("one", folder), ("two", f"{server.url}/set"))]
        for run in runs:
            end(run)
    assert len(losses(tmp_path / "one")) == STEPS and losses(tmp_path / "two") == losses(tmp_path / "one")


def test_checking_shards_behind_an_address(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Red if `doctor --shards` passes by what is damaged on a server, or finds what is not."""
    write_shards(tmp_path / "set")
    shutil.copytree(tmp_path / "set", tmp_path / "hurt")
    damage(tmp_path / "hurt", "clip3", "audio")
    with serving(tmp_path) as server:
        assert cli.main(["doctor", "--shards", f"{server.url}/set"]) == 0
        assert "12 samples read, 0 damaged" in capsys.readouterr().out
        assert cli.main(["doctor", "--json", "--shards", f"{server.url}/hurt"]) == 1
        (found,) = json.loads(capsys.readouterr().out)["damaged"]
        assert found == f"{server.url}/hurt/clip3"
        assert cli.main(["doctor", "--shards", f"{server.url}/nowhere"]) == 2
        assert "the server answers 404 Not Found; check the address" in capsys.readouterr().err
