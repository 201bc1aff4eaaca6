"""Shards: tar files of encoded samples, each with an index of byte ranges and checksums beside it.

A shard set is a directory of ``manifest.json`` and, per shard, ``shard-000000.tar`` and ``shard-000000.index.json``. A tar
holds ``KEY.avi``, ``.mp4``, ``.webm``, ``.mosaic`` or ``.yuv`` (by the set's codec, `xkd_fast.data.video_codecs`), ``KEY.flac``
and ``KEY.json`` per sample, one after the other, so any reader of the WebDataset format can stream it; the index says where
each member's bytes lie, so any sample can be read alone, from any thread.

A sample without picture or without sound has no such member, and null in its place in the index. A sample of several classes
has label -1 and all their numbers as ``labels``.
"""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xkd_fast.data.http_folder import HttpFolder, RemoteOptions
from xkd_fast.data.shard_cache import TRIES, CacheOptions, ShardCache
from xkd_fast.data.spool import Payload, Stored, chunks, crc32_of, opened, size_of
from xkd_fast.data.storage import AGAIN, MANIFEST, LocalFolder, OpenFiles, Storage, is_url, require_readable
from xkd_fast.data.video_codecs import CODECS
from xkd_fast.errors import UserError
from xkd_fast.files import aside, write_aside

FORMAT = 1
PARTS = ("video", "audio", "json")
GAP = 4096  # bytes between two parts of a sample, at most, for which one read fetches both: a tar's headers and padding
INDEX_READERS = 8  # threads that fetch the indexes of a remote set


class CorruptSampleError(Exception):
    """A sample's stored bytes are not those that were written."""


@dataclass(frozen=True)
class SampleRecord:
    """What the index knows of a sample."""

    key: str
    label: int  # class number in the shard set, -1 = none or several
    frames: int
    samples: int  # of audio
    height: int  # pixels
    width: int  # pixels
    shard: str  # file name of its tar


@dataclass(frozen=True)
class EncodedSample:
    """A sample's encoded streams."""

    key: str
    label: int
    video: NDArray[np.uint8]  # bytes of a video file; none where the sample has no picture
    audio: NDArray[np.uint8]  # bytes of a FLAC file; none where it has no sound


@dataclass(frozen=True)
class NewSample:
    """A sample to be written."""

    key: str
    label: int  # -1 = none or several
    video: Payload | None  # None = no picture; then frames, height and width are 0
    audio: Payload | None  # None = no sound; then samples is 0
    frames: int
    samples: int  # of audio
    height: int
    width: int
    details: dict[str, Any] = field(default_factory=dict)  # also in KEY.json: source, class, duration, …
    labels: tuple[int, ...] = ()  # of a sample of several classes; otherwise empty


def index_path(tar: Path) -> Path:
    """Where a tar's index lies."""
    return tar.with_name(tar.name.removesuffix(".tar") + ".index.json")


