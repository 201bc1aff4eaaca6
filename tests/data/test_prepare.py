"""From a folder of videos to shards: every source in its place or skipped for a reason, whatever interrupts."""

from __future__ import annotations

import csv
import fcntl
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from rich.console import Console

from tests.data.media import noise, number_of, numbered, write_video
from xkd_fast.data.decode import ClipDecoder, DecodeRequest
from xkd_fast.data.prepare import (
    PLAN,
    REPORT,
    PrepareOptions,
    PrepareReport,
    prepare,
    shuffle,
)
from xkd_fast.data.shards import MANIFEST, ShardSet, index_path
from xkd_fast.data.sources import VIDEO_SUFFIXES, Source, find_sources
from xkd_fast.data.synthetic import SyntheticOptions, clip_path, render_clip, render_dataset
from xkd_fast.errors import UserError

SMALL = PrepareOptions(codec="mjpeg", short_side=16, samples_per_shard=3, workers=1)
BAD_UTF8 = os.fsdecode(b"\xff\xfe")


def run(source: Path, destination: Path, options: PrepareOptions = SMALL) -> PrepareReport:
    return prepare(source, destination, options, console=Console(file=io.StringIO()))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def report_rows(destination: Path) -> dict[str, dict[str, str]]:
    """Rows of report.csv by source; a source listed twice is an error."""
    with open(destination / REPORT, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len({row["source"] for row in rows}) == len(rows)
    return {row["source"]: row for row in rows}


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One good video, and one of every kind that a folder may hold besides."""
    folder = tmp_path_factory.mktemp("media")
    write_video(folder / "good.mkv", [numbered(k, 24, 32) for k in range(15)], sound=noise(0.6))
    write_video(folder / "mute.mkv", [numbered(k, 24, 32) for k in range(15)])
    write_video(folder / "silent.mkv", [numbered(k, 24, 32) for k in range(15)], sound=np.zeros(9600, np.int16))
    write_video(folder / "short.mkv", [numbered(k, 24, 32) for k in range(4)], sound=noise(0.6))
    (folder / "text.mkv").write_text("no video")
    return folder


def place(media: Path, root: Path, names: dict[str, str]) -> Path:
    """A source folder: path below it → which of the media lies there."""
    for name, kind in names.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(media / f"{kind}.mkv", root / name)
    return root


@pytest.fixture(scope="module")
def mixed(media: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 sources in three classes and the root, four of them bad."""
    names = {f"{name}/{number}.mkv": "good" for name in ("bark", "moo", "purr") for number in range(5)}
    names |= {"bark/mute.mkv": "mute", "moo/text.mkv": "text", "purr/short.mkv": "short", "silent.mkv": "silent"}
    names["root.mkv"] = "good"
    return place(media, tmp_path_factory.mktemp("mixed") / "videos", names)


@pytest.fixture(scope="module")
def prepared(mixed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The uninterrupted run that others are compared with."""
    destination = tmp_path_factory.mktemp("prepared") / "shards"
    run(mixed, destination)
    return destination


# ---------------------------------------------------------------------------------------------------------- what comes out


def test_every_source_is_written_once_or_skipped_for_a_reason(mixed: Path, prepared: Path) -> None:
    """Would catch sources lost or doubled at the borders of shards, wrong labels, and reasons mixed up with neighbours'."""
    rows, shards = report_rows(prepared), ShardSet.open(prepared)
    assert set(rows) == {str(path.relative_to(mixed)) for path in mixed.rglob("*.mkv")}
    skipped = {name: row["reason"] for name, row in rows.items() if row["status"] == "skipped"}
    assert skipped == {
        "bark/mute.mkv": "no_audio",
        "moo/text.mkv": "unreadable",
        "purr/short.mkv": "too_short",
        "silent.mkv": "silent_audio",
    }
    assert len(shards) == 16 and shards.classes == ["bark", "moo", "purr"]
    seen = {}
    for index in range(len(shards)):
        details, record = shards.details(index), shards.record(index)
        seen[details["source"]] = record.key
        expected = details["source"].split("/")[0] if "/" in details["source"] else None
        assert details["class"] == expected
        assert record.label == (-1 if expected is None else shards.classes.index(expected))
        assert (record.frames, record.samples, record.height, record.width) == (5, 10000, 16, 22)
        assert (details["duration"], details["offset"]) == (5 / 8, 0)
        row = rows[details["source"]]
        assert (row["key"], row["shard"], row["frames"]) == (record.key, Path(record.shard).name, "5")
    assert set(seen) == set(rows) - set(skipped) and len(set(seen.values())) == 16
    assert not any(shards.damage(index) for index in range(len(shards)))


def test_manifest_tells_what_was_done(prepared: Path) -> None:
    """Would catch counts that do not add up, and options that are not noted: nobody could tell later what a set holds."""
    manifest = json.loads((prepared / MANIFEST).read_text())
    assert manifest["samples"] == 16 == sum(entry["samples"] for entry in manifest["shards"])
    assert manifest["skipped"] == {"no_audio": 1, "silent_audio": 1, "too_short": 1, "unreadable": 1}
    assert (manifest["codec"], manifest["fps"], manifest["short_side"], manifest["sample_rate"]) == ("mjpeg", 8.0, 16, 16000)
    assert manifest["options"] == SMALL.content() and manifest["options"]["quality"] == 4
    assert {entry["name"] for entry in manifest["shards"]} == {path.name for path in prepared.glob("*.tar")}
    assert len(manifest["shards"]) == 7


def test_the_report_of_a_call(mixed: Path, prepared: Path, tmp_path: Path) -> None:
    """Would catch a second call that converts everything again, and one that reports the work of the first as its own."""
    first = run(mixed, tmp_path / "shards")
    assert (first.written, first.sources, first.shards, first.converted_now) == (16, 20, 7, 20)
    assert first.skipped == Counter(no_audio=1, silent_audio=1, too_short=1, unreadable=1)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "shards").glob("*.tar")}
    second = run(mixed, tmp_path / "shards")
    assert (second.written, second.converted_now, second.skipped) == (16, 0, first.skipped)
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "shards").glob("*.tar")}


