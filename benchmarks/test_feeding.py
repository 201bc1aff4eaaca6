"""The step fed from shards beside the step fed with the same views again and again: how much of its speed data cost.

Whole steps of the fast model (forward, backward, clipping, AdamW, teachers, centres) of the demo's model and of the base model,
in stretches that take turns in one process. In a stretch from shards each step takes a new batch of `ViewPipeline.batches`;
its first steps are not timed, as they use what was made ahead while the other stretch ran. On a GPU the base model alone, with
every codec by every decoder that takes it, what is likely to matter most first: decoding overlaps a real training step.

Results are written after every row. Rows for which XKD_BENCHMARK_SECONDS leaves no time are listed as left out.
"""

from __future__ import annotations

import io
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from benchmarks import media, race, record
from benchmarks.contestants import Fast
from benchmarks.memory import free_unused
from xkd_fast.config import load_config
from xkd_fast.data.pipeline import ViewPipeline
from xkd_fast.data.prepare import PrepareOptions, prepare, processors
from xkd_fast.data.shards import ShardSet
from xkd_fast.data.video_codecs import AUTO, CODECS
from xkd_fast.data.views import MaskNoise, Views
from xkd_fast.engine.heap import keep_freed_memory

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
SETTLE = 3  # micro-batches of a stretch from shards that are not timed; more than are made ahead
FIRST = (AUTO, "h264")  # codecs whose figures are wanted most
CONCURRENCY_SHARE = 0.35  # of XKD_BENCHMARK_SECONDS: the other test's figures are wanted more

Row = dict[str, Any]


def time_is_up(share: float = 1.0) -> bool:
    """Whether this share of XKD_BENCHMARK_SECONDS has passed since the benchmarks began; never without that."""
    allowed = os.environ.get("XKD_BENCHMARK_SECONDS")
    return allowed is not None and time.monotonic() - race.STARTED >= share * float(allowed)


@dataclass
class Table:
    """The rows of one result, whose file is written after each of them.

    Attributes:
        name: of the file; None writes none.
        planned: titles of all rows, which are listed as left out until they are there.
        about: what else the file says.
        share: of the time, after which no row is begun.
        rows: so far.
        failed: why a row is not there, by title; other rows go on.
    """

    name: str | None
    planned: list[str]
    about: Row = field(default_factory=dict)
    share: float = 1.0
    rows: list[Row] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    errors: list[Exception] = field(default_factory=list)

    @property
    def left_out(self) -> list[str]:
        """Titles of rows that there was no time for, so far."""
        return [title for title in self.planned if title not in self.failed and title not in {r["title"] for r in self.rows}]

    def add(self, title: str, measure: Callable[[], Row], told: Callable[[Row], str]) -> None:
        """Measure a row, print it and write the file; leave it out where the time is up."""
        if time_is_up(self.share):
            return
        try:
            row = {"title": title} | measure()
        except Exception as error:  # one codec that a GPU refuses costs the others nothing; `close` raises it
            self.failed[title] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            self.errors.append(error.with_traceback(None))
            print(f"{title}: failed, {self.failed[title]}")
        else:
            self.rows.append(row)
            print(f"{title}: {told(row)}", flush=True)
        if title in self.failed:
            free_unused(DEVICE)  # not before the error, whose frames hold tensors, is gone
        if self.name is not None and self.rows:
            record.write(self.name, {**self.about, "rows": self.rows, "left_out": self.left_out, "failed": self.failed})

    def close(self) -> None:
        """Print what is missing; raise what failed first."""
        for title in self.left_out:
            print(f"{title}: left out, the time is up")
        if self.errors:
            raise self.errors[0]


def file_name(kind: str, measuring: bool) -> str | None:
    """Of the result; none of a smoke test, unless a folder for results is named."""
    return f"{kind}_{record.place(DEVICE)}" if measuring or "XKD_BENCHMARK_RESULTS" in os.environ else None


def ways() -> list[tuple[str, str]]:
    """Codecs and who decodes them here, those that matter most first."""
    if DEVICE.type == "cpu":
        return [(AUTO, "cpu")]
    names = sorted(CODECS, key=lambda name: FIRST.index(name) if name in FIRST else len(FIRST))
    able = {"gpu": lambda codec: codec.engine is not None, "cpu": lambda codec: codec.on_cpu}
    return [(name, who) for name in names for who, takes in able.items() if takes(CODECS[name])]


