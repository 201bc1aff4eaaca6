"""Shards: what goes in comes out to the byte, and whatever is damaged is named."""

from __future__ import annotations

import json
import os
import random
import re
import tarfile
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xkd_fast.data import storage
from xkd_fast.data.shards import FORMAT, MANIFEST, CorruptSampleError, NewSample, ShardSet, ShardWriter, index_path
from xkd_fast.errors import UserError
from xkd_fast.files import write_aside

CLASSES = ["bounce", "flash", "orbit"]


def make_sample(number: int, key: str | None = None, video: int = 700, audio: int = 300) -> NewSample:
    """A sample of random bytes."""
    rng = random.Random(number)
    return NewSample(
        key=key or f"{number:08d}",
        label=number % 4 - 1,
        video=rng.randbytes(video + number),
        audio=rng.randbytes(audio + number),
        frames=10 + number,
        samples=1000 + number,
        height=20 + number,
        width=30 + number,
        details={"source": f"ö/{number}.mp4", "duration": 1.5},
    )


def write_set(path: Path, shards: list[list[NewSample]], codec: str = "mjpeg", **manifest: Any) -> Path:
    """A shard directory as prepare writes it; ``manifest`` replaces what its manifest says."""
    path.mkdir(parents=True)
    entries = []
    for number, samples in enumerate(shards):
        writer = ShardWriter(path, f"shard-{number:06d}", codec)
        for sample in samples:
            writer.add(sample)
        writer.close()
        entries.append(
            {
                "name": writer.path.name,
                "samples": len(samples),
                "bytes": writer.path.stat().st_size,
                "index_crc32": zlib.crc32(index_path(writer.path).read_bytes()),
            }
        )
    usual = {"format": FORMAT, "codec": codec, "fps": 8.0, "sample_rate": 16000, "classes": CLASSES, "shards": entries}
    (path / MANIFEST).write_text(json.dumps({**usual, **manifest}))
    return path


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return write_set(tmp_path / "shards", [[make_sample(0), make_sample(1), make_sample(2)], [], [make_sample(3)]])


SAMPLES = [make_sample(number) for number in range(4)]


def test_what_went_in_comes_out(directory: Path) -> None:
    """Would catch a byte range that is off, a column swapped for another, and an empty shard that shifts the numbers."""
    shards = ShardSet.open(str(directory))
    assert len(shards) == 4
    assert (shards.codec, shards.fps, shards.sample_rate, shards.classes) == ("mjpeg", 8.0, 16000, CLASSES)
    assert shards.labels.dtype == np.int64 and shards.labels.tolist() == [-1, 0, 1, 2]
    for index, sample in enumerate(SAMPLES):
        read = shards.read(index)
        assert (read.key, read.label) == (sample.key, sample.label)
        assert read.video.dtype == read.audio.dtype == np.uint8
        assert (read.video.tobytes(), read.audio.tobytes()) == (sample.video, sample.audio)
        record = shards.record(index)
        numbers = (record.key, record.label, record.frames, record.samples, record.height, record.width)
        assert numbers == (sample.key, sample.label, sample.frames, sample.samples, sample.height, sample.width)
        columns = (shards.frames, shards.samples, shards.heights, shards.widths)
        assert tuple(int(column[index]) for column in columns) == numbers[2:]
        details = shards.details(index)
        assert details["source"] == f"ö/{index}.mp4" and details["label"] == sample.label and details["frames"] == 10 + index
    assert record.shard == str(directory / "shard-000002.tar")
    assert not any(shards.damage(index) for index in range(len(shards)))


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.binary(max_size=1500), st.binary(max_size=1500)), min_size=1, max_size=5))
def test_any_bytes(tmp_path_factory: pytest.TempPathFactory, contents: list[tuple[bytes, bytes]]) -> None:
    """Would catch sizes at the edges of the tar's blocks (0, 512, 1024) that shift what follows."""
    samples = [NewSample(f"{n}", -1, video, audio, 1, 1, 2, 2) for n, (video, audio) in enumerate(contents)]
    shards = ShardSet.open(write_set(tmp_path_factory.mktemp("any") / "shards", [samples]))
    read = [shards.read(index) for index in range(len(shards))]
    assert [(sample.video.tobytes(), sample.audio.tobytes()) for sample in read] == contents


