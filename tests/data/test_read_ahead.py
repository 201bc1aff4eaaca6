"""Shards read front to back: few large reads, bounded memory, the same batches as reading sample by sample."""

from __future__ import annotations

import itertools
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from tests.data.clip_shards import DATA, MEL, MODEL, SAMPLES, assert_same, damage, write_shards
from tests.data.http_server import Server, serving
from tests.data.test_shards import make_sample, write_set
from xkd_fast.data.http_folder import RemoteOptions
from xkd_fast.data.pipeline import ViewPipeline
from xkd_fast.data.read_ahead import ReadAhead, Stopped, grouped
from xkd_fast.data.sequential import SequentialSampler
from xkd_fast.data.shards import ShardSet
from xkd_fast.data.views import AugmentOptions, MaskNoise, Views
from xkd_fast.errors import UserError

COUNT, SHARDS = 120, 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set of random bytes."""
    samples = [[make_sample(number) for number in range(first, COUNT, SHARDS)] for first in range(SHARDS)]
    return write_set(tmp_path_factory.mktemp("plain") / "set", samples)


def sampler_of(shards: ShardSet, buffer: int, world: int = 1) -> SequentialSampler:
    return SequentialSampler(len(shards), 3, 4, 1, world - 1, world, shards.shard_sizes, buffer)


def take_all(ahead: ReadAhead, shards: ShardSet, sampler: SequentialSampler, epochs: int, step: int = 0) -> Iterator[int]:
    """Take the clips in the order of their use, comparing bytes; yields how many are held after each."""
    for epoch in range(epochs):
        for at in range(step if epoch == 0 else 0, sampler.steps_per_epoch):
            for sample in sampler.ids(epoch, at).tolist():
                taken, read = ahead.take(epoch, sample), shards.read(sample)
                assert taken.key == read.key and taken.video.tobytes() == read.video.tobytes()
                assert taken.audio.tobytes() == read.audio.tobytes()
                yield ahead.held


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("buffer", [1, 10, 1000])
def test_everything_comes_and_little_is_held(folder: Path, buffer: int, threads: int) -> None:
    """Red if a clip never comes, comes as another, or memory grows with the epoch rather than with the buffer."""
    shards = ShardSet.open(folder)
    sampler = sampler_of(shards, buffer)
    ahead = ReadAhead(shards, sampler.reading(0, 0), ahead=4, threads=threads, size=4000)
    try:
        held = list(take_all(ahead, shards, sampler, epochs=3))
    finally:
        ahead.close()
    per_read = 4  # clips of 1 kB
    assert max(held) <= buffer + 4 + threads * per_read


def test_large_reads_and_nothing_twice(folder: Path) -> None:
    """Red if every clip costs a request, if a read leaves its shard, or if clips that were used before an interruption are
    read again."""
    shards = ShardSet.open(folder)
    sampler = sampler_of(shards, 20)
    whole = list(itertools.islice(grouped(shards, sampler.reading(0, 0)), SHARDS + 1))
    assert sum(len(read.samples) for read in whole) >= COUNT and len(whole) == SHARDS + 1
    spans = [(read.end - read.start) for read in grouped(shards, itertools.islice(sampler.reading(0, 0), COUNT), 10_000)]
    assert max(spans) <= 10_000 and len(spans) < COUNT / 2
    apart = list(grouped(shards, iter([(0, 0, 0), (0, COUNT // SHARDS + 1, 1)])))  # the second begins where the first ends
    assert [(read.shard, read.samples) for read in apart] == [(0, [(0, 0)]), (1, [(0, COUNT // SHARDS + 1)])]
    step = 20
    used = {sample for at in range(step) for sample in sampler.ids(0, at).tolist()}
    rest = list(itertools.takewhile(lambda wanted: wanted[0] == 0, sampler.reading(0, step)))
    assert {sample for _, sample, _ in rest} == set(sampler.stretch(0).stream.tolist()) - used and len(rest) == COUNT - len(
        used
    )
    ahead = ReadAhead(shards, sampler.reading(0, step), ahead=4, threads=2)
    try:
        assert len(list(take_all(ahead, shards, sampler, epochs=2, step=step))) == 2 * COUNT - len(used)
    finally:
        ahead.close()


def test_what_cannot_be_read_reaches_the_taker(folder: Path, tmp_path: Path) -> None:
    """Red if a server that goes away leaves training waiting for ever."""
    with serving(folder.parent) as server:
        shards = ShardSet.open(f"{server.url}/set", remote=RemoteOptions(timeout=0.5, attempts=1))
        sampler = sampler_of(shards, 20)
        server.misbehave = lambda handler: handler.answer(403, b"") is None
        ahead = ReadAhead(shards, sampler.reading(0, 0), ahead=4, threads=2)
        with pytest.raises(UserError, match=r"shard-00000\d\.tar cannot be read: the server answers 403"):
            ahead.take(0, int(sampler.ids(0, 0)[0]))
        ahead.close()


# --------------------------------------------------------------------------------------------------------- through the pipeline


def test_an_end_does_not_wait_for_a_server_that_says_nothing(folder: Path) -> None:
    """Red if ending a run takes as long as the last requests and all their further tries."""
    with serving(folder.parent) as server:
        shards = ShardSet.open(f"{server.url}/set", remote=RemoteOptions(timeout=8.0, attempts=1))
        server.delay = 5.0
        ahead = ReadAhead(shards, sampler_of(shards, 10).reading(0, 0), ahead=4, threads=2)
        begin = time.monotonic()
        while server.active == 0 and time.monotonic() < begin + 4:
            time.sleep(0.01)
        begin = time.monotonic()
        ahead.close()
        assert time.monotonic() - begin < 3


def test_a_taker_that_waits_is_told_of_the_end(folder: Path) -> None:
    """Red if whoever waits for a sample asks the silent server himself once the threads have been stopped."""
    with serving(folder.parent) as server:
        shards = ShardSet.open(f"{server.url}/set", remote=RemoteOptions(timeout=4.0, attempts=2))
        server.delay = 20.0
        sampler = sampler_of(shards, 10)
        ahead = ReadAhead(shards, sampler.reading(0, 0), ahead=4, threads=1)
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(ahead.take, 0, int(sampler.ids(0, 0)[0]))
            begin = time.monotonic()
            ahead.close()
            with pytest.raises(Stopped):
                waiting.result()
            with pytest.raises(Stopped):
                ahead.take(0, int(sampler.ids(0, 0)[1]))
        assert time.monotonic() - begin < 3


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set of real clips."""
    return write_shards(tmp_path_factory.mktemp("videos") / "set")


