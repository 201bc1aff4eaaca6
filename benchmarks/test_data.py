"""Clips per second for training on this machine's CPU: from shards of every codec, from source files, by a plain DataLoader.

All contestants make the views of ``configs/xkd_base_k400.yaml`` of the same clips: 32 frames at 8 a second of 112 × 112 and a
local view of 8 of 96 × 96, log-mel spectrograms of 80 × 448 and 80 × 112. Source files are rendered: 340 × 256, 25 frames a
second, ten seconds, H.264 and AAC; the shards are what `prepare` makes of them. Everything lies in the page cache, so storage
costs nothing here; ``bytes_read_per_clip`` says what it would have to give. `ViewPipeline.batch` is timed, which makes a batch
when it is called: how far ahead of the step batches are made changes nothing about how many can be made.

The floor of what follows decoding, on one core (pixels: 32 · 112² + 8 · 96² = 475 000 a clip):

- moved, if nothing were kept in between: 2.1 MB of uint8 (32 frames of 128 × 170), of which crops read some 60 %, and 5.9 MB of
  float32 written (1.4 M numbers of pictures, 45 000 of spectrograms): 0.8 ms at 10 GB/s
- resizing by taps, 2-3 a side: 1.4 M numbers × 2 sides × 3 multiply-adds = 17 MFLOP; by whole matrices some 0.6 GFLOP, 7 ms at
  80 GFLOP/s; by bands of 16 rows 0.15 GFLOP, 2 ms
- colours: 475 000 pixels × about 75 operations (brightness 6, contrast 12, saturation 12, hue 45) = 36 MFLOP: 0.5 ms at
  80 GFLOP/s in one pass; as operators of PyTorch some 60 passes over 1.9 MB in a second-level cache: 3 ms at 40 GB/s
- sound: 448 + 112 windows of 1 024: 14 MFLOP of Fourier transforms, 46 MFLOP of filter bank: 1 ms

So 6-7 ms of a core for a clip is what PyTorch's operators can reach, 1-2 ms what one fused pass could. The compiled pass
(`kernels/csrc/video_view_cpu.cpp`) makes pictures in one; ``by_torch`` says what the same shards give with PyTorch's operators.
"""

from __future__ import annotations

import io
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor

from benchmarks import media, record
from benchmarks.originals import DaliFiles, Reader, dali_refusal, read_by_pyav, torchcodec_reader, versions
from benchmarks.plain_loader import PlainDataset, plain_loader
from benchmarks.race import too_late
from xkd_fast.config import Config, load_config
from xkd_fast.data.augment import ViewMaker
from xkd_fast.data.beside import moved
from xkd_fast.data.clip_options import view_shape
from xkd_fast.data.decode import DecodedClip
from xkd_fast.data.fetch import clip_shape, cut_clip, encoded_request
from xkd_fast.data.pipeline import ViewPipeline
from xkd_fast.data.prefetch import single_threaded_pool
from xkd_fast.data.prepare import PrepareOptions, prepare, processors
from xkd_fast.data.sampler import clip_draw
from xkd_fast.data.shards import ShardSet
from xkd_fast.data.video_codecs import CPU_CODECS
from xkd_fast.data.views import Views
from xkd_fast.engine.heap import keep_freed_memory

CPU = torch.device("cpu")
CONFIG = "xkd_base_k400"
FRAMES_STORED, SHORT_SIDE = 80, 128
BY_TORCH = "pictures by PyTorch's operators"


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    kind: media.SourceKind
    files: int
    batch: int  # clips of one call
    rounds: int
    rounds_of_one_thread: int


FULL = Size(media.KINETICS, files=16, batch=16, rounds=5, rounds_of_one_thread=3)
SMOKE = Size(media.TINY, files=2, batch=2, rounds=1, rounds_of_one_thread=1)