@pytest.mark.parametrize(
    ("codec", "suffix"), [("mjpeg", "avi"), ("h264", "mp4"), ("vp9", "webm"), ("mosaic", "mosaic"), ("yuv", "yuv")]
)
def test_the_tar_is_one_that_webdataset_readers_stream(tmp_path: Path, codec: str, suffix: str) -> None:
    """Would catch members out of order (a streaming reader groups neighbours by key) and names with a stray dot or folder."""
    path = write_set(tmp_path / "shards", [SAMPLES[:2]], codec)
    with tarfile.open(path / "shard-000000.tar", "r|") as tar:  # a stream: no seeking back
        members = {member.name: tar.extractfile(member).read() for member in tar if member.isfile()}  # type: ignore[union-attr]
    assert list(members) == [f"0000000{number}.{ending}" for number in (0, 1) for ending in (suffix, "flac", "json")]
    for sample in SAMPLES[:2]:
        assert members[f"{sample.key}.{suffix}"] == sample.video and members[f"{sample.key}.flac"] == sample.audio
        details = json.loads(members[f"{sample.key}.json"])
        assert details["key"] == sample.key and details["duration"] == 1.5 and details["samples"] == sample.samples


def test_a_shard_depends_on_its_samples_alone(tmp_path: Path) -> None:
    """Would catch a time of writing or a user's name in the tar: runs could not be compared byte by byte."""
    first, second = (write_set(tmp_path / name, [SAMPLES]) for name in ("first", "second"))
    for name in ("shard-000000.tar", "shard-000000.index.json"):
        assert (first / name).read_bytes() == (second / name).read_bytes()


def test_nothing_counts_before_it_is_closed(tmp_path: Path) -> None:
    """Would catch half a shard under its final name after a kill, and remains of one that was given up."""
    writer = ShardWriter(tmp_path, "shard-000000", "mjpeg")
    writer.add(SAMPLES[0])
    assert [entry.name for entry in tmp_path.iterdir()] == [".shard-000000.tar.partial"]
    writer.abandon()
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Would catch a manifest cut short by a full disk in place of the good one."""
    write_aside(tmp_path / "file", b"old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_aside(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"old"


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    """Would catch a file written in the place of the link that named it, and what it named left as it was."""
    (tmp_path / "far").mkdir()
    (tmp_path / "link").symlink_to("far/file")
    for data in (b"old", b"new"):
        write_aside(tmp_path / "link", data)
        assert (tmp_path / "link").is_symlink() and (tmp_path / "far" / "file").read_bytes() == data
    assert [path.name for path in (tmp_path / "far").iterdir()] == ["file"]


# ------------------------------------------------------------------------------------------------------------------ damage


@pytest.mark.parametrize("part", ["video", "audio", "json"])
def test_a_flipped_byte_is_named(directory: Path, part: str) -> None:
    """Would catch rot on a disk that trains on noise, or a message that leaves the user to search for the file."""
    tar = directory / "shard-000000.tar"
    offset, size, crc = json.loads(index_path(tar).read_text())["samples"][1][part]
    data = bytearray(tar.read_bytes())
    data[offset + size // 2] ^= 1
    tar.write_bytes(data)
    actual = zlib.crc32(data[offset : offset + size])
    words = rf"{re.escape(str(tar))}, sample 00000001, {part}: {size} of {size} bytes, CRC {actual:08x} where {crc:08x} was"
    shards = ShardSet.open(directory)
    with pytest.raises(CorruptSampleError, match=words):
        shards.details(1) if part == "json" else shards.read(1)
    (found,) = [error for index in range(len(shards)) for error in shards.damage(index)]
    assert re.search(words, str(found))
    assert shards.read(0).video.tobytes() == SAMPLES[0].video and shards.read(2).video.tobytes() == SAMPLES[2].video


def test_a_tar_that_shrinks_while_it_is_in_use_is_named(directory: Path) -> None:
    """Would catch a short read handed on as a whole sample."""
    shards = ShardSet.open(directory)
    with open(directory / "shard-000000.tar", "r+b") as file:
        file.truncate(1000)
    with pytest.raises(CorruptSampleError, match=r"shard-000000\.tar, sample 00000000, video: 488 of 700 bytes"):
        shards.read(0)
    assert [len(shards.damage(index)) for index in range(3)] == [3, 3, 3]


def test_a_tar_that_is_gone_is_named(directory: Path) -> None:
    """Would catch a bare FileNotFoundError hours into a run."""
    shards = ShardSet.open(directory)
    (directory / "shard-000002.tar").unlink()
    with pytest.raises(UserError, match=r"shard-000002\.tar cannot be opened"):
        shards.read(3)


def edit(name: str, change: Callable[[dict[str, Any]], Any], *, resign: bool = False) -> Callable[[Path], None]:
    """A change of one of a directory's JSON files; ``resign``: the manifest is made to agree with it."""

    def apply(directory: Path) -> None:
        content = json.loads((directory / name).read_text())
        change(content)
        data = json.dumps(content).encode()
        (directory / name).write_bytes(data)
        if resign:
            manifest = json.loads((directory / MANIFEST).read_text())
            manifest["shards"][0]["index_crc32"] = zlib.crc32(data)
            (directory / MANIFEST).write_text(json.dumps(manifest))

    return apply


