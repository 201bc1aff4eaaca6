"""The step fed from shards beside the step fed with the same views again and again: how much of its speed data cost.

Whole steps of the fast model (forward, backward, clipping, AdamW, teachers, centres) of the demo's model and of the base model,
in stretches that take turns in one process. In a stretch from shards each step takes a new batch of `ViewPipeline.batches`;
its first steps are not timed, as they use what was made ahead while the other stretch ran. On a GPU the base model alone, with
every codec by every decoder that takes it: decoding overlaps a real training step.
"""

from __future__ import annotations

import io
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from benchmarks import media, record
from benchmarks.contestants import Fast
from xkd_fast.config import Config, load_config
from xkd_fast.data.pipeline import ViewPipeline
from xkd_fast.data.prepare import PrepareOptions, prepare, processors
from xkd_fast.data.shards import ShardSet
from xkd_fast.data.video_codecs import CODECS
from xkd_fast.data.views import MaskNoise, Views
from xkd_fast.engine.heap import keep_freed_memory

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
SETTLE = 3  # micro-batches of a stretch from shards that are not timed; more than are made ahead


def ways() -> list[tuple[str, str]]:
    """Codecs, and who decodes them here."""
    if DEVICE.type == "cpu":
        return [("mosaic", "cpu")]
    by_gpu = [(name, "gpu") for name, codec in CODECS.items() if codec.engine]
    return by_gpu + [(name, "cpu") for name, codec in CODECS.items() if codec.on_cpu]


def cases(measuring: bool) -> list[tuple[str, str, int, int, int]]:
    """Configuration, precision, clips of a step, timed steps of a stretch, and stretches of either kind."""
    if not measuring:
        return [("demo", "float32", 2, 1, 1)]
    if DEVICE.type == "cuda":
        return [("xkd_base_k400", "bfloat16", 32, 20, 4), ("xkd_base_k400", "bfloat16", 128, 10, 3)]
    return [("demo", "float32", 16, 12, 7), ("xkd_base_k400", "bfloat16", 2, 2, 4)]


class Feeding:
    """A model that takes steps, and a pipeline that feeds it."""

    def __init__(self, config: Config, folder: Path, clips: int, precision: str, decode: str) -> None:
        self.shards = ShardSet.open(folder)
        data = replace(config.data, decode=decode, prefetch=2, threads=config.data.own_threads)
        how = config.model, config.augment, config.mel, data
        self.pipeline = ViewPipeline(self.shards, *how, seed=0, micro_batch=clips, device=DEVICE)
        self.model = Fast(config.model, DEVICE, getattr(torch, precision))
        self.batches = self.pipeline.batches()
        self.same = next(self.batches)
        self.clips = clips

    def stretch(self, batches: Iterator[tuple[Views, MaskNoise]], steps: int) -> tuple[float, float]:
        """Seconds of so many steps, and of them spent waiting for batches."""
        synchronise = torch.get_device_module(DEVICE).synchronize
        synchronise()
        begun, waited = time.perf_counter(), 0.0
        for _ in range(steps):
            asked = time.perf_counter()
            views, noise = next(batches)
            waited += time.perf_counter() - asked
            self.model.step(views, noise)
        synchronise()
        return time.perf_counter() - begun, waited

    def measure(self, steps: int, rounds: int) -> dict[str, Any]:
        """Stretches in turns."""
        same = iter(lambda: self.same, None)
        self.stretch(same, 1)
        synthetic, fed, shares = [], [], []
        for _ in range(rounds):
            synthetic.append(self.stretch(same, steps)[0])
            self.stretch(self.batches, SETTLE)
            seconds, waited = self.stretch(self.batches, steps)
            fed.append(seconds)
            shares.append(waited / seconds)
        clips = self.clips * steps
        return {
            "synthetic_clips_per_second": record.spread([clips / seconds for seconds in synthetic]),
            "shards_clips_per_second": record.spread([clips / seconds for seconds in fed]),
            "shards_against_synthetic": record.spread([one / other for one, other in zip(synthetic, fed)]),
            "data_wait_share": record.spread(shares),
        }

    def close(self) -> None:
        """End the pipeline."""
        self.batches.close()  # type: ignore[attr-defined]
        self.pipeline.close()


