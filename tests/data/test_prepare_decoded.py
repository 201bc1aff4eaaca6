"""What `prepare` wrote, decoded as training does: the right frames and sound, in every codec."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from rich.console import Console

from tests.data.media import number_of
from tests.data.piles import SMALL, contents, make_media, place, report_rows, run
from xkd_fast.data.decode import ClipDecoder, DecodeRequest
from xkd_fast.data.prepare import PLAN, PrepareOptions, prepare
from xkd_fast.data.shards import MANIFEST, ShardSet
from xkd_fast.data.synthetic import SyntheticOptions, clip_path, render_clip, render_dataset
from xkd_fast.errors import UserError


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_media(tmp_path_factory.mktemp("media"))


def decode_all(shards: ShardSet) -> dict[str, tuple[NDArray[np.uint8], NDArray[np.float32]]]:
    """Every sample's frames and sound as training decodes them, by source."""
    decoder, decoded = ClipDecoder(batch_size=1, threads=1, codec=shards.codec), {}
    for index in range(len(shards)):
        sample = shards.read(index)
        (clip,) = decoder([DecodeRequest(sample.key, sample.video, sample.audio, 0, int(shards.frames[index]))])
        decoded[shards.details(index)["source"]] = (clip.frames.numpy(), clip.waveform.numpy())
    return decoded


