"""Decoding: colours, levels and moments as they went in; who decodes, and why; what a GPU does, as far as a CPU can do it."""

from __future__ import annotations

import io
import struct
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.torch import load_file

from tests.data.clip_shards import (
    DATA,
    FPS,
    FRAMES,
    GARBAGE,
    MEL,
    MODEL,
    RATE,
    damage,
    make,
    make_pictures,
    make_sound,
    write_shards,
)
from xkd_fast.data import batch_maker
from xkd_fast.data.augment import ViewMaker
from xkd_fast.data.avi import parse_avi
from xkd_fast.data.clip_options import view_shape
from xkd_fast.data.dali import CPU
from xkd_fast.data.decode import ClipDecoder, DecodeRequest, UndecodableError, blame
from xkd_fast.data.decode_device import choose, decoding_obstacle
from xkd_fast.data.encode import encode_flac, encode_video
from xkd_fast.data.jpeg_header import jpeg_size
from xkd_fast.data.log_mel import LogMel, MelOptions
from xkd_fast.data.packed import PackedError
from xkd_fast.data.sampler import clip_draw
from xkd_fast.data.shards import ShardSet
from xkd_fast.data.unpack import PARSERS, _cut
from xkd_fast.data.video_codecs import CODECS
from xkd_fast.data.views import AugmentOptions, ClipShape
from xkd_fast.errors import UserError


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    return ShardSet.open(write_shards(tmp_path_factory.mktemp("data") / "shards"))


def test_colours_come_out_as_they_went_in(shards: ShardSet) -> None:
    # limited for full range, red for blue, or another colour matrix
    sample = shards.keys.index("clip3")
    encoded, pictures = shards.read(sample), make_pictures(3)
    decoder = ClipDecoder(1, 1)
    clip = decoder([DecodeRequest("clip3", encoded.video, encoded.audio, 2, 6)])[0]
    difference = (clip.frames.float() - torch.from_numpy(pictures[2:8]).float()).abs()
    assert difference.mean() < 2
    assert difference.max() < 12


def float_wav(sound: NDArray[np.float32]) -> bytes:
    """A WAV file of float32 samples at 16 kHz."""
    data = sound.tobytes()
    form = struct.pack("<4sIHHIIHH", b"fmt ", 16, 3, 1, RATE, RATE * 4, 4, 32)
    return struct.pack("<4sI4s", b"RIFF", 36 + len(data), b"WAVE") + form + struct.pack("<4sI", b"data", len(data)) + data


@pytest.mark.parametrize(("stored", "worst", "mean"), [("wav", 1e-5, 1e-6), ("flac", 2e-3, 1e-4)])
def test_log_mel_through_dali(stored: str, worst: float, mean: float) -> None:
    # sound that loses its level, its rate or its alignment in the decoder. FLAC holds 16 bits, as shards do: the rounding
    # alone moves the quietest band by 1.0e-3
    golden = load_file(Path(__file__).parent.parent / "golden" / "log_mel.safetensors")
    video = np.frombuffer(encode_video(list(make_pictures(0)), "mjpeg", FPS, 2), np.uint8)
    decoder = ClipDecoder(2, 1)
    requests = []
    for view in ("global", "local"):
        sound = golden[f"{view}.waveform"].numpy()
        whole = (sound.astype(np.float64) * 32768).round().clip(-32768, 32767).astype(np.int16)
        encoded = float_wav(sound) if stored == "wav" else encode_flac(whole, RATE)
        requests.append(DecodeRequest(view, video, np.frombuffer(encoded, np.uint8), 0, 1))
    for request, clip in zip(requests, decoder(requests), strict=True):
        error = (LogMel(MelOptions(), 80, RATE)(clip.waveform[None])[0] - golden[f"{request.key}.log_mel"]).abs()
        assert error.max() < worst
        assert error.mean() < mean


def no_obstacle(device: torch.device) -> str | None:
    return None


GPU = torch.device("cuda", 0)


@pytest.mark.parametrize("codec", CODECS)
def test_who_decodes(codec: str) -> None:
    """Red if `auto` leaves a GPU's engines idle or asks for what they cannot do, or an explicit choice is not obeyed."""
    engine, on_cpu = CODECS[codec].engine, CODECS[codec].on_cpu
    chosen = choose("auto", codec, GPU, no_obstacle)
    assert chosen.device == (GPU if engine else CPU)
    assert (engine or "not compressed") in chosen.reason or "PyTorch finds" in chosen.reason
    if engine:
        assert choose("gpu", codec, GPU, no_obstacle).device == GPU
    if on_cpu:
        assert choose("cpu", codec, GPU, no_obstacle).device == CPU
        hindered = choose("auto", codec, GPU, lambda _: "the driver is too old")
        assert hindered.device == CPU and ("driver" in hindered.reason) == (engine is not None)
        assert choose("auto", codec, CPU, no_obstacle).device == CPU