def test_a_log_is_told_how_far_it_is(mixed: Path, tmp_path: Path) -> None:
    """Would catch silence for hours where standard error is a file, and a line for every source."""
    told = io.StringIO()
    prepare(mixed, tmp_path / "shards", SMALL, console=Console(file=told))
    lines = told.getvalue().splitlines()
    assert len(lines) == 10 and lines[-1] == "preparing shards: 20 of 20, 4 skipped"
    for number, line in enumerate(lines[:-1], start=1):
        assert re.fullmatch(rf"preparing shards: {2 * number} of 20, [0-4] skipped, about 0:\d\d:\d\d left", line)


@pytest.mark.parametrize("workers", [2, 3])
def test_shards_do_not_depend_on_the_number_of_workers(mixed: Path, prepared: Path, tmp_path: Path, workers: int) -> None:
    """Would catch samples stored in the order in which they happen to be ready."""
    options = PrepareOptions(codec="mjpeg", short_side=16, samples_per_shard=3, workers=workers)
    run(mixed, tmp_path / "shards", options)
    assert contents(tmp_path / "shards") == contents(prepared)


def test_shards_do_not_depend_on_where_the_source_lies(
    mixed: Path, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Would catch a machine's paths in the shards, and a relative folder that is read from another place."""
    monkeypatch.chdir(mixed)
    run(Path("."), tmp_path / "shards")
    assert contents(tmp_path / "shards") == contents(prepared)


def test_the_seed_moves_samples_between_shards(mixed: Path) -> None:
    """Would catch shards of one class each, which a sequential reader would train on one after the other."""
    sources = find_sources(mixed).sources
    first, again, other = shuffle(sources, 0), shuffle(sources[::-1], 0), shuffle(sources, 1)
    assert first == again and first != other and sorted(first, key=lambda s: s.name) == sources
    many = shuffle([Source(f"{name}/{k}.mp4", "", (name,)) for name in "abcd" for k in range(100)], 0)
    for start in range(0, 400, 50):
        assert min(Counter(source.classes for source in many[start : start + 50]).values()) >= 4


# ------------------------------------------------------------------------------------------------------------------- names


def test_names_of_every_kind(media: Path, tmp_path: Path) -> None:
    """Would catch names that break the table, the index or the run: other alphabets, line breaks, commas, bad UTF-8."""
    names = [
        "ö/鳥 – птица.mkv",
        'new\nline/a,"b".mkv',
        f"{BAD_UTF8}/{BAD_UTF8}.mkv",
        "[bold]/%03d.mkv",
        "plain/-v.mkv",
        " .mkv",
    ]
    source = place(media, tmp_path / "videos", dict.fromkeys(names, "good"))
    shown = io.StringIO()
    assert prepare(source, tmp_path / "[red]", SMALL, console=Console(file=shown, width=200)).written == len(names)
    assert "preparing [red]" in shown.getvalue()
    rows, shards = report_rows(tmp_path / "[red]"), ShardSet.open(tmp_path / "[red]")
    assert set(rows) == {name.encode("utf-8", "backslashreplace").decode() for name in names}
    assert {row["status"] for row in rows.values()} == {"written"}
    assert {shards.details(index)["source"] for index in range(len(shards))} == set(names)
    assert shards.classes == sorted(name.split("/")[0] for name in names if "/" in name)
    for index in range(len(shards)):
        folder, _, rest = shards.details(index)["source"].partition("/")
        assert shards.labels[index] == (shards.classes.index(folder) if rest else -1)


def test_which_files_count(media: Path, tmp_path: Path) -> None:
    """Would catch endings in capitals left out, hidden and other files taken in, and classes named by the deepest folder."""
    names = ["a/ONE.MKV", "a/b/c/two.Mp4", "three.webm", ".hidden.mkv", "a/._one.mkv", ".trash/four.mkv", "a/note.txt", "a/mkv"]
    source = place(media, tmp_path / "videos", dict.fromkeys(names, "good"))
    (source / "folder.mp4").mkdir()
    size = (source / "three.webm").stat().st_size
    expected = {"a/ONE.MKV": ("a",), "a/b/c/two.Mp4": ("a",), "three.webm": ()}
    found = find_sources(source)
    assert found.sources == [Source(name, str(source / name), classes, size=size) for name, classes in expected.items()]
    assert found.classes == ["a"] and found.about == {}
    (warning,) = found.warnings
    assert "2 files of" in warning and "1 .txt" in warning and "1 without one" in warning
    assert {".mp4", ".webm", ".mkv", ".avi", ".mov"} <= VIDEO_SUFFIXES


def test_links(media: Path, tmp_path: Path) -> None:
    """Would catch linked videos or classes left out, a loop walked for ever, and a dead link that ends the run."""
    source = place(media, tmp_path / "videos", {"a/one.mkv": "good"})
    place(media, tmp_path / "elsewhere", {"two.mkv": "good"})
    (source / "b").symlink_to(tmp_path / "elsewhere")
    (source / "a" / "three.mkv").symlink_to(source / "a" / "one.mkv")
    (source / "a" / "dead.mkv").symlink_to("nowhere.mkv")
    (source / "a" / "itself.mkv").symlink_to("itself.mkv")
    (source / "itself").symlink_to("itself")
    for number in range(8):  # 8 ways down at each of 40 levels, if nothing stops it
        (source / "a" / f"loop{number}").symlink_to(source)
    started = time.monotonic()
    assert run(source, tmp_path / "shards").written == 3
    assert time.monotonic() - started < 30
    rows = report_rows(tmp_path / "shards")
    assert {name: row["status"] for name, row in rows.items()} == {
        "a/one.mkv": "written",
        "a/three.mkv": "written",
        "b/two.mkv": "written",
        "a/dead.mkv": "skipped",
        "a/itself.mkv": "skipped",
    }


# ------------------------------------------------------------------------------------------------------------- wrong input


def test_wrong_sources(media: Path, tmp_path: Path) -> None:
    """Would catch an empty shard set made of a mistyped folder."""
    with pytest.raises(UserError, match="nowhere is not a folder"):
        run(tmp_path / "nowhere", tmp_path / "shards")
    (tmp_path / "empty").mkdir()
    (tmp_path / "sounds").mkdir()
    (tmp_path / "sounds" / "a.wav").write_bytes(b"")
    with pytest.raises(UserError, match=r"holds no video; .*; of its 1 sounds, samples are made with --missing-video keep-as"):
        run(tmp_path / "sounds", tmp_path / "shards")
    with pytest.raises(UserError, match=r"empty holds no video; files with one of these endings count: .*\.mp4"):
        run(tmp_path / "empty", tmp_path / "shards")
    assert not (tmp_path / "shards").exists()


def test_no_video_that_can_be_used(media: Path, tmp_path: Path) -> None:
    """Would catch an empty set that counts as prepared."""
    source = place(media, tmp_path / "videos", {"a/1.mkv": "text", "a/2.mkv": "mute", "a/3.mkv": "text"})
    for _ in range(2):
        with pytest.raises(UserError, match=r"none of 3 videos could be used: 2 unreadable, 1 no_audio; see .*report\.csv"):
            run(source, tmp_path / "shards")
        assert not (tmp_path / "shards" / MANIFEST).exists()
    assert {row["reason"] for row in report_rows(tmp_path / "shards").values()} == {"unreadable", "no_audio"}


def test_a_destination_of_somebody_else(media: Path, tmp_path: Path) -> None:
    """Would catch shards strewn among other files."""
    source = place(media, tmp_path / "videos", {"a/1.mkv": "good"})
    with pytest.raises(UserError, match="videos holds files that are not shards of prepare; choose an empty or a new folder"):
        run(source, source)
    assert sorted(path.name for path in source.iterdir()) == ["a"]
    with pytest.raises(UserError, match=r"1\.mkv is a file; name a folder"):
        run(source, source / "a" / "1.mkv")
    with pytest.raises(UserError, match=r"cannot be made a folder \(Not a directory\); name another one"):
        run(source, source / "a" / "1.mkv" / "shards")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"fps": 4.0}, "was prepared with fps = 8.0, this call asks for 4.0; choose another folder, or delete this one"),
        ({"short_side": 32}, "short_side = 16, this call asks for 32"),
        ({"quality": 5}, "quality = 4, this call asks for 5"),
        ({"codec": "h264"}, "codec = mjpeg, this call asks for h264"),
        ({"samples_per_shard": 4}, "samples_per_shard = 3, this call asks for 4"),
        ({"seed": 1}, "seed = 0, this call asks for 1"),
    ],
)
def test_other_options_are_refused(mixed: Path, prepared: Path, change: dict[str, Any], words: str) -> None:
    """Would catch one folder with shards of two kinds."""
    before = contents(prepared)
    with pytest.raises(UserError, match=words):
        run(mixed, prepared, PrepareOptions(**{**SMALL.content(), "workers": 1, **change}))
    assert contents(prepared) == before