def truncate(name: str, size: int) -> Callable[[Path], None]:
    return lambda directory: os.truncate(directory / name, size)


def remove(name: str) -> Callable[[Path], None]:
    return lambda directory: (directory / name).unlink()


INDEX = "shard-000000.index.json"


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (remove(MANIFEST), "is no shard set: it has no manifest.json. Make one with `xkd-fast prepare"),
        (truncate(MANIFEST, 100), "manifest.json, the manifest of a shard set, cannot be read: .*; copy or prepare the shards"),
        (lambda directory: (directory / MANIFEST).write_bytes(b"\xff{}"), "manifest.json.* cannot be read: .*; copy or"),
        (lambda directory: (directory / MANIFEST).write_text("[]"), "does not hold a JSON object; copy or prepare the shards"),
        (edit(MANIFEST, lambda manifest: manifest.update(format=99)), "has format 99; this version reads format 1"),
        (edit(MANIFEST, lambda manifest: manifest.pop("format")), "has format None; this version reads format 1"),
        (edit(MANIFEST, lambda manifest: manifest.pop("fps")), "manifest or index is damaged .KeyError: 'fps'"),
        (edit(MANIFEST, lambda manifest: manifest.update(fps="eight")), "manifest or index is damaged"),
        (edit(MANIFEST, lambda manifest: manifest.update(classes=None)), "manifest or index is damaged"),
        (edit(MANIFEST, lambda manifest: manifest.update(shards=[3])), "manifest or index is damaged"),
        (truncate("shard-000000.tar", 3000), r"shard-000000.tar has 3000 bytes, but its manifest says \d+ bytes"),
        (remove("shard-000002.tar"), "shard-000002.tar is missing, but its manifest says"),
        (remove(INDEX), f"{INDEX}, the index of a shard, cannot be read: No such file"),
        (truncate(INDEX, 100), f"{INDEX}, the index of a shard, is not the one that its manifest was written for"),
        (edit(INDEX, lambda index: index["samples"][0].update(label=1)), "is not the one that its manifest was written for"),
        (edit(INDEX, lambda index: index["samples"].pop(), resign=True), "lists 2 samples, the manifest 3"),
        (edit(INDEX, lambda index: index["samples"][0].update(label=3), resign=True), "has label 3 of 3 classes"),
        (edit(INDEX, lambda index: index["samples"][0].update(label=-2), resign=True), "has label -2 of 3 classes"),
        (edit(INDEX, lambda index: index["samples"][0].pop("video"), resign=True), "is damaged .KeyError: 'video'"),
        (edit(INDEX, lambda index: index["samples"][0].update(video=[1, 2]), resign=True), "is damaged"),
        (edit(INDEX, lambda index: index["samples"][0].update(video=[512, 1 << 40, 0]), resign=True), "lies outside the tar"),
        (edit(INDEX, lambda index: index["samples"][0].update(frames=1 << 80), resign=True), "is damaged .OverflowError"),
    ],
)
def test_a_damaged_set_is_refused_when_it_is_opened(directory: Path, damage: Callable[[Path], Any], words: str) -> None:
    """Would catch a half-copied or foreign folder that fails an epoch later, with a traceback, or not at all."""
    damage(directory)
    with pytest.raises(UserError, match=words) as caught:
        ShardSet.open(directory)
    assert str(directory) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [("fps", 4.0, "fps 4.0, .* has 8.0"), ("sample_rate", 8000, "sample_rate 8000, .* has 16000"), ("codec", "h264", "codec")],
)
def test_sets_that_do_not_go_together_are_refused(tmp_path: Path, name: str, value: Any, words: str) -> None:
    """Would catch clips of another speed or pitch mixed into the rest."""
    first = write_set(tmp_path / "first", [[make_sample(0)]])
    other = write_set(tmp_path / "other", [[make_sample(1)]], **{name: value})
    with pytest.raises(UserError, match=words) as caught:
        ShardSet.open([first, other])
    assert str(other) in str(caught.value) and "must agree" in str(caught.value)