def pipeline(shards: ShardSet, **changed: object) -> ViewPipeline:
    """A pipeline over these shards, front to back."""
    data = replace(DATA, order=changed.pop("order", "sequential"), shuffle_buffer=5, prefetch=1)
    arguments = {"seed": 3, "micro_batch": 2, "rank": 0, "world_size": 2, **changed}
    return ViewPipeline(shards, MODEL, AugmentOptions(), MEL, data, **arguments)  # type: ignore[arg-type]


def first(made: ViewPipeline, count: int, epoch: int = 0, step: int = 0) -> list[tuple[Views, MaskNoise]]:
    return list(itertools.islice(made.batches(epoch, step), count))


def test_the_stream_is_what_single_batches_are_at_any_start(videos: Path) -> None:
    """Red if what was read ahead is another batch than the one of that step, in this epoch or the next, or a run that goes on
    in the middle of an epoch differs from one that was never interrupted."""
    for rank in (0, 1):
        with pipeline(ShardSet.open(videos), rank=rank) as made, pipeline(ShardSet.open(videos), rank=rank) as alone:
            steps = made.sampler.steps_per_epoch
            assert steps == SAMPLES // 4
            expected = [alone.batch(*divmod(place, steps)) for place in range(2 * steps)]
            for start in range(2 * steps):
                for ours, theirs in zip(first(made, 2 * steps - start, *divmod(start, steps)), expected[start:], strict=True):
                    assert_same(ours, theirs)


