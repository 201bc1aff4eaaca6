"""The usual data sets, from small files in their official formats: the right files, classes and splits, and what is refused."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests.data.releases import (
    K400_HEADER,
    A,
    B,
    C,
    D,
    audioset,
    esc50,
    fsd50k,
    hmdb51,
    kinetics,
    opened,
    replace,
    ucf101,
    vggsound,
    write_media,
)  # fmt: skip
from xkd_fast import cli
from xkd_fast.data.datasets import DATASETS, describe
from xkd_fast.data.datasets.kinetics import SOUND_CLASSES
from xkd_fast.data.prepare import PrepareOptions, prepare
from xkd_fast.data.shards import MANIFEST, ShardSet
from xkd_fast.errors import UserError

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_media(tmp_path_factory.mktemp("media"))


def members(name: str, root: Path, **asked: Any) -> dict[str, tuple[str, ...]]:
    """Classes by source of a split, with the missing ones in brackets."""
    found = opened(name, root, **asked)
    return {f"[{source.name}]" if source.missing else source.name: source.classes for source in found.sources}


CASES: list[tuple[str, Callable[[Path, Path], Path], dict[str, Any], dict[str, tuple[str, ...]]]] = [
    ("kinetics400", kinetics, {}, {
        f"videos/zumba/{A}_000001_000011.mp4": ("zumba",), f"videos/{B}_000020_000030.mp4": ("abseiling",),
        f"[{C}_000000_000010]": ("zumba",)}),
    ("kinetics400", kinetics, {"split": "val"}, {f"videos/{D}_000005_000015.mp4": ("air, drumming",)}),
    ("audioset", audioset, {}, {
        f"{A}.mkv#t=1,2": ("Male speech, man speaking", "Speech"), f"balanced/{B}_30.000.mp4": ("Bark",)}),
    ("audioset", audioset, {"split": "train"}, {
        f"{A}.mkv#t=1,2": ("Male speech, man speaking", "Speech"), f"balanced/{B}_30.000.mp4": ("Bark",),
        f"[{D}_0]": ("Speech",)}),
    ("audioset", audioset, {"split": "eval"}, {f"eval/{C}_0_10.mp4": ("Bark", "Speech")}),
    ("vggsound", vggsound, {}, {
        f"{B}_000030.mp4": ("zebra braying",), f"[{C}_000000]": ("people marching",), f"x/{C}_000060.mp4": ("zebra braying",)}),
    ("vggsound", vggsound, {"split": "test", "id_files": "videos"}, {f"{A}.mkv#t=1,11": ("race car, auto racing",)}),
    ("ucf101", ucf101, {}, {
        "UCF-101/YoYo/v_YoYo_g08_c01.avi": ("YoYo",), "UCF-101/Archery/v_Archery_g08_c01.avi": ("Archery",)}),
    ("ucf101", ucf101, {"split": "test", "fold": 2}, {"UCF-101/YoYo/v_YoYo_g08_c01.avi": ("YoYo",)}),
    ("hmdb51", hmdb51, {}, {"wave/#1_(x)_wave.avi": ("wave",), "brush_hair/b_brush.avi": ("brush_hair",)}),
    ("hmdb51", hmdb51, {"split": "test"}, {"wave/b_wave.avi": ("wave",), "brush_hair/a_brush.avi": ("brush_hair",)}),
    ("hmdb51", hmdb51, {"split": "test", "fold": 2}, {"wave/#1_(x)_wave.avi": ("wave",)}),
    ("esc50", esc50, {}, {"audio/2-200-A-0.wav": ("rooster",), "audio/2-200-A-1.wav": ("dog",)}),
    ("esc50", esc50, {"split": "test"}, {"audio/1-100-A-0.wav": ("rooster",), "audio/1-100-A-1.wav": ("dog",)}),
    ("esc50", esc50, {"split": "test", "fold": 2}, {"audio/2-200-A-0.wav": ("rooster",), "audio/2-200-A-1.wav": ("dog",)}),
    ("fsd50k", fsd50k, {}, {"FSD50K.dev_audio/64760.wav": ("Bark", "Animal")}),
    ("fsd50k", fsd50k, {"split": "val"}, {"FSD50K.dev_audio/16399.wav": ("Zipper",)}),
    ("fsd50k", fsd50k, {"split": "dev"}, {
        "FSD50K.dev_audio/64760.wav": ("Bark", "Animal"), "FSD50K.dev_audio/16399.wav": ("Zipper",)}),
    ("fsd50k", fsd50k, {"split": "test"}, {"FSD50K.eval_audio/37199.wav": ("Animal",)}),
]  # fmt: skip
BUILDERS = {name: build for name, build, _, _ in CASES}
ORDERS = {
    "kinetics400": ["abseiling", "air, drumming", "zumba"],  # sorted, of all split files together
    "audioset": ["Speech", "Male speech, man speaking", "Bark"],
    "vggsound": ["people marching", "race car, auto racing", "zebra braying"],
    "ucf101": ["YoYo", "Archery"],
    "hmdb51": ["brush_hair", "wave"],
    "esc50": ["rooster", "dog"],
    "fsd50k": ["Zipper", "Bark", "Animal"],
}


@pytest.mark.parametrize(("name", "build", "asked", "expected"), CASES)
def test_a_split_holds_its_members_with_their_classes(
    media: Path, tmp_path: Path, name: str, build: Callable[[Path, Path], Path], asked: dict[str, Any], expected: dict[str, Any]
) -> None:
    """Red if a file is taken into another split or fold, gets another's class, or is not found under its official name."""
    assert members(name, build(media, tmp_path), **asked) == expected