def test_other_sources_are_refused(media: Path, tmp_path: Path) -> None:
    """Would catch a folder continued with other videos: labels and shards of the first half would no longer be right."""
    source = place(media, tmp_path / "videos", {"a/1.mkv": "good", "b/2.mkv": "good"})
    run(source, tmp_path / "shards")
    os.rename(source / "b", source / "c")
    with pytest.raises(UserError, match="was prepared from 2 videos, and the source folder now holds 2 or others"):
        run(source, tmp_path / "shards")
    place(media, source, {"a/3.mkv": "good"})
    with pytest.raises(UserError, match="now holds 3 or others"):
        run(source, tmp_path / "shards")
    run(source, tmp_path / "more")
    with open(source / "a" / "3.mkv", "ab") as file:
        file.write(b"longer")
    with pytest.raises(UserError, match="now holds 3 or others, by name or size"):
        run(source, tmp_path / "more")


def test_shards_of_another_converter_are_not_gone_on_with(mixed: Path, prepared: Path, tmp_path: Path) -> None:
    """Would catch a set of which one half was made by a version with other colours or sound than the other half."""
    shutil.copytree(prepared, tmp_path / "shards")
    plan = json.loads((prepared / PLAN).read_text())
    del plan["converter"]  # as of the versions before it was noted
    (tmp_path / "shards" / PLAN).write_text(json.dumps(plan))
    with pytest.raises(UserError, match=r"was prepared by another version.*can be trained on as it is.*choose another folder"):
        run(mixed, tmp_path / "shards")


