"""The local cache of shards: never above its limit, one download however many want it, nothing stale or damaged handed out."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO

import pytest

from tests.data.http_server import Handler, Server, serving
from tests.data.test_shards import make_sample, write_set
from xkd_fast.data import http_folder
from xkd_fast.data.http_folder import RemoteOptions
from xkd_fast.data.shard_cache import CacheOptions, ShardCache
from xkd_fast.data.shards import ShardSet
from xkd_fast.errors import UserError

QUICK = RemoteOptions(timeout=2.0, attempts=3)
SHARDS, PER_SHARD = 6, 4
SAMPLES = [make_sample(number) for number in range(SHARDS * PER_SHARD)]
SIZE = 20480  # of each tar


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(http_folder, "FIRST_PAUSE", 0.01)
    write_set(tmp_path / "set", [SAMPLES[first : first + PER_SHARD] for first in range(0, len(SAMPLES), PER_SHARD)])
    assert {tar.stat().st_size for tar in (tmp_path / "set").glob("*.tar")} == {SIZE}
    with serving(tmp_path) as running:
        yield running


def open_set(server: Server, folder: Path, shards: float = 100) -> ShardSet:
    """The served set with a cache that holds so many shards."""
    cache = CacheOptions(str(folder), shards * SIZE / 2**30)
    return ShardSet.open(f"{server.url}/set", remote=QUICK, cache=cache)


def is_right(shards: ShardSet, index: int) -> bool:
    read = shards.read(index)
    return (read.video.tobytes(), read.audio.tobytes()) == (SAMPLES[index].video, SAMPLES[index].audio)


def copies(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.tar"), key=lambda path: path.stat().st_mtime_ns)


def test_a_shard_comes_once(server: Server, tmp_path: Path) -> None:
    """Red if samples of a shard that is kept still go over the network, in this set or in one opened later; if threads that
    want a shard at the same time fetch it twice; or if anything but whole copies is left over."""
    shards = open_set(server, tmp_path / "cache")
    server.delay = 0.02
    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(lambda index: is_right(shards, index), [*range(len(SAMPLES))] * 2))
    assert server.asked(".tar") == [""] * SHARDS
    assert all(is_right(open_set(server, tmp_path / "cache"), index) for index in (0, 9, 20))
    assert len(server.asked(".tar")) == SHARDS
    assert {path.name for path in (tmp_path / "cache").iterdir()} == {
        ".lock",
        *(path.name for path in copies(tmp_path / "cache")),
    }
    assert [path.stat().st_size for path in copies(tmp_path / "cache")] == [SIZE] * SHARDS


def test_a_server_without_ranges_will_do(server: Server, tmp_path: Path) -> None:
    """Red if whole shards are not asked for as wholes, which every server can send."""
    server.ranges = False
    shards = open_set(server, tmp_path / "cache")
    assert all(is_right(shards, index) for index in range(len(SAMPLES)))


def test_what_does_not_fit_is_read_where_it_is(server: Server, tmp_path: Path) -> None:
    """Red if shards drive each other out of a cache that is too small for them, so that every sample costs a download."""
    shards = open_set(server, tmp_path / "cache", 2.5)
    for _ in range(2):
        assert all(is_right(shards, index) for index in reversed(range(len(SAMPLES))))
    assert server.asked(".tar").count("") == 2, "two shards fit, and come once"
    assert len(server.asked(".tar")) == 2 + 2 * 4 * PER_SHARD
    assert len(copies(tmp_path / "cache")) == 2


def test_a_download_goes_on_where_it_broke(server: Server, tmp_path: Path) -> None:
    """Red if a connection that breaks near the end of a gigabyte costs all of it, or what came is taken for the whole."""
    left = [2]

    def break_off(handler: Handler) -> bool:
        if ".tar" not in handler.path or not left[0]:
            return False
        left[0] -= 1
        data = (server.folder / "set" / "shard-000000.tar").read_bytes()
        start = int((handler.headers.get("Range") or "bytes=0-").removeprefix("bytes=").rstrip("-"))
        handler.send_response(206 if start else 200)
        handler.send_header("Content-Length", str(SIZE - start))
        handler.send_header("Content-Range", f"bytes {start}-{SIZE - 1}/{SIZE}")
        handler.end_headers()
        handler.wfile.write(data[start : start + 8000])
        handler.close_connection = True
        return True

    server.misbehave = break_off
    assert is_right(open_set(server, tmp_path / "cache"), 0)
    assert server.asked(".tar") == ["", "bytes=8000-", "bytes=16000-"]


@pytest.mark.parametrize("damage", ["flip", "cut", "empty"])
def test_a_damaged_copy_is_fetched_anew(server: Server, tmp_path: Path, damage: str) -> None:
    """Red if rot on the local disk counts as damage of the data set, or the damaged copy is kept."""
    shards = open_set(server, tmp_path / "cache")
    assert is_right(shards, 0)
    (copy,) = copies(tmp_path / "cache")
    data = bytearray(copy.read_bytes())
    data[600] ^= 1
    copy.write_bytes({"flip": data, "cut": data[:700], "empty": b""}[damage])
    assert is_right(shards, 0), "from the server"
    assert is_right(shards, 0), "from the new copy"
    assert server.asked(".tar").count("") == 2
    assert copies(tmp_path / "cache")[0].read_bytes() == (server.folder / "set" / "shard-000000.tar").read_bytes()


def test_a_set_that_has_changed_is_not_read_from_old_copies(server: Server, tmp_path: Path) -> None:
    """Red if a set that was prepared again under the same names gets the samples of the old one."""
    assert is_right(open_set(server, tmp_path / "cache", 1), 0)
    (tmp_path / "set").rename(tmp_path / "old")
    write_set(tmp_path / "set", [[make_sample(50), *SAMPLES[1:4]]])
    shards = open_set(server, tmp_path / "cache", 1.2)
    assert shards.read(0).video.tobytes() == make_sample(50).video
    assert len(copies(tmp_path / "cache")) == 1, "the old copy made room"


def fill(size: int) -> Callable[[IO[bytes]], None]:
    def copy(file: IO[bytes]) -> None:
        file.write(b"x" * size)

    return copy


def digest(number: int) -> str:
    return f"{number:032x}"


def test_the_one_used_longest_ago_makes_room(tmp_path: Path) -> None:
    """Red if a copy in use goes before one that nobody wants, if another's file is removed, or the limit is passed."""
    cache = ShardCache(tmp_path / "cache", 300)
    (tmp_path / "cache" / "notes.tar").write_bytes(b"mine" * 100)
    for number in range(3):
        assert cache.bring(digest(number), 100, fill(100))
        time.sleep(0.01)
    assert cache.read(digest(0), 98, 9) == b"xx"
    assert cache.bring(digest(3), 150, fill(150))
    assert [cache.read(digest(number), 0, 1) for number in range(4)] == [b"x", None, None, b"x"]
    assert not cache.bring(digest(4), 301, fill(301)) and cache.read(digest(0), 0, 1) == b"x"
    assert (tmp_path / "cache" / "notes.tar").exists()
    ShardCache(tmp_path / "cache", 100)  # lowered
    assert {path.name for path in copies(tmp_path / "cache")} == {f"{digest(0)}.tar", "notes.tar"}