class FromShards:
    """The real pipeline over shards of one codec."""

    def __init__(self, folder: Path, config: Config, size: Size, threads: int) -> None:
        self.shards = ShardSet.open(folder)
        data = replace(config.data, threads=threads)
        how = config.model, config.augment, config.mel, data
        self.pipeline = ViewPipeline(self.shards, *how, seed=0, micro_batch=size.batch)
        self.views_by = self.pipeline._maker.maker.backend
        kinds = dict.fromkeys([self.views_by, "torch"])
        self.makers = {kind: ViewMaker(self.pipeline.shape, config.augment, config.mel, backend=kind) for kind in kinds}
        self.epoch = 0
        parts = [self.shards.read(sample) for sample in range(len(self.shards))]
        self.bytes_read_per_clip = statistics.mean(len(part.video) + len(part.audio) for part in parts)

    def batch(self) -> Views:
        """Another epoch's views."""
        self.epoch += 1
        return self.pipeline.batch(self.epoch, 0)[0]

    def batch_by_torch(self) -> Views:
        """The same with pictures by PyTorch's operators."""
        self.pipeline._maker.maker = self.makers["torch"]
        try:
            return self.batch()
        finally:
            self.pipeline._maker.maker = self.makers[self.views_by]

    def decode(self) -> list[DecodedClip]:
        """Read and decode alone."""
        self.epoch += 1
        ids = self.pipeline.sampler.ids(self.epoch, 0, 0).tolist()
        maker = self.pipeline._maker
        return [clip.decoded for clip in self.pipeline._fetcher(self.epoch, ids, maker.decoder, maker.pool)]

    def stages(self, rounds: int) -> dict[str, float]:
        """Processor seconds a clip of every stage, each over a whole batch; medians."""
        shape, found = self.pipeline.shape, list[dict[str, float]]()
        views = self.makers["torch"].empty(self.pipeline.sampler.micro_batch)  # fetched in the first round, which is not timed
        for epoch in range(rounds + 1):
            taken: dict[str, float] = {}
            samples = range(self.pipeline.sampler.micro_batch)
            draws = [
                clip_draw(0, epoch, sample, clip_shape(self.shards, sample), shape, self.pipeline.augment) for sample in samples
            ]

            def read(number: int, epoch: int = epoch, draws: list[Any] = draws) -> Any:
                frames = min(shape.video.frames, int(self.shards.frames[number]))
                return encoded_request(self.shards, number, draws[number].start_frame, frames)

            with Stage("read", taken):
                requests = [read(number) for number in samples]
            with Stage("decode", taken):
                clips = self.pipeline._maker.decoder(requests)
            cut = [cut_clip(clip, draw.start_sample, shape) for clip, draw in zip(clips, draws, strict=True)]
            stages = {"pictures": self.makers[self.views_by], "sound": self.makers["torch"], BY_TORCH: self.makers["torch"]}
            for name, maker in stages.items():
                with Stage(name, taken):
                    for row, ((frames, sound), draw) in enumerate(zip(cut, draws, strict=True)):
                        heard = name == "sound"
                        maker.fill(views, slice(row, row + 1), [frames] * (not heard), [sound] * heard, [draw])
            found.append({name: seconds / len(clips) for name, seconds in taken.items()})
        return {name: statistics.median(row[name] for row in found[1:]) for name in found[0]}

    def close(self) -> None:
        """End its threads."""
        self.pipeline.close()


class Stage:
    """Adds the processor seconds of a block, of all threads, to a table."""

    def __init__(self, name: str, taken: dict[str, float]) -> None:
        self.name, self.taken = name, taken

    def __enter__(self) -> None:
        self.begun = time.process_time()

    def __exit__(self, *exception: object) -> None:
        self.taken[self.name] = self.taken.get(self.name, 0.0) + time.process_time() - self.begun


