"""`prepare` over long piles: killed again and again it ends with the same files, and its memory does not grow."""

from __future__ import annotations

import io
import os
import random
import signal
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from rich.console import Console

from tests.data.media import noise, numbered, write_video
from xkd_fast.data.prepare import PrepareOptions, prepare
from xkd_fast.data.shards import MANIFEST, ShardSet

KILLS = 10
FILES = 2000
SCRIPT = """
import sys
from xkd_fast.data.prepare import PrepareOptions, prepare
prepare(sys.argv[1], sys.argv[2], PrepareOptions(short_side=16, samples_per_shard=int(sys.argv[3]), workers=2))
"""


def pile(folder: Path, count: int) -> Path:
    """So many sources in four classes, which are links to few: good ones of several kinds, and one in ten that is not."""
    kinds = folder / ".kinds"
    kinds.mkdir(parents=True)
    pictures, sound = [numbered(k, 24, 32) for k in range(15)], noise(0.6)
    made = [write_video(kinds / f"{k}.mkv", pictures, sound=sound + np.int16(k)) for k in range(5)]
    made += [write_video(kinds / f"{k}.mp4", pictures, sound=sound, codecs=("libx264", "aac")) for k in (5, 6)]
    made.append(
        write_video(
            kinds / "7.ts", pictures, sound=sound, codecs=("mpeg2video", "mp2"), time_base=Fraction(1, 25), setup=fields
        )
    )
    made += [kinds / "8.mkv", write_video(kinds / "9.mkv", pictures)]
    made[8].write_text("no video")
    for number in range(count):
        target = made[number % len(made)]
        link = folder / f"class {number % 4}" / f"{number}{target.suffix}"
        link.parent.mkdir(exist_ok=True)
        os.link(target, link)
    return folder


def fields(stream: Any) -> None:
    stream.options = {"flags": "+ilme+ildct"}


def start(source: Path, destination: Path, samples_per_shard: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", SCRIPT, str(source), str(destination), str(samples_per_shard)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL)


def finished(destination: Path) -> int:
    return len(list(destination.glob("*.index.json")))


@pytest.mark.slow
def test_killed_at_ten_random_moments_it_ends_with_the_same_files(tmp_path: Path) -> None:
    """Red if after a kill a sample is lost, doubled or other than in an uninterrupted run, a finished shard is done again."""
    source = pile(tmp_path / "videos", 300)
    options = PrepareOptions(short_side=16, samples_per_shard=4, workers=2)
    prepare(source, tmp_path / "whole", options, console=Console(file=io.StringIO()))
    cut, moments, written = tmp_path / "cut", random.Random(5), dict[Path, int]()
    for _ in range(KILLS):
        stop, delay = finished(cut) + moments.randint(0, 4), moments.uniform(0, 0.04)
        process = start(source, cut, 4)
        while not (cut / "prepare.json").exists() or finished(cut) < stop:
            assert process.poll() is None, "it was done before it could be killed"
            time.sleep(0.001)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "it was done before it could be killed"
        assert not (cut / MANIFEST).exists()
        stood = {path: path.stat().st_mtime_ns for path in cut.glob("*.index.json")}
        assert stood.items() >= written.items(), "a finished shard was done again"
        written = stood
    report = prepare(source, cut, options, console=Console(file=io.StringIO()))
    assert 0 < report.converted_now < 300
    whole, resumed = ({path.name: path.read_bytes() for path in folder.iterdir()} for folder in (tmp_path / "whole", cut))
    assert resumed == whole
    shards = ShardSet.open(cut)
    assert len({shards.details(index)["source"] for index in range(len(shards))}) == len(shards) == 240


@pytest.mark.slow
def test_memory_stays_flat_over_two_thousand_files(tmp_path: Path) -> None:
    """Red if the caller or its workers keep something of every file: 15 kB of each of the 700 between would be 10 MiB."""
    source, destination = pile(tmp_path / "videos", FILES), tmp_path / "shards"
    process = start(source, destination, 20)
    caller = psutil.Process(process.pid)
    early: dict[int, int] = {}  # process → most memory, bytes, while a fifth to a third of the files are done
    late: dict[int, int] = {}  # the same in the last tenth
    while process.poll() is None:
        done = finished(destination) * 20 / FILES
        seen = early if 0.2 <= done < 0.35 else late if done >= 0.9 else {}
        try:
            for each in (caller, *caller.children()):
                seen[each.pid] = max(seen.get(each.pid, 0), each.memory_info().rss)
        except psutil.NoSuchProcess:
            continue
        time.sleep(0.02)
    assert process.returncode == 0 and len(ShardSet.open(destination)) == FILES * 8 // 10
    assert len(early) == 3 and set(late) == set(early), "the workers are the same from the beginning to the end"
    growth = {pid: (late[pid] - early[pid]) / 2**20 for pid in early}
    assert max(growth.values()) < 10, growth