def test_a_choice_that_cannot_run_says_what_can() -> None:
    """Red if a run that was told to decode on a GPU goes on without, or the error names no way out."""
    with pytest.raises(UserError, match=r"data\.decode = gpu cannot be done .*: (PyTorch finds no GPU|the model)"):
        choose("gpu", "mjpeg", CPU, no_obstacle)
    with pytest.raises(UserError, match=r"data\.decode = gpu .*: NVDEC is busy; set data\.decode=auto or cpu"):
        choose("gpu", "vp9", GPU, lambda _: "NVDEC is busy")
    with pytest.raises(UserError, match=r"data\.decode = gpu .*yuv is not compressed.*; set data\.decode=auto or cpu"):
        choose("gpu", "yuv", GPU, no_obstacle)
    with pytest.raises(UserError, match=r"data\.decode = gpu .*: NVDEC is busy; prepare the shards with --codec mjpeg"):
        choose("gpu", "h264", GPU, lambda _: "NVDEC is busy")
    for asked in ("auto", "cpu"):
        with pytest.raises(UserError, match=r"h264 video, which DALI cannot decode on the CPU, .*--codec mjpeg"):
            choose(asked, "h264", CPU, no_obstacle)


def test_the_obstacle_is_found_by_decoding(shards: ShardSet, tmp_path: Path) -> None:
    """Red if a device that decodes is refused, one damaged sample speaks for all, or what DALI says is lost."""
    assert decoding_obstacle(shards, CPU) is None
    damage(path := write_shards(tmp_path / "one"), "clip0", "video")
    assert decoding_obstacle(ShardSet.open(path), CPU) is None
    none = write_shards(tmp_path / "none", lambda _, new: replace(new, video=GARBAGE))
    assert "DALI cannot decode mjpeg there: an AVI file begins" in str(decoding_obstacle(ShardSet.open(none), CPU))


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_no_bytes_crash_the_avi_parser(data: st.DataObject) -> None:
    """Red if cut or altered bytes raise anything but an error about the file, or the parser never ends."""
    good = encode_video(list(make_pictures(5)), "mjpeg", FPS, 4)
    cut = good[: data.draw(st.integers(0, len(good)))]
    changed = bytearray(cut)
    for _ in range(data.draw(st.integers(0, 8))):
        if changed:
            changed[data.draw(st.integers(0, min(400, len(changed) - 1)))] = data.draw(st.integers(0, 255))
    try:
        found = parse_avi(np.frombuffer(bytes(changed), np.uint8))
        sizes = [jpeg_size(jpeg.tobytes()) for jpeg in found.jpegs]
        assert len(sizes) == found.frames
    except PackedError:
        pass


def test_avi_as_written() -> None:
    """Red if frames are lost, doubled or out of order, or the size is another one."""
    good = encode_video(pictures := list(make_pictures(3)), "mjpeg", FPS, 2)
    found = parse_avi(np.frombuffer(good, np.uint8))
    assert (found.frames, found.height, found.width) == (len(pictures), *pictures[0].shape[:2])
    packets = [bytes(packet) for packet in av.open(io.BytesIO(good)).demux(video=0) if packet.size]
    assert [jpeg.tobytes() for jpeg in found.jpegs] == packets
    assert {jpeg_size(packet) for packet in packets} == {pictures[0].shape[:2]}


def test_a_broken_jpeg_header_never_reaches_dali() -> None:
    """Red if it does: its parser then ends the process. Every prefix of a header, and a size that is not the file's."""
    good = encode_video(list(make_pictures(3)), "mjpeg", FPS, 2)
    jpeg = parse_avi(np.frombuffer(good, np.uint8)).jpegs[0].tobytes()
    for end in range(jpeg.index(b"\xff\xda") + 4):
        with pytest.raises(PackedError):
            jpeg_size(jpeg[:end])
    place = good.index(jpeg) + jpeg.index(b"\xff\xc0") + 6
    larger = good[:place] + bytes([good[place] + 16]) + good[place + 1 :]
    sound = np.frombuffer(encode_flac(make_sound(3), RATE), np.uint8)
    request = DecodeRequest("a", np.frombuffer(larger, np.uint8), sound, 0, 2)
    with pytest.raises(UndecodableError, match=r"JPEG 0 has 52 × 48 pixels, where the file's header promises 36 × 48"):
        ClipDecoder(1, 1)([request])


