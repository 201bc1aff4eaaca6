"""`prepare` cut off, hung, crashed or out of disk: called again it ends with the same files, and can try again."""

from __future__ import annotations

import fcntl
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest
from rich.console import Console

from tests.data.media import noise, write_video
from tests.data.piles import SMALL, contents, make_media, make_mixed, report_rows, run
from xkd_fast.data.prepare import PLAN, PrepareOptions, PrepareReport, prepare
from xkd_fast.data.shards import MANIFEST, ShardSet, index_path
from xkd_fast.errors import UserError


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


@pytest.mark.parametrize("lost", [lambda tar: tar, index_path], ids=["tar", "index"])
@pytest.mark.parametrize("retry", [False, True])
def test_a_shard_that_cannot_be_reached_is_not_made_again(
    mixed: Path, prepared: Path, tmp_path: Path, lost: Callable[[Path], Path], retry: bool
) -> None:
    """Red if a disk that fails to read for a moment costs finished shards, or ends the call without the path's name."""
    shards = tmp_path / "shards"
    shutil.copytree(prepared, shards)
    path = lost(shards / "shard-000002.tar")
    os.rename(path, tmp_path / "away")
    path.symlink_to(path)  # which nobody can follow
    stood = {each: each.lstat().st_mtime_ns for each in shards.iterdir()}
    with pytest.raises(UserError, match=f"{path}, of a finished shard, cannot be read: .*; make it readable, or delete it"):
        run(mixed, shards, retry=retry)
    assert stood == {each: each.lstat().st_mtime_ns for each in shards.iterdir()}
    path.unlink()
    os.rename(tmp_path / "away", path)
    assert run(mixed, shards).converted_now == 0 and contents(shards) == contents(prepared)


@pytest.mark.parametrize("table", ["report", "samples"])
@pytest.mark.parametrize("damage", [None, 3, [3], []])
@pytest.mark.parametrize("retry", [False, True])
def test_a_shard_whose_index_lacks_a_table_is_made_again(
    mixed: Path, prepared: Path, tmp_path: Path, table: str, damage: object, retry: bool
) -> None:
    """Red if a damaged index ends the call with a traceback, or its shard counts as finished."""
    shards = tmp_path / "shards"
    shutil.copytree(prepared, shards)
    index = index_path(shards / "shard-000001.tar")
    content = json.loads(index.read_text())
    index.write_text(json.dumps(content | {table: damage}))
    run(mixed, shards, retry=retry)
    assert contents(shards) == contents(prepared)


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


HOOKS = """
import sys, time
if 'xkd_fast.data.convert:convert' in sys.argv:
    import os, xkd_fast.data.convert as convert
    original = convert._convert
    def slow(task):
        if task.path.endswith('moo/3.mkv'): time.sleep(1000)
        if task.path.endswith('purr/2.mkv'): os.abort()
        return original(task)
    convert._convert = slow
"""


@pytest.fixture(scope="module")
def failed(mixed: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PrepareReport]:
    """The set after a call in which one source hung and one crashed its worker, and that call's report."""
    folder = tmp_path_factory.mktemp("failed")
    (folder / "hooks").mkdir()
    (folder / "hooks" / "sitecustomize.py").write_text(HOOKS)
    options = PrepareOptions(**{**SMALL.content(), "workers": 2, "seconds_per_file": 4.0})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(folder / "hooks"))
        report = run(mixed, folder / "shards", options)
    return folder / "shards", report


def test_a_source_that_hangs_is_skipped(failed: tuple[Path, PrepareReport], prepared: Path) -> None:
    """Would catch one bad file that holds up the other hundred thousand, and the neighbours' results lost with it."""
    shards, report = failed
    assert report.skipped == Counter(timed_out=1, crashed=1, no_audio=1, silent_audio=1, too_short=1, unreadable=1)
    rows, usual = report_rows(shards), report_rows(prepared)
    assert (rows["moo/3.mkv"]["reason"], rows["purr/2.mkv"]["reason"]) == ("timed_out", "crashed")
    assert "SIGABRT" in rows["purr/2.mkv"]["detail"]
    for name in set(rows) - {"moo/3.mkv", "purr/2.mkv"}:
        assert rows[name] == usual[name]


# ----------------------------------------------------------------------------------------------------------- tried again


