"""From a folder of videos to shards: every source in its place or skipped for a reason, and wrong input named."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests.data.piles import SMALL, contents, make_media, make_mixed, place, report_rows, run
from xkd_fast.data.prepare import PLAN, PrepareOptions, prepare, shuffle, standing_shards
from xkd_fast.data.shards import MANIFEST, ShardSet
from xkd_fast.data.sources import VIDEO_SUFFIXES, Source, find_sources
from xkd_fast.errors import UserError

BAD_UTF8 = os.fsdecode(b"\xff\xfe")


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_media(tmp_path_factory.mktemp("media"))


@pytest.fixture(scope="module")
def mixed(media: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_mixed(media, tmp_path_factory.mktemp("mixed") / "videos")


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
    names += ["lost+found/five.mkv"]
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


def test_links_among_folders_do_not_multiply_their_files(media: Path, tmp_path: Path) -> None:
    """Red if folders that link to each other give a sample for every way between them, or a class loses what it links to."""
    names = [f"{number:02d}" for number in range(12)]
    source = place(media, tmp_path / "videos", {f"a/{name}/{name}.mkv": "good" for name in names} | {"b/own.mkv": "good"})
    for name in names:
        for other in names:
            if other != name:
                (source / "a" / name / other).symlink_to(source / "a" / other)
    (source / "b" / "also").symlink_to(source / "a" / "00")
    found = find_sources(source)
    expected = {f"a/{name}/{name}.mkv" for name in names} | {"b/own.mkv", "b/also/00.mkv"}
    assert {found.name for found in found.sources if found.name.startswith("a/")} == {
        each for each in expected if each[0] == "a"
    }
    elsewhere = [each.name for each in found.sources if each.name.startswith("b/")]
    assert expected - set(elsewhere) == {each for each in expected if each[0] == "a"} and len(elsewhere) == 13


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
        with pytest.raises(
            UserError, match=r"none of 3 videos could be used: 2 unreadable, 1 no_audio; see .* with --retry, or"
        ):
            run(source, tmp_path / "shards")
        assert not (tmp_path / "shards" / MANIFEST).exists()
    assert {row["reason"] for row in report_rows(tmp_path / "shards").values()} == {"unreadable", "no_audio"}


def test_a_folder_without_one_sample_can_be_prepared_anew(media: Path, tmp_path: Path) -> None:
    """Would catch a folder that is lost to every other prepare since nothing in its first pile was usable."""
    source, shards = place(media, tmp_path / "videos", {"a/1.mkv": "mute", "a/2.mkv": "mute"}), tmp_path / "shards"
    many = PrepareOptions(**{**SMALL.content(), "samples_per_shard": 1})
    with pytest.raises(
        UserError, match=r"none of 2 videos could be used.*csv; mend that, or prepare the folder with other opt"
    ):
        run(source, shards, many)
    kept = PrepareOptions(**{**SMALL.content(), "missing_audio": "keep-as-video-only"})
    assert standing_shards(find_sources(source), shards, kept) == 0
    told = io.StringIO()
    report = prepare(source, shards, kept, console=Console(file=told))
    assert report.written == report.without_audio == 2 and "holds no sample; it is prepared anew" in told.getvalue()
    prepare(source, tmp_path / "new", kept, console=Console(file=io.StringIO()))
    assert contents(shards) == contents(tmp_path / "new")
    with pytest.raises(UserError, match="was prepared with samples_per_shard = 3, this call asks for 1"):
        run(source, shards, many)
    (shards / MANIFEST).unlink()  # as after an interruption: samples stand
    with pytest.raises(UserError, match="was prepared with samples_per_shard = 3, this call asks for 1"):
        run(source, shards, many)


def test_a_shard_whose_index_is_not_written_yet_is_not_thrown_away(media: Path, tmp_path: Path) -> None:
    """Would catch samples deleted in a folder that only looks as if it held none."""
    source = place(media, tmp_path / "videos", {"a/1.mkv": "good"})
    run(source, tmp_path / "shards")
    for path in (MANIFEST, "shard-000000.index.json"):
        (tmp_path / "shards" / path).unlink()
    with pytest.raises(UserError, match=r"was prepared with fps = 8\.0"):
        run(source, tmp_path / "shards", PrepareOptions(**{**SMALL.content(), "fps": 4.0}))
    assert (tmp_path / "shards" / "shard-000000.tar").exists()


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
    with pytest.raises(UserError, match=r"3\.mkv has \d+ bytes, and had"):
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
