"""Samples without picture or without sound: kept only where that is asked for, stored as absent, never as zeros."""

from __future__ import annotations

import csv
import io
import json
import math
import shutil
import tarfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from tests.data.media import Sound, bursts, noise, numbered, write_video
from tests.evaluate.tiny_run import tiny_config, trained_model, write_checkpoint
from xkd_fast.data.pipeline import ViewPipeline
from xkd_fast.data.plain_clips import clips
from xkd_fast.data.prepare import PrepareOptions, PrepareReport, prepare
from xkd_fast.data.shards import MANIFEST, ShardSet, index_path
from xkd_fast.data.sources import read_list
from xkd_fast.errors import UserError
from xkd_fast.evaluate.svm import SvmOptions, evaluate_svm

KEEP = {"missing_audio": "keep-as-video-only", "missing_video": "keep-as-audio-only"}


def run(source: Path, destination: Path, **changed: Any) -> PrepareReport:
    options = PrepareOptions(**{"codec": "mjpeg", "short_side": 24, "workers": 1, **changed})
    return prepare(source, destination, options, console=Console(file=io.StringIO()))


def film(path: Path, number: int, **sound: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_video(path, [numbered(number + k % 3, 32, 40) for k in range(40)], **sound)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Sets of two classes: of whole samples, of mute ones, of sounds alone, and of all kinds; and a run's checkpoint."""
    root = tmp_path_factory.mktemp("absent")
    for number in range(4):
        for place, name in enumerate(("dark", "light")):
            level, file = 4 + 30 * place + number, f"{name}/{number}"
            film(root / "whole" / f"{file}.mkv", level, sound=noise(1.6, seed=number) >> (4 * place))
            film(root / "mute" / f"{file}.mkv", level, **({} if number % 2 else {"sound": np.zeros(25600, np.int16)}))
            (root / "sounds" / name).mkdir(parents=True, exist_ok=True)
            write_video(root / "sounds" / f"{file}.wav", sound=noise(1.6, seed=number) >> (4 * place))
    film(root / "mixed" / "a" / "whole.mkv", 10, sound=noise(1.6))
    film(root / "mixed" / "b" / "mute.mkv", 20)
    film(root / "mixed" / "b" / "silent.mkv", 30, sound=np.zeros(25600, np.int16))
    write_video(root / "mixed" / "a" / "sound.wav", sound=bursts([0.2, 0.9], 1.5, 16000))
    write_video(root / "mixed" / "a" / "silence.wav", sound=np.zeros(25600, np.int16))
    for name in ("whole", "mute", "sounds", "mixed"):
        run(root / name, root / "shards" / name, **KEEP)
    config = tiny_config()
    write_checkpoint(root / "run" / "checkpoints" / "step-00000120", config, trained_model(config))
    return SimpleNamespace(root=root, shards=root / "shards", config=config, checkpoint=root / "run")


def report(destination: Path) -> dict[str, dict[str, str]]:
    with open(destination / "report.csv", newline="") as file:
        return {row["source"]: row for row in csv.DictReader(file)}


def test_what_is_absent_is_absent_from_tar_and_index(world: SimpleNamespace) -> None:
    """Red if a missing sound becomes zeros, a silent one too, or the index names bytes for a part that is not there."""
    path = world.shards / "mixed"
    rows, shards = report(path), ShardSet.open(path)
    assert {name: (row["status"], row["reason"] or row["detail"]) for name, row in rows.items()} == {
        "a/whole.mkv": ("written", ""),
        "b/mute.mkv": ("written", "without audio"),
        "b/silent.mkv": ("written", "without audio"),
        "a/sound.wav": ("written", "without video"),
        "a/silence.wav": ("skipped", "silent_audio"),
    }
    manifest = json.loads((path / MANIFEST).read_text())
    assert (manifest["without_audio"], manifest["without_video"]) == (2, 1)
    assert manifest["options"]["missing_audio"] == "keep-as-video-only"
    with tarfile.open(path / "shard-000000.tar") as tar:
        members = set(tar.getnames())
    index = {row["key"]: row for row in json.loads(index_path(path / "shard-000000.tar").read_text())["samples"]}
    for place, key in enumerate(shards.keys):
        source, sample, record = shards.details(place)["source"], shards.read(place), shards.record(place)
        has_video, has_audio = source.endswith(".mkv"), source in ("a/whole.mkv", "a/sound.wav")
        assert (shards.has_video[place], shards.has_audio[place]) == (has_video, has_audio)
        assert (f"{key}.avi" in members, f"{key}.flac" in members, f"{key}.json" in members) == (has_video, has_audio, True)
        assert ((index[key]["video"] is not None), (index[key]["audio"] is not None)) == (has_video, has_audio)
        assert (len(sample.video) > 0, len(sample.audio) > 0) == (has_video, has_audio)
        assert (record.frames > 0, record.height > 0, record.samples > 0) == (has_video, has_video, has_audio)
        assert not shards.damage(place)
        if source == "a/sound.wav":
            assert record.samples == 24000 and shards.details(place)["duration"] == 1.5


def test_both_are_skipped_unless_asked_for(world: SimpleNamespace, tmp_path: Path) -> None:
    """Red if the default keeps what training cannot use."""
    assert run(world.root / "mixed", tmp_path / "shards").written == 1
    assert {name: row["reason"] for name, row in report(tmp_path / "shards").items() if row["reason"]} == {
        "b/mute.mkv": "no_audio",
        "b/silent.mkv": "silent_audio",
    }


def test_an_index_that_makes_no_sense_is_refused(world: SimpleNamespace, tmp_path: Path) -> None:
    """Red if a sample of nothing at all is read as one."""
    shutil.copytree(world.shards / "sounds", tmp_path / "shards")
    path = index_path(tmp_path / "shards" / "shard-000000.tar")
    index = json.loads(path.read_text())
    index["samples"][0]["audio"] = None
    path.write_text(json.dumps(index))
    manifest = json.loads((tmp_path / "shards" / MANIFEST).read_text())
    del manifest["shards"][0]["index_crc32"]
    (tmp_path / "shards" / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="has neither picture nor sound, or no description"):
        ShardSet.open(tmp_path / "shards")


def test_training_refuses_them_in_one_sentence(world: SimpleNamespace) -> None:
    """Red if a model is trained on pictures with made-up silence."""
    config, shards = world.config, ShardSet.open(world.shards / "mixed")
    with pytest.raises(
        UserError, match="2 samples without sound and 1 samples without picture, among 4, and training needs both"
    ):
        ViewPipeline(shards, config.model, config.augment, config.mel, config.data, seed=0, micro_batch=2)


def batches(world: SimpleNamespace, name: str, **asked: Any) -> dict[tuple[str, int], tuple[torch.Tensor, torch.Tensor]]:
    config, shards = world.config, ShardSet.open(world.shards / name)
    found = {}
    for batch in clips(shards, config.model, config.mel, config.data, per_sample=2, batch_size=3, **asked):
        for row, (sample, number) in enumerate(zip(batch.samples, batch.clips, strict=True)):
            source = shards.details(int(sample))["source"].split(".")[0]
            found[source, int(number)] = (batch.views.video_global[row], batch.views.audio_global[row])
    return found


def test_one_modality_alone_is_what_both_together_give(world: SimpleNamespace) -> None:
    """Red if leaving one out moves the other's clips or changes their numbers, or its views pass for real ones."""
    both = batches(world, "whole")
    seen, heard = batches(world, "whole", modalities=("video",)), batches(world, "whole", modalities=("audio",))
    alone, mute = batches(world, "sounds", modalities=("audio",)), batches(world, "mute", modalities=("video",))
    assert both.keys() == seen.keys() == heard.keys() == alone.keys() == mute.keys() and len(both) == 16
    for key, (video, audio) in both.items():
        torch.testing.assert_close(seen[key][0], video)
        torch.testing.assert_close(mute[key][0], video)
        torch.testing.assert_close(heard[key][1], audio)
        torch.testing.assert_close(alone[key][1], audio)
        assert video.isfinite().all() and audio.isfinite().all()
        for views in (seen[key][1], mute[key][1], heard[key][0], alone[key][0]):
            assert all(math.isnan(value) for value in views.flatten()[:5].tolist())


def test_what_is_not_there_cannot_be_decoded(world: SimpleNamespace) -> None:
    """Red if a sample without sound gives an audio view."""
    with pytest.raises(UserError, match="8 of 8 samples have no audio; leave it out, or prepare others"):
        batches(world, "mute")


@pytest.mark.parametrize(("name", "row", "lacks"), [("mute", "video", "sound"), ("sounds", "audio", "picture")])
def test_an_svm_is_trained_on_the_modality_that_is_there(world: SimpleNamespace, name: str, row: str, lacks: str) -> None:
    """Red if a set without sound cannot be evaluated, or its table has a row of what is not there."""
    options = SvmOptions(world.checkpoint, world.shards / name, train_clips=2, test_clips=1, svm_c=(1.0,))
    found = evaluate_svm(options)
    assert list(found.results) == [row] and found.settings["modalities"] == [row]
    other = "audio" if row == "video" else "video"
    assert found.notes == [f"{other} and both together cannot be evaluated, because 8 of 8 samples have no {lacks}"]
    whole = evaluate_svm(SvmOptions(world.checkpoint, world.shards / "whole", train_clips=2, test_clips=1, svm_c=(1.0,)))
    assert list(whole.results) == ["video", "audio", "both"] and not any("cannot" in note for note in whole.notes)
    with pytest.raises(UserError, match=f"^{other} cannot be evaluated, because 8 of 8 samples have no {lacks}; ask for"):
        evaluate_svm(SvmOptions(world.checkpoint, world.shards / name, modalities=(other,)))


def test_several_classes_are_no_svms(world: SimpleNamespace, tmp_path: Path) -> None:
    """Red if a sample of several classes is evaluated as one of none."""
    (tmp_path / "list.csv").write_text(f"path,label\n{world.root}/whole/dark/0.mkv,a|b\n{world.root}/whole/light/0.mkv,a\n")
    options = PrepareOptions(short_side=24, workers=1)
    prepare(read_list(tmp_path / "list.csv"), tmp_path / "shards", options, console=Console(file=io.StringIO()))
    with pytest.raises(UserError, match=r"1 of 2 samples in .* have several classes, and an SVM tells one from another"):
        evaluate_svm(SvmOptions(world.checkpoint, tmp_path / "shards"))


def test_a_sound_that_cancels_itself_is_none(tmp_path: Path) -> None:
    """Red if a video whose channels are of opposite sign is skipped although mute ones are kept."""
    (tmp_path / "videos").mkdir()
    sound = noise(1.6)
    film(tmp_path / "videos" / "a.mkv", 10, sounds=[Sound(np.stack([sound, -sound]), layout="stereo")])
    assert run(tmp_path / "videos", tmp_path / "kept", missing_audio="keep-as-video-only").without_audio == 1
    with pytest.raises(UserError, match="none of 1 videos could be used: 1 silent_audio"):
        run(tmp_path / "videos", tmp_path / "skipped")


@pytest.mark.parametrize("codec", ["mosaic", "yuv", "vp9"])
def test_every_codec_keeps_what_is_there(world: SimpleNamespace, tmp_path: Path, codec: str) -> None:
    """Red if a codec that is decoded another way than MJPEG needs a sound beside its pictures."""
    run(world.root / "mute", tmp_path / "shards", codec=codec, **KEEP)
    config, shards = world.config, ShardSet.open(tmp_path / "shards")
    sizes = (config.model, config.mel, config.data)
    found = list(clips(shards, *sizes, per_sample=1, batch_size=8, modalities=("video",)))
    expected = list(clips(ShardSet.open(world.shards / "mute"), *sizes, per_sample=1, batch_size=8, modalities=("video",)))
    assert len(shards) == 8 and not shards.has_audio.any()
    torch.testing.assert_close(found[0].views.video_global, expected[0].views.video_global, atol=0.1, rtol=0)


def test_sounds_alone_know_no_codec(world: SimpleNamespace, tmp_path: Path) -> None:
    """Red if sounds are refused for a codec that no sample of theirs is in."""
    run(world.root / "sounds", tmp_path / "shards", codec="h264", **KEEP)
    config = world.config
    sizes = (config.model, config.mel, config.data)
    (found,) = clips(ShardSet.open(tmp_path / "shards"), *sizes, per_sample=1, batch_size=8, modalities=("audio",))
    assert found.views.audio_global.isfinite().all()