@pytest.mark.parametrize("codec", ["mosaic", "mjpeg"])
def test_tiles_are_cut_alike_from_arrays_and_tensors(codec: str) -> None:
    """Red if a GPU, whose pictures are tensors, cuts another frame out of a mosaic than a CPU."""
    pictures = make_pictures(6)
    data = np.frombuffer(encode_video(list(pictures), codec, FPS, 2), np.uint8)
    mosaic = PARSERS[codec](data)
    rng = np.random.default_rng(0)
    sheets = [rng.integers(0, 256, (*mosaic.size(number), 3), np.uint8) for number in range(len(mosaic.jpegs))]
    for start, count in ((0, len(pictures)), (3, 4), (len(pictures) - 1, 1), (5, 6)):
        frames = np.zeros((min(count, mosaic.frames - start), mosaic.height, mosaic.width, 3), np.uint8)
        tensors, expected = torch.zeros(frames.shape, dtype=torch.uint8), []
        for number in mosaic.holding(start, count):
            _cut(sheets[number], mosaic, number, start, frames)
            _cut(torch.from_numpy(sheets[number]), mosaic, number, start, tensors)
        for frame in range(start, start + len(frames)):
            number, place = divmod(frame, mosaic.tiles)
            row, column = divmod(place, mosaic.columns)
            top, left = row * mosaic.tile[0], column * mosaic.tile[1]
            expected.append(sheets[number][top : top + mosaic.height, left : left + mosaic.width])
        assert np.array_equal(frames, expected) and np.array_equal(tensors.numpy(), expected)


def test_views_are_made_where_the_clips_are() -> None:
    """Red if augmentation or the mel front end makes or keeps a number on the CPU: tensors that have a device alone."""
    meta, shape = torch.device("meta"), view_shape(DATA, MODEL)
    maker = ViewMaker(shape, AugmentOptions(), MEL, device=meta)
    stored = ClipShape(9, 2 * RATE, 36, 48)
    draws = [clip_draw(0, 0, sample, stored, shape, AugmentOptions()) for sample in range(12)]
    frames, sound = torch.empty(FRAMES, 36, 48, 3, dtype=torch.uint8, device=meta), torch.empty(RATE, device=meta)
    views = maker.empty(12)
    maker.fill(views, slice(0, 12), [frames] * 12, [sound] * 12, draws)
    assert all(tensor.device == meta for tensor in (views.video_global, *views.video_locals, *views.audio_locals))


def test_a_batch_at_once_is_each_clip_alone(shards: ShardSet) -> None:
    """Red if the way of a GPU, which augments all clips of a batch together, gives other views than a thread for each."""
    with make(shards, micro_batch=12) as pipeline:
        apart, _ = pipeline.batch(0, 0)
        pipeline._maker.together = True
        batch_maker.CLIPS_TOGETHER, usual = 5, batch_maker.CLIPS_TOGETHER
        together, _ = pipeline.batch(0, 0)
        batch_maker.CLIPS_TOGETHER = usual
    assert apart.keys == together.keys
    for ours, theirs in zip([apart.video_global, *apart.video_locals], [together.video_global, *together.video_locals]):
        assert (ours - theirs).abs().max() < 1e-5
    for ours, theirs in zip([apart.audio_global, *apart.audio_locals], [together.audio_global, *together.audio_locals]):
        assert (ours - theirs).abs().max() < 1e-4


def test_whose_fault_a_failed_batch_is() -> None:
    """Red if a GPU whose memory is full has its whole batch listed as damaged, or damage among good samples ends the run."""
    told = blame(["a", "b"], {0: "out of memory", 1: "out of memory"}, "out of memory", GPU)
    assert isinstance(told, UserError) and "cuda:0 decodes none of 2 samples (out of memory)" in str(told)
    assert "data.decode=cpu" in str(told)
    for device, keys, reasons in ((GPU, "ab", {1: "bad"}), (GPU, "a", {0: "bad"}), (CPU, "ab", {0: "bad", 1: "bad"})):
        told = blame(list(keys), reasons, "bad", device)
        assert isinstance(told, UndecodableError) and told.reasons == reasons
    alone = {device: str(blame(["a", "b"], {}, "no room", device)) for device in (GPU, CPU)}
    assert all("the batch of a, b, though each sample alone passes: no room" in words for words in alone.values())
    assert "lower data.threads" in alone[GPU] and "lower data.threads" not in alone[CPU]
