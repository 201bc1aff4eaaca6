"""Clips that the benchmarks take straight from source files. DALI reads VP9 on a CPU: a GPU's graph on another device."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from benchmarks import test_data
from benchmarks.originals import DaliFiles, frame_numbers, pyav_frames, pyav_sound
from xkd_fast.config import load_config
from xkd_fast.data.sampler import clip_draw

RATE, FRAMES, SIZE = 25, 40, (48, 64)
STEP = 6  # grey levels from a picture to the next; converters of colours differ by 2
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two files of pictures that grow lighter, the left half darker than the right one; with a tone."""
    folder = tmp_path_factory.mktemp("originals")
    return [write(folder / f"{number}.webm", 10 * number) for number in range(2)]


def write(path: Path, first: int) -> Path:
    with av.open(str(path), "w") as container:
        video = container.add_stream("libvpx-vp9", rate=RATE, options={"crf": "10", "b": "0"})
        video.width, video.height, video.pix_fmt = 2 * SIZE[1], 2 * SIZE[0], "yuv420p"
        audio = container.add_stream("libopus", rate=48000, layout="mono")
        for number in range(FRAMES):
            picture = np.full((2 * SIZE[0], 2 * SIZE[1], 3), first + STEP * number, np.uint8)
            picture[:, : SIZE[1]] //= 2
            container.mux(video.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(video.encode(None))
        tone = np.sin(np.arange(48000 * FRAMES // RATE) * (0.05 + first / 1000)).astype(np.float32)
        block = av.AudioFrame.from_ndarray(tone[None], format="fltp", layout="mono")
        block.sample_rate = 48000
        container.mux(audio.encode(block))
        container.mux(audio.encode(None))
    return path


def shown(frames: NDArray[np.uint8], first: int) -> list[int]:
    """Which pictures these are."""
    left, right = (half.astype(float).mean((1, 2, 3)) for half in np.split(frames, 2, axis=2))
    assert np.allclose(left, right / 2, atol=3)
    return np.round((right - first) / STEP).astype(int).tolist()


def test_dali_takes_the_frames_and_sound_that_pyav_takes(paths: list[Path]) -> None:
    """Red if a file's frames are counted at another rate, begin elsewhere, or another clip's come in their place."""
    count, starts = 12, [0.11, 0.59]  # the second goes on past the end of its file
    reader = DaliFiles(paths, SIZE, count, 8.0, 8000, 16000, batch_size=2, threads=2, device=CPU)
    try:
        clips = reader(paths, starts)
    finally:
        reader.close()
    for number, (path, start, (frames, sound)) in enumerate(zip(paths, starts, clips, strict=True)):
        assert frames.shape == (count, *SIZE, 3) and frames.dtype == torch.uint8
        expected = pyav_frames(path, start, count, 8.0, SIZE)
        assert shown(frames.numpy(), 10 * number) == shown(expected, 10 * number)
        assert torch.equal(sound, torch.from_numpy(pyav_sound(path, start, 8000, 16000)))


def test_frames_start_over_at_the_end_of_a_file() -> None:
    """Red if a clip that is longer than its file asks for frames that are not there."""
    assert frame_numbers(25.0, 10, 0.0, 5, 8.0).tolist() == [0, 3, 6, 9, 0]
    assert frame_numbers(10.0, 30, 0.5, 4, 10.0).tolist() == [5, 6, 7, 8]


def test_views_are_those_of_the_clips(paths: list[Path]) -> None:
    """Red if what DALI decoded is paired with another clip's sound or draws."""
    config = load_config("xkd_base_k400", ["data.train=[sources]"])
    each = test_data.FromFilesByDali(paths, config, test_data.SMOKE, 2, CPU)
    try:
        each.decode()
        views = each.batch()
        for row in range(test_data.SMOKE.batch):
            clip = each.clip(row, each.epoch)
            draw = clip_draw(0, each.epoch, row, each.stored, each.shape, config.augment)
            alone = each.maker.empty(1)
            each.maker.fill(alone, slice(0, 1), *([part] for part in clip), [draw])
            assert torch.equal(alone.video_global[0], views.video_global[row])
            assert torch.equal(alone.audio_global[0], views.audio_global[row])
    finally:
        each.close()