def test_a_file_is_no_shard_set(tmp_path: Path) -> None:
    """Would catch the advice to make shards in a place that is a file."""
    (tmp_path / "videos.tar").touch()
    with pytest.raises(UserError, match=r"videos\.tar is a file; name a folder of shards"):
        ShardSet.open(tmp_path / "videos.tar")


def test_no_directory_is_refused() -> None:
    """Would catch an empty list taken for an empty data set."""
    with pytest.raises(UserError, match="no shard directory is named"):
        ShardSet.open([])


# ----------------------------------------------------------------------------------------------------- several directories


def test_labels_of_several_sets_are_of_one_list(tmp_path: Path) -> None:
    """Would catch classes mixed up because two folders number them differently, and unlabelled samples given a class."""
    numbers = range(4)  # labels -1, 0, 1, 2
    lists = {"first": ["flash", "orbit", "slide"], "second": ["bounce", "flash", "zoom"], "third": ["orbit", "pulse", "slide"]}
    paths = [
        write_set(tmp_path / name, [[make_sample(n, f"{name}{n}") for n in numbers]], classes=classes)
        for name, classes in lists.items()
    ]
    shards = ShardSet.open(paths)
    assert shards.classes == ["bounce", "flash", "orbit", "pulse", "slide", "zoom"]
    for index in range(len(shards)):
        key = shards.keys[index]
        own = make_sample(int(key[-1])).label
        expected = -1 if own < 0 else shards.classes.index(lists[key[:-1]][own])
        assert shards.labels[index] == shards.read(index).label == shards.record(index).label == expected
        assert shards.read(index).video.tobytes() == make_sample(int(key[-1])).video
        assert Path(shards.record(index).shard).parent.name == key[:-1]
    alone = ShardSet.open(paths[1])
    assert alone.classes == lists["second"] and alone.labels.tolist() == [-1, 0, 1, 2]


def open_descriptors(directory: Path) -> int:
    """How many files of a folder this process has open."""

    def target(name: str) -> str:
        try:
            return os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:  # closed by another thread in the meantime
            return ""

    return sum(target(name).startswith(str(directory)) for name in os.listdir("/proc/self/fd"))


def read_from_threads(path: Path, wanted: list[int], threads: int) -> tuple[bool, int, int]:
    """Whether every sample came as it was written, and how many files were open at most, and afterwards."""
    shards = ShardSet.open(path)
    most = 0

    def check(index: int) -> bool:
        nonlocal most
        read = shards.read(index)
        if index == 0:
            most = max(most, open_descriptors(path))
        expected = make_sample(index, video=20000 if index % 2 == 0 else 700)
        return read.video.tobytes() == expected.video and read.audio.tobytes() == expected.audio

    with ThreadPoolExecutor(threads) as pool:
        right = all(pool.map(check, wanted))
    return right, most, open_descriptors(path)