def test_copies_in_the_making_count(tmp_path: Path) -> None:
    """Red if several downloads at once pass the limit together, or a part that a killed process left counts for ever."""
    cache = ShardCache(tmp_path / "cache", 250)
    going, finish = threading.Event(), threading.Event()

    def slow(file: IO[bytes]) -> None:
        going.set()
        assert finish.wait(20)
        file.write(b"x" * 200)

    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(cache.bring, digest(0), 200, slow)
        assert going.wait(20)
        assert not cache.bring(digest(1), 100, fill(100)), "no room beside the one that is coming"
        finish.set()
        assert first.result()
    orphan = tmp_path / "cache" / f".{digest(7)}.tar.partial"
    orphan.write_bytes(b"y" * 240)
    assert cache.bring(digest(1), 100, fill(100)) and not orphan.exists()


def test_a_failed_download_leaves_nothing(tmp_path: Path) -> None:
    """Red if a part is left under a copy's name, or a full disk is a traceback."""
    cache = ShardCache(tmp_path / "cache", 1000)

    def fail(file: IO[bytes]) -> None:
        file.write(b"x" * 50)
        raise OSError(28, "No space left on device")

    with pytest.raises(
        UserError, match=r"data\.cache\.folder = .*cache cannot be used: No space left on device; .*data\.cache\.gib"
    ):
        cache.bring(digest(0), 100, fail)
    with pytest.raises(UserError, match="came to 50 bytes, not to 100"):
        cache.bring(digest(0), 100, fill(50))
    assert os.listdir(tmp_path / "cache") == [".lock"]
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"data\.cache\.folder = .*file cannot be used: File exists"):
        ShardCache(tmp_path / "file", 1000)