@dataclass(frozen=True)
class Case:
    """Steps that are fed.

    Attributes:
        config: whose model and data.
        precision: of the step.
        clips: of a step.
        steps: timed, of a stretch.
        rounds: stretches of either kind.
    """

    config: str
    precision: str
    clips: int
    steps: int
    rounds: int

    def title(self, codec: str, decode: str) -> str:
        """Of a row."""
        return f"{self.config}, {self.precision}, {self.clips} clips, {codec} by the {decode}"


def cases(measuring: bool) -> list[Case]:
    """What is measured; a step of many clips needs most of data."""
    if not measuring:
        return [Case("demo", "float32", 2, 1, 1)]
    if DEVICE.type == "cuda":
        return [Case("xkd_base_k400", "bfloat16", 128, 8, 3), Case("xkd_base_k400", "bfloat16", 32, 12, 3)]
    return [Case("demo", "float32", 16, 12, 7), Case("xkd_base_k400", "bfloat16", 2, 2, 4)]


@dataclass
class Pile:
    """Rendered sources, and the shards of them."""

    folder: Path
    kind: media.SourceKind
    names: int  # of files: a step's clips come from as many
    rendered: int  # of which so many differ

    @cached_property
    def sources(self) -> Path:
        """The folder of the sources, rendered when first asked for."""
        folder = self.folder / "sources"
        media.write_sources(folder, self.kind, self.names, rendered=self.rendered, processes=processors())
        return folder

    def shards(self, codec: str, short_side: int = 128) -> ShardSet:
        """Those of a codec, made when first asked for."""
        folder = self.folder / f"{codec}-{short_side}"
        if not (folder / "manifest.json").exists():
            options = PrepareOptions(codec=codec, short_side=short_side)  # type: ignore[arg-type]
            prepare(self.sources, folder, options, console=Console(file=io.StringIO()))
        return ShardSet.open(folder)