def test_what_the_system_gives_in_pieces_is_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Red if a stream longer than one read may be, on Linux 2 GiB, counts as damaged."""
    (tmp_path / "file").write_bytes(bytes(range(100)))
    read, asked = os.pread, []

    def short(descriptor: int, size: int, offset: int) -> bytes:
        asked.append(size)
        return read(descriptor, min(size, 30), offset)

    monkeypatch.setattr(os, "pread", short)
    file = storage.OpenFiles().get(tmp_path / "file")
    assert file.read(5, 80) == bytes(range(5, 85)) and asked == [80, 50, 20]
    assert file.read(90, 80) == bytes(range(90, 100)) and file.read(100, 5) == b""


def test_an_address_of_another_kind_is_refused() -> None:
    """Red if it is taken for a folder of that name, and the user is told to prepare it."""
    with pytest.raises(UserError, match=r"s3://bucket/shards is no place of shards.* name the https address of the store"):
        ShardSet.open("s3://bucket/shards")


def test_reading_from_threads_with_few_files_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Would catch a file closed, or its place moved, under another thread's read, and descriptors that run out."""
    monkeypatch.setattr(storage, "MAX_OPEN_FILES", 3)
    path = write_set(tmp_path / "shards", [[make_sample(2 * n, video=20000), make_sample(2 * n + 1)] for n in range(12)])
    right, most, afterwards = read_from_threads(path, random.Random(1).choices(range(24), k=2000), threads=6)
    assert right
    assert 3 <= most <= 3 + 6 and afterwards == 3
    assert open_descriptors(path) == 0, "descriptors outlive their set"


def test_sets_of_earlier_versions_are_the_same_data(tmp_path: Path) -> None:
    """Red if usual samples are indexed otherwise than before labels could be several, or resuming takes them for other data."""
    path = write_set(tmp_path / "shards", [SAMPLES[:2], SAMPLES[2:]])
    (first, *_) = json.loads(index_path(path / "shard-000000.tar").read_text())["samples"]
    assert list(first) == ["key", "label", "frames", "samples", "height", "width", "video", "audio", "json"]
    shards = ShardSet.open(path)
    assert shards.crc32 == 3959439251
    assert shards.label_sets == [(), (0,), (1,), (2,)] and not shards.multi_label
    assert shards.has_video.all() and shards.has_audio.all()


def test_several_labels_and_absent_parts(tmp_path: Path) -> None:
    """Red if labels are not moved with their classes where sets are used together, or nobody hears that labels have changed."""
    both = {"frames": 8, "samples": 100, "height": 2, "width": 2}
    several = NewSample("a", -1, b"v", b"a", **both, labels=(0, 2))
    mute = NewSample("b", 1, b"v", None, **{**both, "samples": 0})
    blind = NewSample("c", 1, None, b"a", 0, 100, 0, 0)
    first = write_set(tmp_path / "first", [[several, mute, blind]], classes=["x", "c", "b"])
    second = write_set(tmp_path / "second", [[blind, several]], classes=["a", "b", "c"])
    alone = ShardSet.open(first)
    assert alone.classes == ["x", "c", "b"] and alone.label_sets == [(0, 2), (1,), (1,)]
    together = ShardSet.open([first, second])
    assert together.classes == ["a", "b", "c", "x"]
    assert together.label_sets == [(1, 3), (2,), (2,), (1,), (0, 2)] and together.labels.tolist() == [-1, 2, 2, 1, -1]
    assert together.has_video.tolist() == [True, True, False, False, True]
    assert together.has_audio.tolist() == [True, False, True, True, True]
    assert together.read(1).audio.size == 0 and together.read(2).video.size == 0 and not any(map(together.damage, range(5)))
    other = write_set(
        tmp_path / "other", [[NewSample("a", -1, b"v", b"a", **both, labels=(0, 1)), mute, blind]], classes=["x", "c", "b"]
    )
    assert ShardSet.open(other).crc32 != alone.crc32


@pytest.mark.parametrize("labels", [[0, 3], [-1, 0]])
def test_labels_beyond_the_classes_are_damage(tmp_path: Path, labels: list[int]) -> None:
    """Red if a label that names no class is taken for the last one, as a negative place in a list would be."""
    sample = NewSample("a", -1, b"v", b"a", 8, 100, 2, 2, labels=tuple(labels))
    with pytest.raises(UserError, match=r"has labels .* of 3 classes"):
        ShardSet.open(write_set(tmp_path / "shards", [[sample]]))