class ShardWriter:
    """Writes one shard. Nothing appears under its name before :meth:`close`; the index, which makes it count, comes last."""

    def __init__(self, directory: Path, name: str, codec: str) -> None:
        """``name`` without suffix, such as ``shard-000000``."""
        self.path = directory / f"{name}.tar"
        self._aside = aside(self.path)
        self._suffixes = dict(zip(PARTS, (CODECS[codec].suffix, "flac", "json"), strict=True))
        self._file = open(self._aside, "wb")  # noqa: SIM115
        self._tar = tarfile.open(fileobj=self._file, mode="w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115
        self._rows: list[dict[str, Any]] = []

    def add(self, sample: NewSample) -> None:
        """Append a sample."""
        row: dict[str, Any] = {
            "key": sample.key,
            "label": sample.label,
            "frames": sample.frames,
            "samples": sample.samples,
            "height": sample.height,
            "width": sample.width,
        }
        if sample.labels:
            row["labels"] = list(sample.labels)
        details = json.dumps({**row, **sample.details}).encode()
        for part, data in zip(PARTS, (sample.video, sample.audio, details), strict=True):
            if data is None:
                row[part] = None
                continue
            member = tarfile.TarInfo(f"{sample.key}.{self._suffixes[part]}")
            member.size = size_of(data)
            row[part] = [self._tar.offset + tarfile.BLOCKSIZE, member.size, crc32_of(data)]
            with opened(data) as file:
                self._tar.addfile(member, file)
        self._rows.append(row)

    def close(self, extra: dict[str, Any] | None = None) -> None:
        """Finish the shard; ``extra`` goes into its index."""
        self._tar.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        size = self._file.tell()
        self._file.close()
        index_path(self.path).unlink(missing_ok=True)  # of a shard that is made again: cut off here, the new one has none
        os.replace(self._aside, self.path)
        index = {"format": FORMAT, "bytes": size, **(extra or {}), "samples": self._rows}
        write_aside(index_path(self.path), json.dumps(index).encode())

    def abandon(self) -> None:
        """Give up: remove what was written."""
        try:
            self._file.close()  # on a full disk this fails too
        except OSError:
            pass
        finally:
            self._aside.unlink(missing_ok=True)


class StandingShard:
    """A finished shard whose samples go into another one, with their bytes as they are."""

    def __init__(self, tar: Path) -> None:
        self.path = tar
        self.index = read_json(index_path(tar), "the index of a shard")
        self._rows: dict[str, dict[str, Any]] = {row["key"]: row for row in self.index["samples"]}

    def sample(self, key: str) -> NewSample:
        """A sample, which :meth:`ShardWriter.add` writes as it was written here.

        Raises:
            UserError: its bytes are not those that were written.
        """
        row, parts = self._rows[key], dict[str, Stored | None]()
        for part in PARTS:
            if row[part] is None:
                parts[part] = None
                continue
            offset, size, expected = row[part]
            stream = parts[part] = Stored(str(self.path), size, offset)
            if crc32_of(stream) != expected:
                raise UserError(f"{self.path}, sample {key}, is damaged; delete this .tar file and call prepare again")
        description = parts["json"]
        assert description is not None, "every sample has one"
        return NewSample(
            key,
            video=parts["video"],
            audio=parts["audio"],
            details=json.loads(b"".join(chunks(description))),
            labels=tuple(row.get("labels", ())),
            **{name: row[name] for name in COLUMNS},
        )


def read_json(path: Path, what: str, fix: str = AGAIN) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        UserError: naming the file and ``fix``, if it is missing, unreadable or something else.
    """
    try:
        return _parse_json(path.read_bytes(), path, what, fix)
    except OSError as error:
        raise UserError(f"{path}, {what}, cannot be read: {error.strerror}; make it readable, or {fix}") from error


def _parse_json(data: bytes, path: Path | str, what: str, fix: str) -> dict[str, Any]:
    try:
        value = json.loads(data.decode("utf-8"))
    except ValueError as error:
        raise UserError(f"{path}, {what}, cannot be read: {error}; {fix}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}, {what}, does not hold a JSON object; {fix}")
    return value


@dataclass(frozen=True)
class _Tar:
    """One shard: where its bytes are."""

    storage: Storage
    name: str
    size: int  # bytes
    digest: str  # of its index, so of all it holds

    def __str__(self) -> str:
        return self.storage.where(self.name)


@dataclass(frozen=True)
class _Table:
    """What manifest and indexes of one directory say."""

    codec: str
    fps: float
    sample_rate: int
    classes: list[str]
    keys: list[str]
    columns: dict[str, NDArray[np.int64]]  # label, frames, samples, height, width: [N]
    ranges: NDArray[np.int64]  # [N, 3 parts, (offset, size, crc)]
    several: dict[int, list[int]]  # labels of the samples that have several
    shard: NDArray[np.int64]  # [N] number of the tar
    tars: list[_Tar]


COLUMNS = ("label", "frames", "samples", "height", "width")
ABSENT = (-1, 0, 0)  # the range of a part that a sample has not


def _read_set(storage: Storage, broken: list[str] | None = None) -> _Table:
    storage.check()
    place, what = storage.where(MANIFEST), "the manifest of a shard set"
    manifest = _parse_json(storage.fetch(MANIFEST, what), place, what, AGAIN)
    if manifest.get("format") != FORMAT:
        raise UserError(
            f"{place} has format {manifest.get('format')!r}; this version reads format {FORMAT}: prepare the videos again"
        )
    try:
        if broken is not None:
            manifest["shards"] = [entry for entry in manifest["shards"] if _stands(storage, entry, broken)]
        return _read_table(storage, manifest)
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
        raise UserError(
            f"{storage.where()}: manifest or index is damaged ({type(error).__name__}: {error}); {AGAIN}"
        ) from error


def _stands(storage: Storage, entry: dict[str, Any], broken: list[str]) -> bool:
    """Whether a shard is there as the manifest says; otherwise why not is appended to ``broken``."""
    try:
        storage.expect(entry["name"], entry["bytes"])
        _read_index(storage, entry)
    except UserError as error:
        broken.append(str(error))
        return False
    return True


def _read_table(storage: Storage, manifest: dict[str, Any]) -> _Table:
    codec, fps, sample_rate = str(manifest["codec"]), float(manifest["fps"]), int(manifest["sample_rate"])
    classes = [str(name) for name in manifest["classes"]]
    keys: list[str] = []
    rows: list[list[int]] = []
    ranges: list[list[Sequence[int]]] = []
    several: dict[int, list[int]] = {}
    shard: list[int] = []
    tars: list[_Tar] = []
    for entry in manifest["shards"]:
        storage.expect(entry["name"], entry["bytes"])
    for number, (entry, (samples, digest)) in enumerate(zip(manifest["shards"], _read_indexes(storage, manifest), strict=True)):
        tar = _Tar(storage, entry["name"], entry["bytes"], digest)
        for row in samples:
            parts = [row[part] for part in PARTS]
            if parts[-1] is None or parts[:-1] == [None, None]:
                raise ValueError(f"sample {row['key']} of {tar.name} has neither picture nor sound, or no description")
            for offset, length, _ in filter(None, parts):
                if offset < 0 or length < 0 or offset + length > tar.size:
                    raise ValueError(f"sample {row['key']} of {tar.name} lies outside the tar")
            if not -1 <= row["label"] < len(classes):
                raise ValueError(f"sample {row['key']} of {tar.name} has label {row['label']} of {len(classes)} classes")
            if "labels" in row:
                if row["label"] != -1 or not all(0 <= label < len(classes) for label in row["labels"]):
                    raise ValueError(f"sample {row['key']} of {tar.name} has labels {row['labels']} of {len(classes)} classes")
                several[len(keys)] = row["labels"]
            keys.append(row["key"])
            rows.append([row[name] for name in COLUMNS])
            ranges.append([ABSENT if part is None else part for part in parts])
        shard += [number] * len(samples)
        tars.append(tar)
    columns = np.array(rows, np.int64).reshape(-1, len(COLUMNS))
    return _Table(
        codec,
        fps,
        sample_rate,
        classes,
        keys,
        {name: columns[:, place] for place, name in enumerate(COLUMNS)},
        np.array(ranges, np.int64).reshape(-1, len(PARTS), 3),
        several,
        np.array(shard, np.int64),
        tars,
    )


def _read_indexes(storage: Storage, manifest: dict[str, Any]) -> list[tuple[list[dict[str, Any]], str]]:
    """The rows of every index, and its digest."""
    entries = manifest["shards"]
    if storage.is_local:
        return [_read_index(storage, entry) for entry in entries]
    with ThreadPoolExecutor(INDEX_READERS, "indexes") as pool:
        return list(pool.map(lambda entry: _read_index(storage, entry), entries))


def _read_index(storage: Storage, entry: dict[str, Any]) -> tuple[list[dict[str, Any]], str]:
    """The rows of an index that must be the one that its manifest's entry was written for."""
    name, what = index_path(Path(entry["name"])).name, "the index of a shard"
    data, place = storage.fetch(name, what), storage.where(name)
    if zlib.crc32(data) != entry.get("index_crc32", zlib.crc32(data)):
        raise UserError(f"{place}, {what}, is not the one that its manifest was written for; {AGAIN}")
    samples: list[dict[str, Any]] = _parse_json(data, place, what, AGAIN)["samples"]
    if len(samples) != entry["samples"]:
        raise UserError(f"{place} lists {len(samples)} samples, the manifest {entry['samples']}; {AGAIN}")
    return samples, hashlib.sha256(data).hexdigest()[:32]


def shard_place(text: str) -> Path | str:
    """What a user's word for a shard set means: an address stays as it is, all else is a folder.

    Raises:
        UserError: an address that is neither http:// nor https://.
    """
    require_readable(text)
    return text if is_url(text) else Path(text)


def _storages(places: Sequence[str | os.PathLike[str]], remote: RemoteOptions) -> list[Storage]:
    files = OpenFiles()
    for place in places:
        require_readable(place)
    return [HttpFolder(str(place), remote) if is_url(place) else LocalFolder(Path(place), files) for place in places]


class ShardSet:
    """Every sample of one or several shard sets, in folders or at addresses, readable in any order and from any thread.

    Attributes:
        codec, fps, sample_rate: of all samples.
        classes: class names, in the order of their numbers: the one they were prepared with, or sorted where sets are
            used together that were prepared with others; a label is a place in it.
        keys: [N] sample keys.
        labels, frames, samples, heights, widths: [N] int64; the label of a sample of several classes is -1, as of none.
        has_video, has_audio: [N] bool, whether a sample has a picture, a sound.
        is_local: whether all shards lie in folders.
        shard_sizes: samples of each shard; those of one shard follow each other, in the order of its tar.
        crc32: of all that, of every sample's bytes and of their order; not of where the shards lie.
    """

    def __init__(self, storages: Sequence[Storage], cache: ShardCache | None = None, broken: list[str] | None = None) -> None:
        """``cache``: where copies of shards are kept and looked for; the first shards that fit into it together are.

        ``broken``: takes what is wrong with shards that cannot be opened, which are left out; None = the first one is an error.
        """
        tables = [_read_set(storage, broken) for storage in storages]
        first = tables[0]
        for storage, table in zip(storages, tables, strict=True):
            for name in ("codec", "fps", "sample_rate"):
                if getattr(table, name) != getattr(first, name):
                    raise UserError(
                        f"{storage.where()} has {name} {getattr(table, name)}, "
                        f"{storages[0].where()} has {getattr(first, name)}; "
                        "shards used together must agree"
                    )
        self.codec: str = first.codec
        self.fps: float = first.fps
        self.sample_rate: int = first.sample_rate
        self.classes: list[str] = first.classes
        if any(table.classes != first.classes for table in tables):
            self.classes = sorted({name for table in tables for name in table.classes})
        number = {name: place for place, name in enumerate(self.classes)}
        labels = []
        self._several: dict[int, tuple[int, ...]] = {}
        before = 0
        for table in tables:
            mapping = np.array([number[name] for name in table.classes] + [-1], np.int64)  # -1 is the last place
            labels.append(mapping[table.columns["label"]])
            for place, several in table.several.items():
                self._several[before + place] = tuple(sorted(mapping[several].tolist()))
            before += len(table.keys)
        self.labels: NDArray[np.int64] = np.concatenate(labels)
        self.frames, self.samples, self.heights, self.widths = (
            np.concatenate([table.columns[name] for table in tables]) for name in COLUMNS[1:]
        )
        self.keys: list[str] = [key for table in tables for key in table.keys]
        self._ranges = np.concatenate([table.ranges for table in tables])
        self.has_video: NDArray[np.bool_] = self._ranges[:, 0, 0] >= 0
        self.has_audio: NDArray[np.bool_] = self._ranges[:, 1, 0] >= 0
        details = np.stack([self.labels, self.frames, self.samples, self.heights, self.widths])
        names = "\n".join([*self.keys, *self.classes]).encode("utf-8", "surrogateescape")
        self.crc32: int = zlib.crc32(self._ranges.tobytes(), zlib.crc32(details.tobytes(), zlib.crc32(names)))
        if self._several:
            self.crc32 = zlib.crc32(json.dumps(sorted(self._several.items())).encode(), self.crc32)
        starts = np.cumsum([0, *(len(table.tars) for table in tables)])
        self._shard = np.concatenate([table.shard + start for table, start in zip(tables, starts, strict=False)])
        self._tars = [tar for table in tables for tar in table.tars]
        self.is_local: bool = all(storage.is_local for storage in storages)
        self.shard_sizes: tuple[int, ...] = tuple(np.bincount(self._shard, minlength=len(self._tars)).tolist())
        self._cache = cache
        self._kept = 0  # of how many shards, the first ones, copies are kept: with more, each would drive out the next
        if cache is not None:
            ends = np.cumsum([tar.size for tar in self._tars], dtype=np.int64)
            self._kept = int(np.searchsorted(ends, cache.limit, side="right"))

    @classmethod
    def open(
        cls,
        paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
        *,
        remote: RemoteOptions | None = None,
        cache: CacheOptions | None = None,
        broken: list[str] | None = None,
    ) -> ShardSet:
        """Open one shard set or several as one: folders, or ``http://`` and ``https://`` addresses of such.

        Args:
            paths: folders and addresses.
            remote: how addresses are read.
            cache: where copies of shards are kept.
            broken: takes a sentence for each shard whose tar or index is missing or another one, and the set is opened without
                them: to look for damage, not to train. None = the first one is an error.

        Raises:
            UserError: a place that is no shard set, is damaged, does not go with the others, or gives no answer.
        """
        several = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
        if not several:
            raise UserError("no shard directory is named; make one with `xkd-fast prepare`")
        kept = ShardCache(Path(cache.folder), cache.limit) if cache is not None and cache.folder is not None else None
        return cls(_storages(several, remote or RemoteOptions()), kept, broken)

    def __len__(self) -> int:
        return len(self.keys)

    def record(self, index: int) -> SampleRecord:
        """What the index knows of a sample."""
        return SampleRecord(
            key=self.keys[index],
            label=int(self.labels[index]),
            frames=int(self.frames[index]),
            samples=int(self.samples[index]),
            height=int(self.heights[index]),
            width=int(self.widths[index]),
            shard=str(self._tars[self._shard[index]]),
        )

    @property
    def multi_label(self) -> bool:
        """Whether a sample has several classes."""
        return bool(self._several)

    @property
    def label_sets(self) -> list[tuple[int, ...]]:
        """[N] class numbers of every sample, ascending: none, one, or several."""
        return [self.labels_of(index) for index in range(len(self))]

    def labels_of(self, index: int) -> tuple[int, ...]:
        """A sample's class numbers, ascending: none, one, or several."""
        label = int(self.labels[index])
        return self._several.get(index, (label,) if label >= 0 else ())

    def read(self, index: int) -> EncodedSample:
        """A sample's encoded video and audio, either of them empty where it has none.

        Raises:
            CorruptSampleError: naming shard and key, if the bytes do not have the checksum they were written with.
        """
        return self._encoded(index, self._read_parts(index, (0, 1)))

    def _encoded(self, index: int, parts: list[NDArray[np.uint8]]) -> EncodedSample:
        return EncodedSample(self.keys[index], int(self.labels[index]), *parts)

    def place(self, index: int) -> tuple[int, int, int]:
        """Where a sample's picture and sound are: number of the shard, first byte, end; with the tar's headers between them."""
        start, end = self._span(index, (0, 1))
        return int(self._shard[index]), start, end

    def unpack(self, index: int, data: bytes | memoryview) -> EncodedSample:
        """A sample from the bytes at its `place`.

        Raises:
            CorruptSampleError: as `read`.
        """
        return self._encoded(index, self._checked(index, (0, 1), data))

    def details(self, index: int) -> dict[str, Any]:
        """A sample's ``KEY.json``: source, class, duration and whatever else was noted when it was prepared."""
        details: dict[str, Any] = json.loads(self._read_parts(index, (2,))[0].tobytes())
        return details

    def damage(self, index: int) -> list[CorruptSampleError]:
        """What is wrong with a sample's parts; reads all of them."""
        found = []
        for part in range(len(PARTS)):
            try:
                self._read_parts(index, (part,))
            except CorruptSampleError as error:
                found.append(error)
        return found

    def _span(self, index: int, parts: Sequence[int]) -> tuple[int, int]:
        """First byte and end of the given parts together; of absent ones, 0 and 0."""
        present = [self._ranges[index, part] for part in parts if self._ranges[index, part, 0] >= 0]
        start = min((int(offset) for offset, _, _ in present), default=0)
        return start, max((int(offset + size) for offset, size, _ in present), default=0)

    def _read_parts(self, index: int, parts: tuple[int, ...]) -> list[NDArray[np.uint8]]:
        """Parts of a sample, empty where it has none; CRCs checked."""
        start, end = self._span(index, parts)
        if end - start > sum(int(self._ranges[index, part, 1]) for part in parts) + GAP:
            return [self._read_parts(index, (part,))[0] for part in parts]
        number = int(self._shard[index])
        tar = self._tars[number]
        try:
            return self._checked(index, parts, self.read_range(number, start, end - start))
        except CorruptSampleError:
            if tar.storage.is_local and number >= self._kept:
                raise
        # spoiled on its way, or in the cache: once more, from where it came
        data = tar.storage.read(tar.name, start, end - start)
        whole = self._checked(index, parts, data)
        if self._cache is not None and number < self._kept:
            self._cache.discard(tar.digest, start, data)
        return whole

    def read_range(self, number: int, offset: int, size: int) -> bytes:
        """Bytes of a shard, from the cache where that keeps it; fewer at its end. No CRC is checked.

        Args:
            number: of the shard.
            offset: first byte.
            size: bytes.

        Raises:
            UserError: it cannot be read.
        """
        tar = self._tars[number]
        if self._cache is not None and number < self._kept:
            for _ in range(TRIES):
                data = self._cache.read(tar.digest, offset, size)
                if data is not None:
                    return data
                if not self._cache.bring(tar.digest, tar.size, lambda file: tar.storage.copy(tar.name, file)):
                    break
        return tar.storage.read(tar.name, offset, size)

    def _checked(self, index: int, parts: Sequence[int], data: bytes | memoryview) -> list[NDArray[np.uint8]]:
        """The parts inside ``data``, the bytes of their span."""
        start, _ = self._span(index, parts)
        found = []
        for part in parts:
            offset, size, expected = (int(number) for number in self._ranges[index, part])
            own = memoryview(data)[offset - start : offset - start + size] if offset >= 0 else memoryview(b"")
            actual = zlib.crc32(own)
            if offset >= 0 and (len(own) != size or actual != expected):
                raise CorruptSampleError(
                    f"{self._tars[int(self._shard[index])]}, sample {self.keys[index]}, {PARTS[part]}: {len(own)} of {size} "
                    f"bytes, CRC {actual:08x} where {expected:08x} was written"
                )
            found.append(np.frombuffer(own, np.uint8) if len(own) else np.empty(0, np.uint8))
        return found