class FromFiles:
    """Source files decoded in as many threads, then our augmentation."""

    def __init__(self, paths: list[Path], config: Config, size: Size, threads: int, read: Reader) -> None:
        self.paths, self.config, self.size, self.read = paths, config, size, read
        self.shape = view_shape(config.data, config.model)
        self.maker = ViewMaker(self.shape, config.augment, config.mel)
        self.pool, self.epoch = single_threaded_pool(threads), 0
        self.stored = stored_shape(size.kind)
        self.bytes_read_per_clip = statistics.mean(path.stat().st_size for path in paths)

    def clip(self, place: int, epoch: int) -> tuple[Tensor, Tensor]:
        """Frames [T, H, W, 3] and sound of the clip that is drawn from a file."""
        draw = clip_draw(0, epoch, place, self.stored, self.shape, self.config.augment)
        size = self.stored.height, self.stored.width
        start, fps = draw.start_frame / self.shape.fps, self.shape.fps
        samples, rate = self.shape.clip_samples, self.shape.sample_rate
        return self.read(self.paths[place % len(self.paths)], start, self.shape.video.frames, fps, size, samples, rate)

    def decode(self) -> list[tuple[Tensor, Tensor]]:
        """A clip of every file."""
        self.epoch += 1
        return list(self.pool.map(lambda place: self.clip(place, self.epoch), range(self.size.batch)))

    def batch(self) -> Views:
        """Its views."""
        self.epoch += 1
        views = self.maker.empty(self.size.batch)

        def make(row: int) -> None:
            frames, sound = self.clip(row, self.epoch)
            draw = clip_draw(0, self.epoch, row, self.stored, self.shape, self.config.augment)
            self.maker.fill(views, slice(row, row + 1), [frames], [sound], [draw])

        list(self.pool.map(make, range(self.size.batch)))
        return views

    def close(self) -> None:
        """End its threads."""
        self.pool.shutdown()


class FromFilesByDali:
    """Source files decoded by DALI, a batch at a time, then our augmentation on the same device."""

    def __init__(self, paths: list[Path], config: Config, size: Size, threads: int, device: torch.device) -> None:
        self.paths, self.augment, self.size = paths, config.augment, size
        self.shape, self.stored, self.device, self.epoch = (
            view_shape(config.data, config.model),
            stored_shape(size.kind),
            device,
            0,
        )
        shape, stored = self.shape, (self.stored.height, self.stored.width)
        clip = shape.video.frames, shape.fps, shape.clip_samples, shape.sample_rate
        self.reader = DaliFiles(paths, stored, *clip, size.batch, threads, device)
        self.maker = ViewMaker(shape, config.augment, config.mel, device=device)
        self.bytes_read_per_clip = statistics.mean(path.stat().st_size for path in paths)

    def _clips(self, places: range, epoch: int) -> tuple[list[tuple[Tensor, Tensor]], list[Any]]:
        draws = [clip_draw(0, epoch, place, self.stored, self.shape, self.augment) for place in places]
        paths = [self.paths[place % len(self.paths)] for place in places]
        return self.reader(paths, [draw.start_frame / self.shape.fps for draw in draws]), draws

    def clip(self, place: int, epoch: int) -> tuple[Tensor, Tensor]:
        """Frames [T, H, W, 3] and sound of the clip that is drawn from a file, in the host's memory."""
        (((frames, sound),), _) = self._clips(range(place, place + 1), epoch)
        return frames.cpu(), sound

    def decode(self) -> None:
        """A clip of every file."""
        self.epoch += 1
        decoded = self._clips(range(self.size.batch), self.epoch)
        torch.get_device_module(self.device).synchronize()
        del decoded  # not before the device is done with it

    def batch(self) -> Views:
        """Its views."""
        self.epoch += 1
        clips, draws = self._clips(range(self.size.batch), self.epoch)
        views = self.maker.empty(len(clips))
        frames, sounds = zip(*((seen, moved(heard, self.device)) for seen, heard in clips), strict=True)
        self.maker.fill(views, slice(0, len(clips)), frames, sounds, draws)
        torch.get_device_module(self.device).synchronize()
        return views

    def close(self) -> None:
        """End its threads."""
        self.reader.close()


def stored_shape(kind: media.SourceKind) -> Any:
    """What `prepare` makes of such a file, at the base recipe's rates."""
    from xkd_fast.data.read_video import target_size
    from xkd_fast.data.views import ClipShape

    width, height = target_size(kind.width, kind.height, SHORT_SIDE)
    return ClipShape(round(8 * kind.seconds), round(16000 * kind.seconds), height, width)