def test_an_address_gives_the_same_batches(videos: Path) -> None:
    """Red if training over the network sees other clips than from the folder."""
    with serving(videos.parent) as server, pipeline(ShardSet.open(videos)) as local:
        expected = first(local, 6)
        server.requests.clear()
        with pipeline(ShardSet.open(f"{server.url}/set", remote=RemoteOptions(5.0, 2))) as remote:
            for ours, theirs in zip(first(remote, 6), expected, strict=True):
                assert_same(ours, theirs)
        assert len(server.asked(".tar")) <= 12, "large reads"


def test_random_order_from_an_address(videos: Path) -> None:
    """Red if a server's slow answers are waited for one after another, or what was read ahead is another step's."""
    with serving(videos.parent) as server:
        remote, local = ShardSet.open(f"{server.url}/set", remote=RemoteOptions(5.0, 2)), ShardSet.open(videos)
        server.delay = 0.05
        with pipeline(remote, order="random", micro_batch=3) as made, pipeline(local, order="random", micro_batch=3) as alone:
            steps = made.sampler.steps_per_epoch
            for place, batch in enumerate(first(made, 2 * steps - 1, 0, 1), start=1):
                assert_same(batch, alone.batch(*divmod(place, steps)))
        assert server.most > DATA.threads


def test_a_damaged_clip_is_replaced(videos: Path, tmp_path: Path) -> None:
    """Red if damage met while reading ahead stops the run, goes unlisted, or takes a clip that is still to come away."""
    hurt = write_shards(tmp_path / "set")
    damage(hurt, "clip3", "video")
    with pipeline(ShardSet.open(hurt), world_size=1) as made, pipeline(ShardSet.open(hurt), world_size=1) as alone:
        steps = made.sampler.steps_per_epoch
        for place, batch in enumerate(first(made, 2 * steps)):
            assert_same(batch, alone.batch(*divmod(place, steps)))
        assert "clip3" in {sample.key for sample in made.damage()}


def test_ending_a_stream_ends_its_threads(videos: Path) -> None:
    """Red if threads that read ahead outlive their stream, or a second stream is ended by the first one's end."""
    before = threading.active_count()
    with pipeline(ShardSet.open(videos)) as made:
        one = made.batches()
        next(one)
        two = made.batches(0, 1)
        next(two)
        one.close()
        assert next(two) is not None
    deadline = time.monotonic() + 10
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert threading.active_count() <= before


@contextmanager
def silent_pipeline(videos: Path, order: str) -> Iterator[tuple[ViewPipeline, Server]]:
    """A pipeline over a server that has given the indices, and now accepts requests and says nothing."""
    over = threading.Event()
    with serving(videos.parent) as server:
        shards = ShardSet.open(f"{server.url}/set", remote=RemoteOptions(timeout=4.0, attempts=3))
        server.misbehave = lambda handler: over.wait(60)
        try:
            yield pipeline(shards, order=order), server
        finally:
            over.set()


@pytest.mark.parametrize("order", ["random", "sequential"])
def test_closing_does_not_wait_for_a_server_that_says_nothing(videos: Path, order: str) -> None:
    """Red if the end of a run waits for the thread that makes batches, which waits for the server, try after try; or if who
    waits for a batch meanwhile is given an error rather than the end."""
    with silent_pipeline(videos, order) as (made, server), ThreadPoolExecutor(1) as consumer:
        rest = consumer.submit(lambda: list(made.batches()))
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline and not (
            server.active and any(thread.name == "data" for thread in threading.enumerate())
        ):
            time.sleep(0.01)
        begin = time.monotonic()
        made.close()
        assert rest.result() == [] and time.monotonic() - begin < 3


class Interrupted(Exception):
    """What a signal raises."""


def test_an_interruption_does_not_wait_for_a_server_that_says_nothing(videos: Path) -> None:
    """Red if Ctrl-C, while the step waits for its batch, is heeded minutes later."""

    def interrupt(number: int, frame: object) -> None:
        raise Interrupted

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        with silent_pipeline(videos, "random") as (made, server):
            stream = made.batches()
            signal.setitimer(signal.ITIMER_REAL, 1.0)
            begin = time.monotonic()
            with pytest.raises(Interrupted):
                next(stream)
            made.close()
            assert server.active > 0 and time.monotonic() - begin < 4
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)