@pytest.mark.parametrize("plan", ["[]", "{", "{}", '{"format": 1}', '{"format": 1, "options": 3}', '{"format": 9}'])
def test_a_damaged_plan_is_refused(mixed: Path, tmp_path: Path, plan: str) -> None:
    """Would catch a traceback, or a run that goes on with another's shards."""
    (tmp_path / PLAN).write_text(plan)
    with pytest.raises(UserError, match=f"{tmp_path}.*; choose another folder, or delete this one"):
        run(mixed, tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"codec": "av1"}, "codec = 'av1' must be one of auto, mjpeg, h264, vp9, mosaic, yuv"),
        ({"fps": 0.0}, "fps = 0.0 must lie in 0.1-240"),
        ({"fps": float("nan")}, "fps = nan"),
        ({"short_side": 127}, "short_side = 127 must be an even number"),
        ({"sample_rate": 0}, "sample_rate = 0"),
        ({"min_seconds": -1}, "min_seconds = -1"),
        ({"quality": 1, "codec": "mjpeg"}, "quality = 1 must lie in 2-31 for mjpeg"),
        ({"quality": 52, "codec": "h264"}, "quality = 52 must lie in 0-51 for h264"),
        ({"quality": 64, "codec": "vp9"}, "quality = 64 must lie in 0-63 for vp9"),
        ({"quality": 32, "codec": "mosaic"}, "quality = 32 must lie in 2-31 for mosaic"),
        ({"quality": 4, "codec": "yuv"}, "quality = 4 means nothing for yuv, which stores pixels as they are; leave it out"),
        ({"quality": 4}, "quality = 4 needs a codec by name, since each has its own scale: mjpeg 2-31"),
        ({"samples_per_shard": 0}, "samples_per_shard = 0"),
        ({"seed": -1}, "seed = -1 must lie in 0-"),
        ({"workers": -1}, "workers = -1"),
        ({"seconds_per_file": float("inf")}, "seconds_per_file = inf"),
    ],
)
def test_wrong_options_are_named(change: dict[str, Any], words: str) -> None:
    """Would catch a wrong value that fails, or does harm, an hour later."""
    with pytest.raises(ValueError, match=words):
        PrepareOptions(**change)