class ByLoader:
    """The plain DataLoader; a call is an epoch, with the workers already there."""

    def __init__(self, paths: list[Path], config: Config, size: Size, workers: int) -> None:
        shape = view_shape(config.data, config.model)
        self.dataset = PlainDataset(
            paths, stored_shape(size.kind), shape, config.augment, config.mel, clips=size.batch * (2 if size is FULL else 1)
        )
        self.loader = plain_loader(self.dataset, size.batch // 2 or 1, workers)

    def epoch(self) -> int:
        """How many clips came."""
        return sum(len(views[0]) for views in self.loader)

    def processor_seconds(self) -> float:
        """Of all its processes so far."""
        workers = getattr(self.loader._iterator, "_workers", [])
        fields = [Path(f"/proc/{worker.pid}/stat").read_text().rpartition(")")[2].split() for worker in workers]
        return sum(int(ticks) for row in fields for ticks in row[11:13]) / os.sysconf("SC_CLK_TCK")


@dataclass
class Timed:
    """Seconds by the clock and of processors, of every call of a contestant's work, and the clips of a call."""

    work: Callable[[], object]
    clips: int
    elsewhere: Callable[[], float] = float  # processor seconds of other processes so far
    seconds: list[float] = field(default_factory=list)
    processor_seconds: list[float] = field(default_factory=list)

    def run(self) -> None:
        """Once."""
        begun, used = time.perf_counter(), time.process_time() + self.elsewhere()
        self.work()
        self.seconds.append((time.perf_counter() - begun) / self.clips)
        self.processor_seconds.append((time.process_time() + self.elsewhere() - used) / self.clips)


def in_turns(works: dict[str, Timed], rounds: int) -> None:
    """Times all works, so often each, after an untimed call."""
    for timed in works.values():
        timed.work()
    for _ in range(rounds):
        for timed in works.values():
            timed.run()


def demand() -> dict[str, float]:
    """Clips per second of the fastest measured training step of the base model, by machine and precision."""
    found: dict[str, float] = {}
    for path in sorted(record.RESULTS.glob("step_*_xkd_bfloat16.json")):
        result = json.loads(path.read_text())
        speeds = [
            speed
            for row in result["rows"]
            for name, speed in row["clips_per_second"].items()
            if name.startswith("fast")  # with whatever switches
        ]
        found[result["device"]] = max(speeds)
    return found


def test_data(measuring: bool, tmp_path: Path) -> None:
    """Times all contestants in turns. Red if one of them takes another picture, another moment or another sound than the rest.

    That none leaves a stage out is for `tests/test_plain_loader.py`, where decoding is the same on both sides.
    """
    size = FULL if measuring else SMOKE
    cores, folder = processors(), media.folder(measuring, tmp_path) / "data"
    config = load_config(CONFIG, [f"data.train=[{folder}]"])
    paths = media.write_sources(folder / "sources", size.kind, size.files)
    for codec in CPU_CODECS:
        prepare(folder / "sources", folder / codec, PrepareOptions(codec=codec), console=Console(file=io.StringIO()))
    torch.set_num_threads(cores)
    keep_freed_memory()  # as `train` does on a CPU: a batch's views, 6 MB a clip, are fetched from the system once

    contestants: dict[str, Any] = {codec: FromShards(folder / codec, config, size, cores) for codec in CPU_CODECS}
    contestants["files, PyAV"] = FromFiles(paths, config, size, cores, read_by_pyav)
    absent = {"files, DALI": f"its CPU decoder refuses H.264: {dali_refusal(paths[0])}"}
    reader = torchcodec_reader()
    if isinstance(reader, str):
        absent["files, torchcodec"] = reader
    else:
        contestants["files, torchcodec"] = FromFiles(paths, config, size, cores, reader)
    loader = ByLoader(paths, config, size, cores)
    check(contestants, loader, config)

    works = {"DataLoader": Timed(loader.epoch, len(loader.dataset), loader.processor_seconds)}
    works |= {name: Timed(each.batch, size.batch) for name, each in contestants.items()}
    works |= {f"{name}, decode": Timed(each.decode, size.batch) for name, each in contestants.items()}
    from_shards = {name: each for name, each in contestants.items() if isinstance(each, FromShards)}
    works |= {f"{name}, torch": Timed(each.batch_by_torch, size.batch) for name, each in from_shards.items()}
    in_turns(works, size.rounds)
    plain = works["DataLoader"]
    rows: list[dict[str, Any]] = []
    for name, each in contestants.items():
        row: dict[str, Any] = {"name": name, "bytes_read_per_clip": round(each.bytes_read_per_clip)} | speeds(works[name])
        row["decode_clips_per_second"] = record.spread([1 / taken for taken in works[f"{name}, decode"].seconds])
        for kind in ("seconds", "processor_seconds"):
            pairs = zip(getattr(plain, kind), getattr(works[name], kind), strict=True)
            row["against_loader" if kind == "seconds" else "against_loader_in_processor_time"] = record.spread(
                [theirs / own for theirs, own in pairs]
            )
        if isinstance(each, FromShards):
            torchs = works[f"{name}, torch"]
            pairs = zip(torchs.seconds, works[name].seconds, strict=True)
            row["by_torch"] = speeds(torchs)
            row["against_torch"] = record.spread([theirs / own for theirs, own in pairs])
            with single_threaded_pool(1) as alone:
                row["stage_seconds"] = alone.submit(each.stages, size.rounds_of_one_thread).result()
            row["by_torch"]["pictures_seconds"] = row["stage_seconds"].pop(BY_TORCH)
        each.close()
        rows.append(row)
    rows.append({"name": "DataLoader"} | speeds(plain))
    rows[-1]["bytes_read_per_clip"] = round(contestants["files, PyAV"].bytes_read_per_clip)
    one = one_thread(folder, paths, config, size)
    for row in rows:
        row["one_thread_clips_per_second"] = one.get(row["name"])
        row["share_of_step"] = {device: row["clips_per_second"]["median"] / rate for device, rate in demand().items()}
    result = {"config": CONFIG, "threads": cores, "source": vars(size.kind), "files": size.files, "batch": size.batch}
    result |= {
        "views_by": contestants["mosaic"].views_by,
        "decoders": versions(),
        "absent": absent,
        "step_clips_per_second": demand(),
        "rows": rows,
    }
    print("\n".join([f"{size.kind.name}, {cores} threads", *map(told, rows), *(f"  {n}: {why}" for n, why in absent.items())]))
    if measuring:
        record.write(f"data_{record.place(CPU)}", result)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="DALI decodes H.264 on a GPU alone; `test_data` asks its CPU decoder")