def test_whoever_meets_damage_later_leaves_the_new_copy(tmp_path: Path) -> None:
    """Red if several readers of one damaged copy remove each other's new ones, and the shard comes once for each."""
    cache = ShardCache(tmp_path, 1000)
    assert cache.bring(digest(0), 100, fill(100))
    good = cache.read(digest(0), 10, 20)
    assert good is not None
    cache.discard(digest(0), 10, good)
    assert cache.read(digest(0), 10, 20) == good
    cache.discard(digest(0), 10, good[:-1] + b"?")
    assert cache.read(digest(0), 10, 20) is None


def test_a_removal_waits_for_those_who_read_and_nobody_new_begins(tmp_path: Path) -> None:
    """Red if readers that come one after the other keep a damaged copy in use, or one loses its file while it reads."""
    cache = ShardCache(tmp_path, 1000)
    assert cache.bring(digest(0), 100, fill(100))
    with open(tmp_path / f"{digest(0)}.tar", "rb") as reader, ThreadPoolExecutor(1) as pool:
        fcntl.flock(reader, fcntl.LOCK_SH)
        removal = pool.submit(cache.discard, digest(0), 0, b"other")
        deadline = time.monotonic() + 10
        while cache.read(digest(0), 0, 100) is not None and time.monotonic() < deadline:
            time.sleep(0.01)
        assert cache.read(digest(0), 0, 100) is None and not removal.done()
        assert os.fstat(reader.fileno()).st_nlink == 1
        fcntl.flock(reader, fcntl.LOCK_UN)
        removal.result(timeout=10)
    assert os.listdir(tmp_path) == [".lock"]


def test_what_a_killed_removal_left_goes(tmp_path: Path) -> None:
    """Red if the bytes of a copy whose removal was cut off stay, beyond the limit, for ever."""
    cache = ShardCache(tmp_path, 1000)
    assert cache.bring(digest(0), 100, fill(100))
    (tmp_path / f"{digest(0)}.tar").rename(tmp_path / f".{digest(0)}.tar.removed")
    ShardCache(tmp_path, 1000)
    assert os.listdir(tmp_path) == [".lock"]


def read_all(url: str, folder: Path, shards: float, seed: int, outcomes: multiprocessing.Queue[tuple[bool, int]]) -> None:
    """A process that reads everything, and watches the folder's size meanwhile."""
    options = CacheOptions(str(folder), shards * SIZE / 2**30)
    opened, cache = ShardSet.open(url, remote=QUICK, cache=options), ShardCache(folder, options.limit)
    opened._kept = SHARDS  # as if another set's shards were wanted too: more than fit
    most, right = 0, True
    for index in [*range(len(SAMPLES))][:: 1 if seed else -1] * 2:
        right &= is_right(opened, index)
        with cache._sole():  # or a copy that goes and one that comes are both counted
            held = sum(entry.stat().st_size for entry in os.scandir(folder))
        most = max(most, held)
    outcomes.put((right, most))


@pytest.mark.parametrize("fitting", [100, 2.5])
def test_two_processes_share_a_cache(server: Server, tmp_path: Path, fitting: float) -> None:
    """Red if two ranks of a machine download a shard twice, read a part of one, lose it under their hands, wait for each other
    for ever, or pass the limit together while they drive out each other's shards."""
    context = multiprocessing.get_context("spawn")
    outcomes: multiprocessing.Queue[tuple[bool, int]] = context.Queue()
    folder = tmp_path / "cache"
    arguments = [(f"{server.url}/set", folder, fitting, seed, outcomes) for seed in (0, 1)]
    processes = [context.Process(target=read_all, args=each) for each in arguments]
    for process in processes:
        process.start()
    found = [outcomes.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(20)
        assert process.exitcode == 0
    assert all(right for right, _ in found)
    assert max(most for _, most in found) <= fitting * SIZE
    if fitting > SHARDS:
        assert server.asked(".tar") == [""] * SHARDS