@pytest.mark.parametrize("name", sorted(BUILDERS))
def test_classes_have_their_official_numbers(media: Path, tmp_path: Path, name: str) -> None:
    """Red if numbers follow the alphabet where an official order exists, or the split at hand where none does."""
    root = BUILDERS[name](media, tmp_path)
    for split in {"kinetics400": ("train", "val"), "audioset": ("train", "eval")}.get(name, DATASETS[name].splits):
        assert opened(name, root, split=split).classes == ORDERS[name]


@pytest.mark.parametrize(("name", "split", "written"), [("ucf101", "train", 2), ("hmdb51", "test", 2), ("esc50", "train", 2),
                                                        ("fsd50k", "dev", 2), ("audioset", "balanced_train", 2)])  # fmt: skip
def test_from_a_release_to_shards(
    media: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, split: str, written: int
) -> None:
    """Red if labels or parts are lost on the way to the shards, or a set without sound or pictures loses all its samples."""
    root, shards = BUILDERS[name](media, tmp_path / "release"), tmp_path / "shards"
    arguments = [
        "prepare",
        "--dataset",
        name,
        str(root),
        str(shards),
        "--split",
        split,
        "--short-side",
        "16",
        "--workers",
        "1",
        "--subset",
    ]
    assert cli.main(arguments) == 0
    shown = capsys.readouterr()
    assert f"{written} samples in 1 shard," in shown.out
    assert f"classes, the official release {DATASETS[name].classes}: a subset, as --subset says" in shown.err
    stored, sources = ShardSet.open(shards), opened(name, root, split=split)
    assert stored.classes == sources.classes
    expected = {
        source.name: tuple(sorted(sources.classes.index(label) for label in source.classes)) for source in sources.present
    }
    assert {stored.details(index)["source"]: stored.labels_of(index) for index in range(len(stored))} == expected
    manifest = json.loads((shards / MANIFEST).read_text())
    assert manifest["about"]["dataset"] == name and manifest["about"]["split"] == split
    sounds, mute = name in ("esc50", "fsd50k"), name in ("ucf101", "hmdb51")
    assert stored.has_video.tolist() == [not sounds] * written and stored.has_audio.tolist() == [not mute] * written
    assert (manifest["without_video"], manifest["without_audio"]) == (written * sounds, written * mute)
    lacking = "have no picture" if sounds else "have no sound" if mute else ""
    assert lacking in shown.out
    if name == "audioset":
        assert sorted(stored.frames.tolist()) == [4, 8]  # 0.52 s as it is, and 1 s of 3