# ----------------------------------------------------------------------------------------------------------- interruptions


SCRIPT = """
import sys
from xkd_fast.data.prepare import PrepareOptions, prepare
prepare(sys.argv[1], sys.argv[2], PrepareOptions(codec="mjpeg", short_side=16, samples_per_shard=3, workers=1))
"""


def kill_when(source: Path, destination: Path, condition: Callable[[], bool]) -> None:
    """Start a prepare and kill it as soon as the condition holds."""
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, source, destination], stdout=subprocess.DEVNULL)
    while not condition() and process.poll() is None:
        time.sleep(0.0005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it was done before it could be killed"


def test_killed_at_three_moments_it_ends_with_the_same_files(mixed: Path, prepared: Path, tmp_path: Path) -> None:
    """Would catch half a shard that counts, a finished one done again, and remains of what was cut off."""
    shards = tmp_path / "shards"
    kill_when(mixed, shards, lambda: (shards / PLAN).exists())
    assert not list(shards.glob("*.tar"))
    kill_when(mixed, shards, lambda: (shards / ".shard-000001.tar.partial").exists())
    first = shards / "shard-000000.tar"
    written = first.stat().st_mtime_ns
    kill_when(mixed, shards, lambda: (shards / "shard-000004.tar").exists())
    assert not (shards / MANIFEST).exists()
    with pytest.raises(UserError, match="an interrupted prepare goes on when it is called again"):
        ShardSet.open(shards)
    report = run(mixed, shards)
    assert 0 < report.converted_now < 20
    assert first.stat().st_mtime_ns == written
    assert contents(shards) == contents(prepared)


def test_cut_off_before_its_plan_was_written(mixed: Path, prepared: Path, tmp_path: Path) -> None:
    """Would catch a folder refused for ever because a kill left the plan's first half in it."""
    (tmp_path / f".{PLAN}.partial").write_text("{")
    run(mixed, tmp_path)
    assert contents(tmp_path) == contents(prepared)


@pytest.mark.parametrize(
    "damage",
    [
        lambda tar: tar.unlink(),
        lambda tar: os.truncate(tar, 1000),
        lambda tar: index_path(tar).unlink(),
        lambda tar: os.truncate(index_path(tar), 100),
    ],
    ids=["no tar", "half a tar", "no index", "half an index"],
)
def test_a_shard_that_went_missing_is_made_again(
    mixed: Path, prepared: Path, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    """Would catch a set that no call mends: reading says to prepare again, and preparing finds nothing to do."""
    shutil.copytree(prepared, tmp_path / "shards")
    damage(tmp_path / "shards" / "shard-000002.tar")
    assert run(mixed, tmp_path / "shards").converted_now == 3
    assert contents(tmp_path / "shards") == contents(prepared)


def test_two_at_once(mixed: Path, tmp_path: Path) -> None:
    """Would catch two runs that write into each other's shards."""
    descriptor = os.open(tmp_path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH)  # even against that, prepare asks for the folder to itself
        with pytest.raises(UserError, match=f"another prepare is writing to {tmp_path}; wait for it"):
            run(mixed, tmp_path)
        assert list(tmp_path.iterdir()) == []
    finally:
        os.close(descriptor)


def test_a_full_disk_is_told_and_mended(mixed: Path, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Would catch a traceback, a broken shard left behind, and a run that cannot go on."""
    calls = 0
    fsync = os.fsync

    def full(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 6:
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"preparing .* failed: No space left on device; mend that, then call again to go on"):
        run(mixed, tmp_path / "shards")
    monkeypatch.undo()
    assert not list((tmp_path / "shards").glob(".*"))
    assert 0 < run(mixed, tmp_path / "shards").converted_now < 20
    assert contents(tmp_path / "shards") == contents(prepared)


def test_a_source_that_hangs_is_skipped(mixed: Path, prepared: Path, tmp_path: Path) -> None:
    """Would catch one bad file that holds up the other hundred thousand, and the neighbours' results lost with it."""
    hooks = tmp_path / "hooks"
    hooks.mkdir()
    (hooks / "sitecustomize.py").write_text(
        "import sys, time\n"
        "if 'xkd_fast.data.convert:convert' in sys.argv:\n"
        "    import os, xkd_fast.data.convert as convert\n"
        "    original = convert._convert\n"
        "    def slow(task):\n"
        "        if task.path.endswith('moo/3.mkv'): time.sleep(1000)\n"
        "        if task.path.endswith('purr/2.mkv'): os.abort()\n"
        "        return original(task)\n"
        "    convert._convert = slow\n"
    )
    options = PrepareOptions(**{**SMALL.content(), "workers": 2, "seconds_per_file": 4.0})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(hooks))
        report = run(mixed, tmp_path / "shards", options)
    assert report.skipped == Counter(timed_out=1, crashed=1, no_audio=1, silent_audio=1, too_short=1, unreadable=1)
    rows, usual = report_rows(tmp_path / "shards"), report_rows(prepared)
    assert (rows["moo/3.mkv"]["reason"], rows["purr/2.mkv"]["reason"]) == ("timed_out", "crashed")
    assert "SIGABRT" in rows["purr/2.mkv"]["detail"]
    for name in set(rows) - {"moo/3.mkv", "purr/2.mkv"}:
        assert rows[name] == usual[name]


# --------------------------------------------------------------------------------------------------------- picture and sound


def decode_all(shards: ShardSet) -> dict[str, tuple[NDArray[np.uint8], NDArray[np.float32]]]:
    """Every sample's frames and sound as training decodes them, by source."""
    decoder, decoded = ClipDecoder(batch_size=1, threads=1, codec=shards.codec), {}
    for index in range(len(shards)):
        sample = shards.read(index)
        (clip,) = decoder([DecodeRequest(sample.key, sample.video, sample.audio, 0, int(shards.frames[index]))])
        decoded[shards.details(index)["source"]] = (clip.frames.numpy(), clip.waveform.numpy())
    return decoded


def sudden(waveform: NDArray[np.float32], rate: int) -> NDArray[np.float64]:
    """When a sound sets in after quiet, seconds: 5 ms that are 20 times as strong as each of the three before."""
    window = rate // 200
    power = (waveform[: len(waveform) // window * window].astype(float).reshape(-1, window) ** 2).mean(1)
    found = [k for k in range(3, len(power)) if power[k] > max(0.01 * power.max(), 20 * power[k - 3 : k].max())]
    return np.array(found) * window / rate


def test_impacts_are_still_heard_when_they_are_seen(tmp_path: Path) -> None:
    """Would catch a delay of H.264, AAC, MJPEG, FLAC or the decoders that parts sound from picture on the way to training."""
    clean = SyntheticOptions(
        clips_per_class=2, classes=("bounce",), seconds=(3.0, 3.5), background=0, video_noise=0, audio_noise=0, distractors=0
    )
    render_dataset(tmp_path / "videos", clean)
    run(tmp_path / "videos", tmp_path / "shards", PrepareOptions(fps=16.0, short_side=96, workers=1))
    decoded = decode_all(ShardSet.open(tmp_path / "shards"))
    for index in range(2):
        clip = render_clip("bounce", index, clean)
        frames, waveform = decoded[str(clip_path("", "bounce", index))]
        assert len(frames) == len(clip.frames) and len(waveform) == len(clip.waveform)
        assert np.abs(frames.astype(float) - clip.frames).mean() < 6
        moving = np.abs(frames - np.median(frames, axis=0)).sum(-1) > 60
        rows = (moving * np.arange(frames.shape[1])[:, None]).sum((1, 2)) / moving.sum((1, 2))
        lowest = np.array([k for k in range(1, len(rows) - 1) if rows[k] >= max(rows[k - 1], rows[k + 1])]) / 16
        heard = [time for time in sudden(waveform, 16000) if 2 / 16 < time < (len(frames) - 2) / 16]
        assert len(heard) >= 2
        for time_heard in heard:
            assert np.abs(clip.events - time_heard).min() < 0.01
            assert np.abs(lowest - time_heard).min() <= 1 / 16 + 0.005


BEGINNINGS = {"h264": (4, b"ftyp"), "vp9": (0, b"\x1aE\xdf\xa3"), "mosaic": (0, b"XKDMOS01"), "yuv": (0, b"XKDYUV01")}


@pytest.mark.parametrize("codec", BEGINNINGS)
def test_other_codecs_hold_the_same_samples(media: Path, tmp_path: Path, codec: Any) -> None:
    """Would catch another codec's branch broken: its files, its quality, its frames."""
    source = place(media, tmp_path / "videos", {"a/1.mkv": "good"})
    run(source, tmp_path / "shards", PrepareOptions(codec=codec, short_side=16, workers=1))
    shards = ShardSet.open(tmp_path / "shards")
    begin, magic = BEGINNINGS[codec]
    assert shards.codec == codec and shards.read(0).video[begin : begin + len(magic)].tobytes() == magic
    assert shards.record(0).frames == 5
    if codec != "h264":
        ((frames, _),) = decode_all(shards).values()
        assert [number_of(picture) for picture in frames] == [0, 3, 6, 9, 12]


def test_auto_names_its_codec_and_keeps_to_it(media: Path, tmp_path: Path) -> None:
    """Would catch "auto" in the manifest, a choice without a word, and a folder refused since it was begun with another."""
    source = place(media, tmp_path / "videos", {"a/1.mkv": "good"})
    auto = PrepareOptions(short_side=16, samples_per_shard=3, workers=1)

    def told(folder: str, options: PrepareOptions) -> str:
        shown = io.StringIO()
        prepare(source, tmp_path / folder, options, console=Console(file=shown, width=40))
        return "".join(line for line in shown.getvalue().splitlines(keepends=True) if line.startswith("codec"))

    chosen = "codec auto: mosaic, which a CPU decodes faster than mjpeg and "
    assert told("new", auto).startswith(chosen)
    assert json.loads((tmp_path / "new" / MANIFEST).read_text())["codec"] == "mosaic"
    assert json.loads((tmp_path / "new" / PLAN).read_text())["options"]["quality"] == 4
    assert told("begun", SMALL) == ""
    for folder, codec in (("new", "mosaic"), ("begun", "mjpeg")):
        before = contents(tmp_path / folder)
        assert told(folder, auto) == f"codec auto: {codec}, which {tmp_path / folder} was begun with\n"
        assert contents(tmp_path / folder) == before
    (tmp_path / "begun" / PLAN).write_text('{"options": {"codec": ["mjpeg"]}}')
    with pytest.raises(UserError, match="was prepared in format None"):
        told("begun", auto)


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("XKD_TEST_MEDIA"), reason="XKD_TEST_MEDIA names no folder of real media")
def test_real_media(tmp_path: Path) -> None:
    """Would catch a kind of file from the wild that is refused, or that should be and is not."""
    root = Path(os.environ["XKD_TEST_MEDIA"])
    (tmp_path / "videos").mkdir()
    for folder in ("odd", "video"):
        (tmp_path / "videos" / folder).symlink_to(root / folder)
    run(tmp_path / "videos", tmp_path / "shards", PrepareOptions(workers=2))
    rows = report_rows(tmp_path / "shards")
    expected = {name: "unreadable" for name in rows if name.startswith("odd/bad_")}
    expected |= {"odd/bad_truncated.webm": "truncated", "odd/no_audio.mp4": "no_audio", "odd/audio_only.m4a": "no_video"}
    expected |= {"video/flower.webm": "silent_audio", "video/stream-of-water-audioless.webm": "silent_audio"}
    assert {name: row["reason"] for name, row in rows.items() if row["status"] == "skipped"} == expected
    decoded = decode_all(ShardSet.open(tmp_path / "shards"))
    assert len(decoded) == len(rows) - len(expected) >= 30
    for name, (frames, waveform) in decoded.items():
        assert min(frames.shape[1:3]) == 128 and len(waveform) == round(len(frames) / 8 * 16000), name
        assert frames.std() > 5 and np.abs(waveform).max() > 1e-3, name
    late, early = decoded["odd/audio_starts_1p5s_late.mp4"][1], decoded["odd/audio_shorter_2s_of_6s.mp4"][1]
    assert not late[: 16000 + 7000].any() and late[16000 + 9000 :].any()
    assert early[: 2 * 16000].any() and not early[2 * 16000 + 2048 :].any()
    assert decoded["odd/portrait_270x480_25fps_aac44k_mono.mp4"][0].shape[1:3] == (228, 128)