def test_feeding(measuring: bool, tmp_path: Path) -> None:
    """Red if a step cannot be fed from shards, or is fed with nothing new."""
    source = media.KINETICS if measuring else replace(media.TINY, seconds=4.5)
    files = {("cpu", True): 16, ("cuda", True): 256}.get((DEVICE.type, measuring), 2)
    place = media.folder(measuring, tmp_path) / "feeding"
    media.write_sources(place / "sources", source, files)
    if DEVICE.type == "cpu":
        torch.set_num_threads(processors())
        keep_freed_memory()
    rows = []
    for name, precision, clips, steps, rounds in cases(measuring):
        for codec, decode in ways():
            config = load_config(name, [f"data.train=[{place}]"])
            short = config.data.demo.short_side if config.data.demo else 128
            shards = place / f"{codec}-{short}"
            options = PrepareOptions(codec=codec, short_side=short)  # type: ignore[arg-type]
            prepare(place / "sources", shards, options, console=Console(file=io.StringIO()))
            feeding = Feeding(config, shards, clips, precision, decode)
            try:
                told = feeding.measure(steps, rounds)
                first, second = (next(feeding.batches)[0] for _ in range(2))
                assert not torch.equal(first.video_global, second.video_global)
            finally:
                feeding.close()
            setting = feeding.pipeline.setting
            row = {"config": name, "precision": precision, "clips": clips, "codec": codec, "decode": decode}
            row |= {"threads": setting.threads, "prefetch": setting.prefetch, "steps": steps} | told
            rows.append(row)
            fed, ratio = told["shards_clips_per_second"]["median"], told["shards_against_synthetic"]["median"]
            line = f"{name}, {precision}, {clips} clips, {codec} by the {decode}: {fed:.3g} clips/s, {ratio:.3f} of synthetic"
            print(f"{line}, waiting {told['data_wait_share']['median']:.2%}")
    if measuring:
        record.write(f"feeding_{record.place(DEVICE)}", {"rows": rows})


@pytest.mark.skipif(DEVICE.type == "cpu", reason="a GPU's engines are what is swept")
def test_concurrency(measuring: bool, tmp_path: Path) -> None:
    """Clips/s decoded by NVDEC, nvJPEG and the CPU by the number of threads, which for NVDEC is that of its sessions."""
    place = media.folder(measuring, tmp_path) / "feeding"
    media.write_sources(place / "sources", media.KINETICS, files := 64 if measuring else 4)
    config, rows = load_config("xkd_base_k400", [f"data.train=[{place}]"]), []
    for codec, decode in ways():
        options = PrepareOptions(codec=codec)  # type: ignore[arg-type]
        prepare(place / "sources", place / f"{codec}-128", options, console=Console(file=io.StringIO()))
        for threads in (1, 2, 4, 8, 16) if measuring else (1, 2):
            data = replace(config.data, decode=decode, threads=threads, prefetch=2)  # type: ignore[arg-type]
            how = config.model, config.augment, config.mel, data
            shards = ShardSet.open(place / f"{codec}-128")
            with ViewPipeline(shards, *how, seed=0, micro_batch=min(32, files), device=DEVICE) as pipeline:
                speeds = []
                for epoch in range(6):
                    begun = time.perf_counter()
                    wanted = pipeline.sampler.files(epoch, 0).tolist()
                    pipeline._fetcher(epoch, wanted, pipeline._maker.decoder, pipeline._maker.pool)
                    torch.cuda.synchronize()
                    speeds.append(len(wanted) / (time.perf_counter() - begun))
            rows.append({"codec": codec, "decode": decode, "threads": threads, "clips_per_second": record.spread(speeds[1:])})
            print(f"{codec} by the {decode}, {threads} threads: {rows[-1]['clips_per_second']['median']:.4g} clips/s decoded")
    if measuring:
        record.write(f"decode_{record.place(DEVICE)}", {"config": "xkd_base_k400", "rows": rows})