def test_source_files(measuring: bool, tmp_path: Path) -> None:
    """Times decoding straight from source files: DALI on a GPU, PyAV and torchcodec on the CPU. Red if pictures differ."""
    if too_late():
        pytest.skip("source files: left out, the time is up")
    device = torch.device("cuda", 0)
    size = replace(FULL, files=32, batch=32) if measuring else SMOKE
    cores, folder = processors(), media.folder(measuring, tmp_path) / "feeding"  # whose sources `test_feeding` renders too
    config = load_config(CONFIG, [f"data.train=[{folder}]"])
    paths = media.write_sources(folder / "sources", size.kind, size.files, processes=cores)
    torch.set_num_threads(cores)
    contestants: dict[str, Any] = {"files, PyAV": FromFiles(paths, config, size, cores, read_by_pyav)}
    contestants["files, DALI"] = FromFilesByDali(paths, config, size, cores, device)
    reader, absent = torchcodec_reader(), dict[str, str]()
    if isinstance(reader, str):
        absent["files, torchcodec"] = reader
    else:
        contestants["files, torchcodec"] = FromFiles(paths, config, size, cores, reader)
    check(contestants, ByLoader(paths, config, size, cores), config)
    works = {name: Timed(each.batch, size.batch) for name, each in contestants.items()}
    works |= {f"{name}, decode": Timed(each.decode, size.batch) for name, each in contestants.items()}
    in_turns(works, size.rounds)
    rows = []
    for name, each in contestants.items():
        row = {"name": name, "bytes_read_per_clip": round(each.bytes_read_per_clip)} | speeds(works[name])
        row["decode_clips_per_second"] = record.spread([1 / taken for taken in works[f"{name}, decode"].seconds])
        rows.append(row)
        each.close()
        speed, decoded = (row[key]["median"] for key in ("clips_per_second", "decode_clips_per_second"))
        print(f"{size.kind.name}, {name}: {speed:.4g} clips/s, {decoded:.4g} decoded alone")
    print("\n".join(f"{name}: {why}" for name, why in absent.items()))
    if measuring:
        about = {"config": CONFIG, "threads": cores, "source": vars(size.kind), "files": size.files, "batch": size.batch}
        result = {**about, "decoders": versions(), "absent": absent, "rows": rows}
        record.write(f"originals_{record.place(device)}", result)