def test_what_timed_out_or_crashed_is_tried_again(
    mixed: Path, prepared: Path, failed: tuple[Path, PrepareReport], tmp_path: Path
) -> None:
    """Would catch verdicts that are final, samples doubled or at other places, and good sources converted once more."""
    shards = tmp_path / "shards"
    shutil.copytree(failed[0], shards)
    before = contents(shards)
    assert run(mixed, shards).converted_now == 0 and contents(shards) == before, "only where it is asked for"
    report = run(mixed, shards, retry=True)
    assert (report.retried, report.recovered, report.converted_now, report.written) == (3, 2, 3, 16)  # the third is text
    changed = {name for name, data in contents(shards).items() if data != before.get(name)}
    assert report.rewritten == len([name for name in changed if name.endswith(".tar")]) in (1, 2)
    assert contents(shards) == contents(prepared)
    stood = {path: path.stat().st_mtime_ns for path in shards.glob("shard-*")}
    again = run(mixed, shards, retry=True)
    assert (again.retried, again.recovered, again.rewritten) == (1, 0, 0) and contents(shards) == contents(prepared)
    assert stood == {path: path.stat().st_mtime_ns for path in shards.glob("shard-*")}


def test_what_could_not_be_reached_is_tried_again(mixed: Path, prepared: Path, tmp_path: Path) -> None:
    """Red if sources on a disk that was away are lost for ever, or finished shards are done again when it is away later."""
    source, shards = tmp_path / "videos", tmp_path / "shards"
    shutil.copytree(mixed, source)
    os.rename(source / "moo", tmp_path / "disk")
    (source / "moo").mkdir()
    for path in sorted((tmp_path / "disk").iterdir()):
        (source / "moo" / path.name).symlink_to(tmp_path / "mounted" / path.name)
    assert run(source, shards).skipped["unreadable"] == 6  # five that are away, and one that is text
    os.rename(tmp_path / "disk", tmp_path / "mounted")
    before = contents(shards)
    told = io.StringIO()
    assert prepare(source, shards, SMALL, console=Console(file=told)).converted_now == 0 and contents(shards) == before
    assert "6 sources skipped before, such as 'moo/" in told.getvalue() and "--retry tries again" in told.getvalue()
    report = run(source, shards, retry=True)
    assert (report.retried, report.recovered) == (6, 5)
    assert contents(shards) == contents(prepared)
    os.rename(tmp_path / "mounted", tmp_path / "disk")
    assert run(source, shards).converted_now == 0 and contents(shards) == contents(prepared)


def test_a_source_that_was_mended_is_tried_again(mixed: Path, prepared: Path, tmp_path: Path) -> None:
    """Red if one file that is downloaded again costs all shards, or its new content is never looked at."""
    source, shards = tmp_path / "videos", tmp_path / "shards"
    shutil.copytree(mixed, source)
    for name in ("bark/1.mkv", "purr/2.mkv"):
        shutil.copyfile(source / "bark" / "mute.mkv", source / name)
    assert run(source, shards).skipped["no_audio"] == 3
    before = contents(shards)
    for name in ("bark/1.mkv", "purr/2.mkv"):
        shutil.copyfile(mixed / name, source / name)
    assert run(source, shards).converted_now == 0 and contents(shards) == before
    report = run(source, shards, retry=True)
    assert (report.retried, report.recovered, report.skipped["no_audio"]) == (3, 2, 1)  # the third is text, unreadable
    assert contents(shards) == contents(prepared)


def test_a_source_whose_sample_stands_must_not_change(mixed: Path, prepared: Path, tmp_path: Path) -> None:
    """Red if a shard goes on standing for what its source no longer is, or the user is not told which it is and the way out."""
    source, shards = tmp_path / "videos", tmp_path / "shards"
    shutil.copytree(mixed, source)
    shutil.copytree(prepared, shards)
    with open(source / "moo" / "2.mkv", "ab") as file:
        file.write(b"longer")
    for retry in (False, True):
        with pytest.raises(
            UserError, match=r"moo/2.mkv has \d+ bytes, and had \d+ when its sample in .* was made; restore"
        ) as told:
            run(source, shards, retry=retry)
        assert contents(shards) == contents(prepared)
    (shards / str(told.value).split("delete ")[1].split(" there")[0]).unlink()
    assert run(source, shards).converted_now == 3
    assert run(source, shards).converted_now == 0


FULL = """
import os, resource, signal, sys
if "xkd_fast.data.workers" in " ".join(sys.orig_argv):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (9 * 2**19, 9 * 2**19))
"""


@pytest.mark.parametrize("codec", ["yuv", "mjpeg", "h264", "vp9", "mosaic"])
def test_a_disk_that_is_full_for_a_worker_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, codec: str) -> None:
    """Red if a long film is listed as unreadable, and the set declared whole, where its stream could not be stored."""
    for folder in ("hooks", "videos/a"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "hooks" / "sitecustomize.py").write_text(FULL)
    pictures = np.random.default_rng(0).integers(0, 256, (120, 240, 320, 3), np.uint8)
    write_video(tmp_path / "videos" / "a" / "noise.mkv", list(pictures), sound=noise(4.8), codecs=("ffv1", "flac"))
    best = {"yuv": None, "mjpeg": 2, "h264": 0, "vp9": 0, "mosaic": 2}[codec]
    options = PrepareOptions(codec=codec, fps=25, short_side=240, quality=best, workers=1)  # type: ignore[arg-type]
    with monkeypatch.context() as patch:
        patch.setenv("PYTHONPATH", str(tmp_path / "hooks"))
        with pytest.raises(UserError, match=r"preparing .*shards failed: File too large .*mend that, then call again"):
            run(tmp_path / "videos", tmp_path / "shards", options)
    assert not (tmp_path / "shards" / MANIFEST).exists()
    assert run(tmp_path / "videos", tmp_path / "shards", options).written == 1