def sudden(waveform: NDArray[np.float32], rate: int) -> NDArray[np.float64]:
    """When a sound sets in after quiet, seconds: 5 ms that are 20 times as strong as each of the three before."""
    window = rate // 200
    power = (waveform[: len(waveform) // window * window].astype(float).reshape(-1, window) ** 2).mean(1)
    found = [k for k in range(3, len(power)) if power[k] > max(0.01 * power.max(), 20 * power[k - 3 : k].max())]
    return np.array(found) * window / rate


def test_impacts_are_still_heard_when_they_are_seen(tmp_path: Path) -> None:
    """Would catch a delay of H.264, AAC, MJPEG, FLAC or the decoders that parts sound from picture on the way to training."""
    clean = SyntheticOptions(
        clips_per_class=2, classes=("bounce",), seconds=(3.0, 3.5), background=0, video_noise=0, audio_noise=0, distractors=0
    )
    render_dataset(tmp_path / "videos", clean)
    run(tmp_path / "videos", tmp_path / "shards", PrepareOptions(fps=16.0, short_side=96, workers=1))
    decoded = decode_all(ShardSet.open(tmp_path / "shards"))
    for index in range(2):
        clip = render_clip("bounce", index, clean)
        frames, waveform = decoded[str(clip_path("", "bounce", index))]
        assert len(frames) == len(clip.frames) and len(waveform) == len(clip.waveform)
        assert np.abs(frames.astype(float) - clip.frames).mean() < 6
        moving = np.abs(frames - np.median(frames, axis=0)).sum(-1) > 60
        rows = (moving * np.arange(frames.shape[1])[:, None]).sum((1, 2)) / moving.sum((1, 2))
        lowest = np.array([k for k in range(1, len(rows) - 1) if rows[k] >= max(rows[k - 1], rows[k + 1])]) / 16
        heard = [time for time in sudden(waveform, 16000) if 2 / 16 < time < (len(frames) - 2) / 16]
        assert len(heard) >= 2
        for time_heard in heard:
            assert np.abs(clip.events - time_heard).min() < 0.01
            assert np.abs(lowest - time_heard).min() <= 1 / 16 + 0.005


BEGINNINGS = {"h264": (4, b"ftyp"), "vp9": (0, b"\x1aE\xdf\xa3"), "mosaic": (0, b"XKDMOS01"), "yuv": (0, b"XKDYUV01")}


@pytest.mark.parametrize("codec", BEGINNINGS)
def test_other_codecs_hold_the_same_samples(media: Path, tmp_path: Path, codec: Any) -> None:
    """Would catch another codec's branch broken: its files, its quality, its frames."""
    source = place(media, tmp_path / "videos", {"a/1.mkv": "good"})
    run(source, tmp_path / "shards", PrepareOptions(codec=codec, short_side=16, workers=1))
    shards = ShardSet.open(tmp_path / "shards")
    begin, magic = BEGINNINGS[codec]
    assert shards.codec == codec and shards.read(0).video[begin : begin + len(magic)].tobytes() == magic
    assert shards.record(0).frames == 5
    if codec != "h264":
        ((frames, _),) = decode_all(shards).values()
        assert [number_of(picture) for picture in frames] == [0, 3, 6, 9, 12]


def test_auto_names_its_codec_and_keeps_to_it(media: Path, tmp_path: Path) -> None:
    """Would catch "auto" in the manifest, a choice without a word, and a folder refused since it was begun with another."""
    source = place(media, tmp_path / "videos", {"a/1.mkv": "good"})
    auto = PrepareOptions(short_side=16, samples_per_shard=3, workers=1)

    def told(folder: str, options: PrepareOptions) -> str:
        shown = io.StringIO()
        prepare(source, tmp_path / folder, options, console=Console(file=shown, width=40))
        return "".join(line for line in shown.getvalue().splitlines(keepends=True) if line.startswith("codec"))

    chosen = "codec auto: mosaic, which a CPU decodes faster than mjpeg and "
    assert told("new", auto).startswith(chosen)
    assert json.loads((tmp_path / "new" / MANIFEST).read_text())["codec"] == "mosaic"
    assert json.loads((tmp_path / "new" / PLAN).read_text())["options"]["quality"] == 4
    assert told("begun", SMALL) == ""
    for folder, codec in (("new", "mosaic"), ("begun", "mjpeg")):
        before = contents(tmp_path / folder)
        assert told(folder, auto) == f"codec auto: {codec}, which {tmp_path / folder} was begun with\n"
        assert contents(tmp_path / folder) == before
    (tmp_path / "begun" / PLAN).write_text('{"options": {"codec": ["mjpeg"]}}')
    with pytest.raises(UserError, match="was prepared in format None"):
        told("begun", auto)


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("XKD_TEST_MEDIA"), reason="XKD_TEST_MEDIA names no folder of real media")
def test_real_media(tmp_path: Path) -> None:
    """Would catch a kind of file from the wild that is refused, or that should be and is not."""
    root = Path(os.environ["XKD_TEST_MEDIA"])
    (tmp_path / "videos").mkdir()
    for folder in ("odd", "video"):
        (tmp_path / "videos" / folder).symlink_to(root / folder)
    run(tmp_path / "videos", tmp_path / "shards", PrepareOptions(workers=2))
    rows = report_rows(tmp_path / "shards")
    expected = {name: "unreadable" for name in rows if name.startswith("odd/bad_")}
    expected |= {"odd/bad_truncated.webm": "truncated", "odd/no_audio.mp4": "no_audio", "odd/audio_only.m4a": "no_video"}
    expected |= {"video/flower.webm": "silent_audio", "video/stream-of-water-audioless.webm": "silent_audio"}
    assert {name: row["reason"] for name, row in rows.items() if row["status"] == "skipped"} == expected
    decoded = decode_all(ShardSet.open(tmp_path / "shards"))
    assert len(decoded) == len(rows) - len(expected) >= 30
    for name, (frames, waveform) in decoded.items():
        assert min(frames.shape[1:3]) == 128 and len(waveform) == round(len(frames) / 8 * 16000), name
        assert frames.std() > 5 and np.abs(waveform).max() > 1e-3, name
    late, early = decoded["odd/audio_starts_1p5s_late.mp4"][1], decoded["odd/audio_shorter_2s_of_6s.mp4"][1]
    assert not late[: 16000 + 7000].any() and late[16000 + 9000 :].any()
    assert early[: 2 * 16000].any() and not early[2 * 16000 + 2048 :].any()
    assert decoded["odd/portrait_270x480_25fps_aac44k_mono.mp4"][0].shape[1:3] == (228, 128)