def speeds(timed: Timed) -> dict[str, Any]:
    """Clips per second by the clock, and what a clip costs of processors, which other programs on them change less."""
    return {
        "clips_per_second": record.spread([1 / taken for taken in timed.seconds]),
        "processor_seconds_per_clip": record.spread(timed.processor_seconds),
    }


def one_thread(folder: Path, paths: list[Path], config: Config, size: Size) -> dict[str, dict[str, float]]:
    """Clips per second of the shards and of PyAV on one core; what else the process could start would hide there."""
    alone: dict[str, Any] = {codec: FromShards(folder / codec, config, size, 1) for codec in CPU_CODECS}
    alone["files, PyAV"] = FromFiles(paths, config, size, 1, read_by_pyav)
    works = {name: Timed(each.batch, size.batch) for name, each in alone.items()}
    in_turns(works, size.rounds_of_one_thread)
    for each in alone.values():
        each.close()
    return {name: speeds(timed)["clips_per_second"] for name, timed in works.items()}


def check(contestants: dict[str, Any], loader: ByLoader, config: Config) -> None:
    """All make the views of the same picture and sound; coding differs, so that no more than a likeness can be asked."""
    shape, files = view_shape(config.data, config.model), contestants["files, PyAV"]
    plain = loader.dataset[0]
    draw = clip_draw(0, 0, 0, files.stored, shape, config.augment)
    maker = files.maker
    for name, each in contestants.items():
        if isinstance(each, FromShards):
            samples = range(len(each.shards))
            sample = next(n for n in samples if each.shards.details(n)["source"].endswith(files.paths[0].name))
            count = min(shape.video.frames, int(each.shards.frames[sample]))
            (decoded,) = each.pipeline._maker.decoder([encoded_request(each.shards, sample, draw.start_frame, count)])
            frames, sound = cut_clip(decoded, draw.start_sample, shape)
        else:
            frames, sound = each.clip(0, 0)
        views = maker.empty(1)
        maker.fill(views, slice(0, 1), [frames], [sound], [draw])
        ours = [views.video_global, views.audio_global, *views.video_locals, *views.audio_locals]
        for place, (own, other) in enumerate(zip(ours, plain, strict=True)):
            likeness = float(np.corrcoef(own[0].flatten().numpy(), other.flatten().numpy())[0, 1])
            assert likeness > 0.9, f"{name}: view {place} is not the DataLoader's, correlation {likeness:.3f}"


def told(row: dict[str, Any]) -> str:
    """A line for a contestant."""
    line = f"  {row['name']}: {row['clips_per_second']['median']:.1f} clips/s"
    line += f", {1e3 * row['processor_seconds_per_clip']['median']:.1f} ms of processors a clip"
    if "decode_clips_per_second" in row:
        line += f" ({row['decode_clips_per_second']['median']:.1f} decoded alone), {row['against_loader']['median']:.1f} × the"
        line += f" DataLoader, {row['against_loader_in_processor_time']['median']:.1f} × in processor time"
    if "by_torch" in row:
        line += f", {row['by_torch']['clips_per_second']['median']:.1f} with pictures by PyTorch's operators"
    if one := row["one_thread_clips_per_second"]:
        line += f", {one['median']:.1f} on one thread"
    if stages := row.get("stage_seconds"):
        line += "; " + ", ".join(f"{name} {1e3 * seconds:.2f} ms" for name, seconds in stages.items())
    return line + f"; {row['bytes_read_per_clip'] / 1e3:.0f} kB read"
