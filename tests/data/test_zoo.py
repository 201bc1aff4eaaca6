"""The real `prepare` over the whole zoo: each kind of file that a pile may hold ends as it should."""

from __future__ import annotations

import csv
import io
import os
import re
import tarfile
from collections import Counter
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from rich.console import Console

from tests.data.media import number_of
from tests.data.zoo import SECONDS_PER_FILE, ZOO, Animal, fill
from xkd_fast.data.audit import audit
from xkd_fast.data.decode import ClipDecoder, DecodeRequest
from xkd_fast.data.prepare import REPORT, PrepareOptions, prepare
from xkd_fast.data.shards import ShardSet
from xkd_fast.data.source_file import Reason
from xkd_fast.data.sources import find_sources

EIGHT_OF_A_SECOND = [25 * k // 8 for k in range(8)]  # numbers of the pictures seen at k / 8 s


def as_reported(name: str) -> str:
    return name.encode("utf-8", "backslashreplace").decode()


OPTIONS = PrepareOptions(short_side=16, samples_per_shard=50, workers=2, seconds_per_file=SECONDS_PER_FILE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fill(tmp_path_factory.mktemp("zoo"))


@pytest.fixture(scope="module")
def shards(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    destination = tmp_path_factory.mktemp("shards")
    prepare(folder, destination, OPTIONS, console=Console(file=io.StringIO()))
    return destination


@pytest.fixture(scope="module")
def rows(shards: Path) -> list[dict[str, str]]:
    with open(shards / REPORT, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("animal", ZOO, ids=[ascii(animal.name)[1:-1] for animal in ZOO])
def test_every_kind_of_file_gets_its_verdict(rows: list[dict[str, str]], animal: Animal) -> None:
    """Red if a file is lost, listed twice, skipped though it could be used, or used though it should not be."""
    (row,) = [row for row in rows if row["source"] == as_reported(animal.name)]
    assert (row["status"] if row["status"] == "written" else row["reason"]) == animal.verdict, row["detail"]
    assert animal.verdict in ("written", *get_args(Reason))
    assert bool(row["key"]) == bool(row["shard"]) == (row["status"] == "written")
    if animal.frames is not None:
        assert int(row["frames"]) == animal.frames


def test_nothing_else_is_reported(rows: list[dict[str, str]]) -> None:
    """Red if a name is listed that no source has, such as half of one with a line break."""
    assert sorted(row["source"] for row in rows) == sorted(as_reported(animal.name) for animal in ZOO)


HEARD = {"written": "heard", "silent_audio": "silent", "no_audio": "none"}  # what the audit says of what prepare says


def test_the_audit_says_of_sound_what_prepare_says(folder: Path, rows: list[dict[str, str]]) -> None:
    """Red if the audit has another measure of silence: sound after the picture, channels that cancel, what is too high."""
    found = audit(find_sources(folder, OPTIONS.suffixes), OPTIONS)
    assert found.sources == len(found.files) == len(rows)
    verdicts = {row["source"]: row["reason"] or row["status"] for row in rows}
    said = {as_reported(os.path.relpath(path, folder)): probe for path, probe in found.files.items()}
    judged = {name for name, verdict in verdicts.items() if verdict in HEARD}
    assert {name: said[name].sound for name in judged} == {name: HEARD[verdicts[name]] for name in judged}
    assert Counter(said[name].sound for name in judged).keys() == {"heard", "silent", "none"}
    for name, probe in said.items():
        assert probe.problem is None or verdicts[name] in ("unreadable", "timed_out"), name  # how far it gets is the machine's
        assert (probe.problem is None and probe.video is None) == (verdicts[name] == "no_video"), name


def test_what_was_written_shows_and_sounds(shards: Path) -> None:
    """Red if a kind of pixels, container or sound comes out as other pictures, of another shape, or silent."""
    animals, stored = {animal.name: animal for animal in ZOO}, ShardSet.open(shards)
    decoder = ClipDecoder(batch_size=1, threads=1, codec=stored.codec)
    seen = set()
    for index in range(len(stored)):
        sample, animal = stored.read(index), animals[stored.details(index)["source"]]
        (clip,) = decoder([DecodeRequest(sample.key, sample.video, sample.audio, 0, int(stored.frames[index]))])
        frames, waveform = clip.frames.numpy(), clip.waveform.numpy()
        if animal.size is not None:
            assert frames.shape[1:3] == animal.size, animal.name
        if animal.frames == 8 and not animal.name.startswith("rates"):
            assert [number_of(picture) for picture in frames] == EIGHT_OF_A_SECOND, animal.name
        if not animal.name.startswith("broken"):
            assert frames.std((1, 2, 3)).max() < 3, f"{animal.name} is not flat and grey"
        assert len(waveform) == 2000 * len(frames) and np.abs(waveform).max() > 0.01, animal.name
        seen.add(animal.name)
    assert seen == {animal.name for animal in ZOO if animal.verdict == "written"}


def test_no_name_escapes_the_archives(shards: Path) -> None:
    """Red if a source's name becomes a name in a tar: unpacked, ``..`` and ``C:\\`` would write elsewhere."""
    for path in shards.glob("*.tar"):
        with tarfile.open(path) as tar:
            assert all(re.fullmatch(r"\d{8}\.(mosaic|flac|json)", name) for name in tar.getnames())
    ours = re.compile(r"shard-\d{6}\.(tar|index\.json)|report\.csv|prepare\.json|manifest\.json")
    assert all(ours.fullmatch(path.name) for path in shards.iterdir())