def test_one_option_overrides_what_a_data_set_chooses(media: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Red if --missing-video skip is ignored for a set of sounds: nothing would ask before they are kept."""
    root = esc50(media, tmp_path / "release")
    arguments = [
        "prepare",
        "--dataset",
        "esc50",
        str(root),
        str(tmp_path / "shards"),
        "--workers",
        "1",
        "--missing-video",
        "skip",
        "--subset",
    ]
    assert cli.main(arguments) == 2
    assert "none of 2 videos could be used: 2 no_video" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------------- what is refused


WRONG_LINES = [
    ("kinetics400", "train.csv", "zumba,--abc", "zumba,-abc", "line 2: '-abcdefgh_' is no YouTube id, which has 11 letters"),
    ("kinetics400", "train.csv", "20,30", "30,20", "line 3: the end 20 does not come after the start 30"),
    ("kinetics400", "train.csv", "20,30", "soon,30", "line 3: start 'soon' is no number of 0 or more"),
    ("kinetics400", "train.csv", ",0,10,train", ",0,10,val", "line 4: split 'val' in the file of train"),
    ("kinetics400", "train.csv", "youtube_id", "id", "line 1: the header .* lacks youtube_id; the official file has"),
    ("kinetics400", "train.csv", ",0,10,train", ",0,10", "line 4: 4 cells where the header has 5; fetch the file again"),
    ("kinetics400", "train.csv", f"abseiling,{B},20,30", f"abseiling,{A},1,11",
     "is of class abseiling, in line 2 it was of class zumba"),
    ("audioset", "balanced_train_segments.csv", "/t/dd00003", "/t/dd9", "line 5: label '/t/dd9' is not in class_labels"),
    ("audioset", "balanced_train_segments.csv", ', "/t/dd00003"', "", "line 5: 3 cells where YTID, start_seconds, end_seconds"),
    ("audioset", "class_labels_indices.csv", "\n1,", "\n3,", "line 3: index '3' where 1 follows"),
    ("vggsound", "vggsound.csv", "zebra braying,train", "zebra braying,val", "line 2: split 'val' must be one of train, test"),
    ("ucf101", "classInd.txt", "2 Archery", "3 Archery", "line 2: '3 Archery' is not number 2"),
    ("ucf101", "trainlist01.txt", "g08_c01.avi 1", "g08_c01.avi 2", "line 1: class YoYo has number 2, in classInd.txt 1"),
    ("ucf101", "trainlist01.txt", "g08_c01.avi 1", f"g08_c01.avi {'1' * 5000}", "line 1: class YoYo has number 1+, in class"),
    ("ucf101", "trainlist01.txt", "YoYo/", "Yo/", "line 1: class 'Yo' is not in classInd.txt"),
    ("ucf101", "trainlist01.txt", "YoYo/v", "YoYo v", "line 1: 'YoYo v_YoYo_g08_c01.avi 1' is not CLASS/v_CLASS_gNN_cNN.avi"),
    ("hmdb51", "wave_test_split1.txt", "wave.avi 1", "wave.avi 3", "line 1: .* is not a file's name and 0, 1 or 2"),
    ("hmdb51", "wave_test_split1.txt", "c_wave.avi 0", "b_wave.avi 1", "line 3: b_wave.avi has mark 1, further up it has 2"),
    ("esc50", "esc50.csv", "2,1,dog", "2,1,cat", "line 5: target '1' and class 'cat' do not go together"),
    ("esc50", "esc50.csv", "2,1,dog", f"2,{'1' * 5000},dog", "line 5: target '1+' and class 'dog' do not go together"),
    ("esc50", "esc50.csv", "A-1.wav,2,", "A-1.wav,6,", "line 5: fold '6' must be one of 1, 2, 3, 4, 5"),
    ("esc50", "esc50.csv", "1,1,dog,False,1001,A\n2-200-A-0.wav,2,0,rooster,False,2000,A\n2-200-A-1.wav,2,1,dog",
     "1,1,dog,False,1001,A\n2-200-A-0.wav,2,0,rooster,False,2000,A\n2-200-A-1.wav,2,2,dog", "3 targets have 2 classes"),
    ("fsd50k", "dev.csv", "Bark,Animal", "Bark,Ghost", "line 2: label 'Ghost' is not in vocabulary.csv"),
    ("fsd50k", "dev.csv", "val", "test", "line 3: split 'test' must be one of train, val"),
    ("fsd50k", "vocabulary.csv", "1,Bark", "1,Zipper", "line 2: .* is not number 1 and the name of another class"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "file", "old", "new", "words"), WRONG_LINES)
def test_lines_that_are_not_as_published_are_named(
    media: Path, tmp_path: Path, name: str, file: str, old: str, new: str, words: str
) -> None:
    """Red if a damaged annotation file gives a split of its own, with other members or classes than all others evaluate on."""
    root = BUILDERS[name](media, tmp_path)
    replace(root, file, old, new)
    with pytest.raises(UserError, match=f"{re.escape(file)}, .*{words}"):
        opened(name, root)


@pytest.mark.parametrize(
    ("name", "asked", "file"),
    [
        ("kinetics400", {}, "train.csv"),
        ("audioset", {}, "class_labels_indices.csv"),
        ("audioset", {}, "balanced_train_segments.csv"),
        ("vggsound", {}, "vggsound.csv"),
        ("ucf101", {"split": "test", "fold": 2}, "testlist02.txt"),
        ("ucf101", {}, "classInd.txt"),
        ("esc50", {}, "esc50.csv"),
        ("fsd50k", {}, "vocabulary.csv"),
        ("fsd50k", {}, "dev.csv"),
        ("fsd50k", {"split": "test"}, "eval.csv"),
    ],
)
def test_a_missing_annotation_file_is_named_with_its_publisher(
    media: Path, tmp_path: Path, name: str, asked: dict[str, Any], file: str
) -> None:
    """Red if the user has to guess which file is lacking, where it belongs, or where to get it."""
    root = BUILDERS[name](media, tmp_path / "release")
    (path,) = root.rglob(file)
    path.unlink()
    published = re.escape(DATASETS[name].published)
    with pytest.raises(
        UserError, match=rf"{re.escape(file)}, an annotation .* not found in {re.escape(str(root))}, .*{published}"
    ):
        opened(name, root, **asked)


def test_annotations_may_lie_elsewhere(media: Path, tmp_path: Path) -> None:
    """Red if --annotations is not looked into, or what lies beside the media wins over it."""
    root = ucf101(media, tmp_path / "release")
    shutil.copytree(root / "ucfTrainTestlist", tmp_path / "lists")
    replace(root, "trainlist01.txt", "Archery/v_Archery_g08_c01.avi 2", "")
    assert len(members("ucf101", root)) == 1
    assert len(members("ucf101", root, annotations=tmp_path / "lists")) == 2
    assert len(members("ucf101", root / "UCF-101")) == 1  # its parent's ucfTrainTestlist
    with pytest.raises(UserError, match=r"classInd\.txt, an annotation file of UCF101, was not found in .*empty"):
        (tmp_path / "empty").mkdir()
        opened("ucf101", root, annotations=tmp_path / "empty")
    with pytest.raises(UserError, match=r"CLASS_test_split3\.txt, an annotation file of HMDB51, was not found"):
        opened("hmdb51", hmdb51(media, tmp_path / "hmdb"), fold=3)


LEAKS = [
    ("kinetics400", "val.csv", f'"air, drumming",{D},5,15,val', f"zumba,{A},1,11,val"),
    ("audioset", "eval_segments.csv", f"{C}, 0.000, 10.000", f"{A}, 1.000, 2.000"),
    ("vggsound", "vggsound.csv", f'{A},1,"race car, auto racing",test', f"{B},30,zebra braying,test"),
    ("ucf101", "testlist01.txt", "YoYo/v_YoYo_g01_c01.avi", "YoYo/v_YoYo_g08_c01.avi"),
    ("fsd50k", "eval.csv", "37199", "64760"),
]


@pytest.mark.parametrize(("name", "file", "old", "new"), LEAKS)
def test_an_entry_on_both_sides_of_a_split_is_refused(
    media: Path, tmp_path: Path, name: str, file: str, old: str, new: str
) -> None:
    """Red if a model may be tested on what it was trained on."""
    root = BUILDERS[name](media, tmp_path)
    replace(root, file, old, new)
    with pytest.raises(UserError, match=r"are in the other one too, such as .*training would see what is tested"):
        opened(name, root)


@pytest.mark.parametrize(
    ("name", "file", "old", "new"),
    [
        ("kinetics400", "val.csv", f"{D},5,15", f"{A},30,40"),
        ("ucf101", "testlist01.txt", "YoYo/v_YoYo_g01_c01.avi", "YoYo/v_YoYo_g08_c02.avi"),
        ("esc50", "esc50.csv", ",1001,", ",2001,"),
    ],
)
def test_parts_of_one_recording_on_both_sides_are_warned_of(
    media: Path, tmp_path: Path, name: str, file: str, old: str, new: str
) -> None:
    """Red if nobody hears that training and test share recordings; official lists hold none, but home-made ones may mean to."""
    root = BUILDERS[name](media, tmp_path)
    assert not [warning for warning in opened(name, root).warnings if "recordings" in warning]
    replace(root, file, old, new)
    (warning,) = [warning for warning in opened(name, root).warnings if "recordings" in warning]
    assert warning.startswith("1 of ") and "look better than they are" in warning


def test_entries_listed_twice_are_taken_once(media: Path, tmp_path: Path) -> None:
    """Red if a repeated line doubles a sample, or passes unmentioned."""
    root = kinetics(media, tmp_path)
    replace(root, "train.csv", f"zumba,{A},1,11,train\n", f"zumba,{A},1,11,train\n" * 3)
    found = opened("kinetics400", root)
    assert len(found.sources) == 3 and any("lists 2 entries twice" in warning for warning in found.warnings)


def test_missing_files_are_counted_listed_and_warned_of(media: Path, tmp_path: Path) -> None:
    """Red if a third of a split is gone and the numbers measured on the rest pass for the data set's."""
    root = kinetics(media, tmp_path / "release")
    found = opened("kinetics400", root)
    assert [source.name for source in found.missing] == [f"{C}_000000_000010"]
    assert any("1 of 3 files of the split (33 %) are missing" in warning for warning in found.warnings)
    options = PrepareOptions(short_side=16, workers=1)
    report = prepare(found, tmp_path / "shards", options, console=Console(file=io.StringIO()))
    assert (report.written, dict(report.skipped)) == (2, {"missing": 1})
    with open(tmp_path / "shards" / "report.csv", newline="") as file:
        listed = {row["source"]: row["reason"] for row in csv.DictReader(file)}
    assert listed[f"{C}_000000_000010"] == "missing" and len(listed) == 3
    shutil.copyfile(media / "film.mkv", root / f"{C}_000000_000010.mp4")
    assert not any("are missing" in warning for warning in opened("kinetics400", root).warnings)
    for path in root.rglob("*.mp4"):
        path.unlink()
    with pytest.raises(
        UserError, match=r"none of the 3 files of Kinetics-400's train split lies below .*looked for as ID_SSSSSS"
    ):
        opened("kinetics400", root)


def test_kinetics_files_of_deepminds_release(media: Path, tmp_path: Path) -> None:
    """Red if its names, its further column or its test list without labels is refused, or a label is made up for the latter."""
    root = kinetics(media, tmp_path)
    (root / "annotations" / "train.csv").rename(root / "annotations" / "kinetics_400_train.csv")
    (root / "annotations" / "val.csv").rename(root / "annotations" / "validate.csv")
    replace(root, "validate.csv", K400_HEADER, K400_HEADER.strip() + ",is_cc\n")
    replace(root, "validate.csv", "5,15,val", "5,15,validate,0")
    (root / "annotations" / "test.csv").write_text("youtube_id,time_start,time_end,split\nEeeeeeeeeee,1,11,test\n")
    shutil.copyfile(media / "film.mkv", root / "Eeeeeeeeeee_000001_000011.mkv")
    assert len(members("kinetics400", root)) == 3
    assert members("kinetics400", root, split="val") == {f"videos/{D}_000005_000015.mp4": ("air, drumming",)}
    assert members("kinetics400", root, split="test") == {"Eeeeeeeeeee_000001_000011.mkv": ()}
    assert opened("kinetics400", root, split="test").classes == ORDERS["kinetics400"]


def test_a_part_of_esc50_keeps_the_official_order(media: Path, tmp_path: Path) -> None:
    """Red if ESC-10, whose targets have gaps, is refused, or its classes are put in another order."""
    root = esc50(media, tmp_path)
    (path,) = root.rglob("esc50.csv")
    path.write_text(path.read_text().replace(",0,rooster", ",40,rooster").replace(",1,dog", ",10,dog"))
    found = opened("esc50", root)
    assert found.classes == ["dog", "rooster"] and len(found.present) == 2


def test_several_files_of_one_name(media: Path, tmp_path: Path) -> None:
    """Red if a class folder's own file gives way to a namesake elsewhere, or one file serves two entries."""
    root = hmdb51(media, tmp_path)
    (root / "about").mkdir()
    shutil.copyfile(root / "wave" / "b_wave.avi", root / "about" / "b_wave.avi")
    found = opened("hmdb51", root, split="test")
    assert "wave/b_wave.avi" in [source.name for source in found.sources]
    assert not any("several files" in warning for warning in found.warnings)
    (root / "wave" / "b_wave.avi").unlink()
    replace(root, "brush_hair_test_split1.txt", "a_brush.avi", "b_wave.avi")
    with pytest.raises(UserError, match=r"is the only file found for both .*b_wave.avi and .*b_wave.avi of HMDB51"):
        opened("hmdb51", root, split="test")


def test_kinetics_sound_takes_its_published_classes_or_those_that_its_user_lists(media: Path, tmp_path: Path) -> None:
    """Red if a class outside the list slips in, or a misspelt class goes unnoticed and its clips are left out."""
    root = kinetics(media, tmp_path)
    replace(root, "train.csv", f"zumba,{A}", f"tapping pen,{A}")
    shutil.copyfile(media / "film.mkv", root / f"{C}_000000_000010.mkv")
    found = opened("kinetics-sound", root)
    assert {source.classes for source in found.sources} == {("tapping pen",)} and found.classes == list(SOUND_CLASSES)
    (root / "kinetics_sound_classes.txt").write_text("zumba\nabseilen\n")
    with pytest.raises(UserError, match="line 2: 'abseilen' is no class of Kinetics-400"):
        opened("kinetics-sound", root)
    (root / "kinetics_sound_classes.txt").write_text("\n")
    with pytest.raises(UserError, match=r"kinetics_sound_classes\.txt names no class; write one a line"):
        opened("kinetics-sound", root)
    (root / "kinetics_sound_classes.txt").write_text("zumba\nair, drumming\n")
    found = opened("kinetics-sound", root)
    assert {source.classes for source in found.sources} == {("zumba",)} and found.classes == ["air, drumming", "zumba"]


def test_kinetics_sound_is_what_two_works_publish() -> None:
    """Red if a class is lost or misspelt: 32 in a list of XKD's first author, all but strumming guitar in AdaMML's of 31."""
    assert len(SOUND_CLASSES) == 32 and list(SOUND_CLASSES) == sorted(set(SOUND_CLASSES))
    instruments = "accordion bagpipes bass_guitar clarinet drums guitar harmonica keyboard organ piano saxophone trombone "
    instruments += "trumpet violin xylophone"
    others = "blowing_nose blowing_out_candles bowling chopping_wood dribbling_basketball laughing mowing_lawn ripping_paper "
    others += "shoveling_snow shuffling_cards singing stomping_grapes tap_dancing tapping_guitar tapping_pen tickling"
    adamml = [f"playing_{name}" for name in instruments.split()] + others.split()
    assert {*SOUND_CLASSES} - {name.replace("_", " ") for name in adamml} == {"strumming guitar"} and len(adamml) == 31


@pytest.mark.parametrize(
    ("name", "asked", "words"),
    [
        ("ucf", {}, "--dataset ucf is not known; known are kinetics400, .*--list FILE takes any other"),
        ("ucf101", {"split": "val"}, "--split val is none of UCF101's: train, test"),
        ("ucf101", {"fold": 4}, "--fold 4 must lie in 1-3 for UCF101"),
        ("kinetics400", {"fold": 1}, "--fold 1: Kinetics-400 has one split only"),
        ("ucf101", {"annotations": "nowhere"}, "--annotations nowhere is not a folder"),
    ],
)
def test_what_a_data_set_has_not_is_refused(tmp_path: Path, name: str, asked: dict[str, Any], words: str) -> None:
    """Red if a mistyped split or fold is answered with the first one."""
    with pytest.raises(UserError, match=words):
        opened(name, tmp_path, **asked)


def test_every_data_set_is_described() -> None:
    """Red if a data set is missing from --help or from the README's table, or promises options that prepare has not."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for name, dataset in DATASETS.items():
        assert f"  {name} " in describe() and f"`{name}`" in readme
        PrepareOptions(**dataset.options)