@pytest.fixture(scope="module")
def pile(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pile:
    """The same sources for all tests."""
    measuring = bool(request.config.getoption("--benchmark"))
    folder = media.folder(measuring, tmp_path_factory.mktemp("feeding")) / "feeding"
    if not measuring:
        return Pile(folder, replace(media.TINY, seconds=4.5), 4, 2)
    return Pile(folder, media.KINETICS, *((128, 32) if DEVICE.type == "cuda" else (16, 16)))


class Feeding:
    """A model that takes steps, and a pipeline that feeds it."""

    def __init__(self, model: Fast, pipeline: ViewPipeline) -> None:
        self.model, self.pipeline = model, pipeline
        self.batches = pipeline.batches()
        self.same = next(self.batches)

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

    def measure(self, steps: int, rounds: int) -> Row:
        """Stretches in turns; fewer than ``rounds`` of either kind where the time is up, but one."""
        same = iter(lambda: self.same, None)
        self.stretch(same, 1)
        synthetic, fed, shares = [], [], []
        while len(fed) < rounds and not (fed and time_is_up()):
            synthetic.append(self.stretch(same, steps)[0])
            self.stretch(self.batches, SETTLE)
            seconds, waited = self.stretch(self.batches, steps)
            fed.append(seconds)
            shares.append(waited / seconds)
        first, second = (next(self.batches)[0] for _ in range(2))
        assert not torch.equal(first.video_global, second.video_global)
        clips = first.batch_size * steps
        return {
            "synthetic_clips_per_second": record.spread([clips / seconds for seconds in synthetic]),
            "shards_clips_per_second": record.spread([clips / seconds for seconds in fed]),
            "shards_against_synthetic": record.spread([one / other for one, other in zip(synthetic, fed)]),
            "data_wait_share": record.spread(shares),
        }

    def close(self) -> None:
        """End the background work."""
        self.batches.close()  # type: ignore[attr-defined]


def feeding_row(case: Case, codec: str, decode: str, pile: Pile, model: Callable[[], Fast]) -> Row:
    """A case, fed from shards of a codec."""
    config = load_config(case.config, [f"data.train=[{pile.folder}]"])
    shards = pile.shards(codec, config.data.demo.short_side if config.data.demo else 128)
    data = replace(config.data, decode=decode, prefetch=2, threads=config.data.own_threads)  # type: ignore[arg-type]
    how = config.model, config.augment, config.mel, data
    with ViewPipeline(shards, *how, seed=0, micro_batch=case.clips, device=DEVICE) as pipeline:
        feeding = Feeding(model(), pipeline)
        try:
            told = feeding.measure(case.steps, case.rounds)
        finally:
            feeding.close()
    row = {"config": case.config, "precision": case.precision, "clips": case.clips, "codec": codec, "decode": decode}
    return row | {"threads": pipeline.setting.threads, "prefetch": pipeline.setting.prefetch, "steps": case.steps} | told


def feeding_told(row: Row) -> str:
    """A row's figures."""
    fed, ratio, share = (
        row[key]["median"] for key in ("shards_clips_per_second", "shards_against_synthetic", "data_wait_share")
    )
    return f"{fed:.3g} clips/s, {ratio:.3f} of synthetic, waiting {share:.2%}"


def feed(table: Table, wanted: list[Case], by: list[tuple[str, str]], pile: Pile) -> None:
    """All cases in all ways; a case has one model, which is made when it is first needed."""
    for case in wanted:
        made: list[Fast] = []

        def model(case: Case = case, made: list[Fast] = made) -> Fast:
            if not made:
                options = load_config(case.config, [f"data.train=[{pile.folder}]"]).model
                made.append(Fast(options, DEVICE, getattr(torch, case.precision)))
            return made[0]

        for codec, decode in by:

            def measure(case: Case = case, codec: str = codec, decode: str = decode, model: Any = model) -> Row:
                return feeding_row(case, codec, decode, pile, model)

            table.add(case.title(codec, decode), measure, feeding_told)
        made.clear()
        free_unused(DEVICE)
    table.close()


@pytest.mark.skipif(DEVICE.type == "cpu", reason="a GPU's engines are what is swept")
def test_concurrency(measuring: bool, pile: Pile) -> None:
    """Clips/s decoded by NVDEC, nvJPEG and the CPU by the number of threads, which for NVDEC is that of its sessions."""
    counts = (1, 4, 8, 16) if measuring else (1, 2)
    by = [(codec, decode, threads) for threads in sorted(counts, key=lambda n: abs(n - 8)) for codec, decode in ways()]
    titles = [f"{codec} by the {decode}, {threads} threads" for codec, decode, threads in by]
    config = load_config("xkd_base_k400", [f"data.train=[{pile.folder}]"])
    table = Table(file_name("decode", measuring), titles, {"config": "xkd_base_k400"}, CONCURRENCY_SHARE)
    for title, (codec, decode, threads) in zip(titles, by, strict=True):

        def measure(codec: str = codec, decode: str = decode, threads: int = threads) -> Row:
            data = replace(config.data, decode=decode, threads=threads, prefetch=2)  # type: ignore[arg-type]
            how = config.model, config.augment, config.mel, data
            shards = pile.shards(codec)
            with ViewPipeline(shards, *how, seed=0, micro_batch=min(32, pile.names), device=DEVICE) as pipeline:
                speeds = []
                for epoch in range(4):
                    begun = time.perf_counter()
                    wanted = pipeline.sampler.files(epoch, 0).tolist()
                    pipeline._fetcher(epoch, wanted, pipeline._maker.decoder, pipeline._maker.pool)
                    torch.cuda.synchronize()
                    speeds.append(len(wanted) / (time.perf_counter() - begun))
            return {"codec": codec, "decode": decode, "threads": threads, "clips_per_second": record.spread(speeds[1:])}

        table.add(title, measure, lambda row: f"{row['clips_per_second']['median']:.4g} clips/s decoded")
    table.close()


def test_feeding(measuring: bool, pile: Pile) -> None:
    """Red if a step cannot be fed from shards, or is fed with nothing new."""
    if DEVICE.type == "cpu":
        torch.set_num_threads(processors())
        keep_freed_memory()
    planned = [case.title(*way) for case in cases(measuring) for way in ways()]
    feed(Table(file_name("feeding", measuring), planned), cases(measuring), ways(), pile)