RETRY = """
import os, signal, sys
from pathlib import Path
from xkd_fast.data.prepare import PrepareOptions, prepare
left = int(sys.argv[3])
def deadly(function):
    def call(*given, **named):
        global left
        left -= 1
        if left < 0: os.kill(os.getpid(), signal.SIGKILL)
        return function(*given, **named)
    return call
os.replace, Path.unlink = deadly(os.replace), deadly(Path.unlink)
options = PrepareOptions(codec="mjpeg", short_side=16, samples_per_shard=3, workers=1)
prepare(sys.argv[1], sys.argv[2], options, retry=True)
"""


@pytest.mark.parametrize("step", [4, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_while_trying_again_it_ends_with_the_same_files(
    mixed: Path, prepared: Path, failed: tuple[Path, PrepareReport], tmp_path: Path, step: int
) -> None:
    """Would catch a finished shard lost between two files of it, and a manifest of shards that are no longer those."""
    for moment in range(0, 20, step):
        shards = tmp_path / f"{moment}"
        shutil.copytree(failed[0], shards)
        code = subprocess.run([sys.executable, "-c", RETRY, mixed, shards, str(moment)], stdout=subprocess.DEVNULL).returncode
        if code == 0:
            break
        assert code == -signal.SIGKILL
        if (shards / MANIFEST).exists():  # nothing was changed yet, or all was
            assert not any(map(ShardSet.open(shards).damage, range(len(ShardSet.open(shards)))))
        run(mixed, shards)
        assert len(report_rows(shards)) == 20
        run(mixed, shards, retry=True)
        assert contents(shards) == contents(prepared)
    assert 5 < moment < 17 and contents(shards) == contents(prepared)


def test_a_damaged_sample_is_not_copied(
    mixed: Path, failed: tuple[Path, PrepareReport], prepared: Path, tmp_path: Path
) -> None:
    """Would catch bytes that are no longer those that were written given a new checksum."""
    shards = tmp_path / "shards"
    shutil.copytree(failed[0], shards)
    tar = shards / shard_with(shards, "moo/3.mkv")
    good = tar.read_bytes()
    tar.write_bytes(good[:600] + bytes([good[600] ^ 1]) + good[601:])
    with pytest.raises(UserError, match=r"shard-\d+\.tar, sample \d+, is damaged; delete this \.tar file"):
        run(mixed, shards, retry=True)
    tar.unlink()
    run(mixed, shards, retry=True)
    assert contents(shards) == contents(prepared)


def shard_with(shards: Path, source: str) -> str:
    """The name of the tar that a source belongs to."""
    for path in shards.glob("*.index.json"):
        if any(row["source"] == source for row in json.loads(path.read_text())["report"]):
            return path.name.replace(".index.json", ".tar")
    raise AssertionError(source)


# ------------------------------------------------------------------------------------------------------------- stopped


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_stopped_by_a_signal_it_says_what_stands(
    mixed: Path, prepared: Path, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    """Would catch an end without a word, with a traceback, or with workers left behind."""
    shards = tmp_path / "shards"
    words = ["prepare", str(mixed), str(shards), "--codec", "mjpeg", "--short-side", "16", "--samples-per-shard", "3"]
    program = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); from xkd_fast.cli import main; "
    command = [sys.executable, "-c", program + "sys.exit(main())", *words, "--workers", "1"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not (shards / "shard-000001.index.json").exists():
        assert process.poll() is None
        time.sleep(0.0005)
    workers = psutil.Process(process.pid).children()
    process.send_signal(number)
    _, told = process.communicate()
    assert process.returncode == code
    standing = len(list(shards.glob("*.index.json")))
    samples = sum(len(json.loads(path.read_text())["samples"]) for path in shards.glob("*.index.json"))
    words_of_it = f"stopped by {number.name}: {samples} samples in {standing} shards stand in {shards}; the same command again"
    assert words_of_it in told and "Traceback" not in told
    assert not psutil.wait_procs(workers, timeout=5)[1] and not list(shards.glob(".*"))
    run(mixed, shards)
    assert contents(shards) == contents(prepared)
