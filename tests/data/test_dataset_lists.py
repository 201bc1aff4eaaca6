"""Lists of data sets as the official releases have them: whole, cut off, of another edition, or without the other side."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.data.releases import audioset, esc50, fsd50k, hmdb51, kinetics, opened, ucf101, vggsound, write_media
from xkd_fast import cli
from xkd_fast.data.datasets import DATASETS, open_dataset
from xkd_fast.errors import UserError

BUILDERS: dict[str, Callable[[Path, Path], Path]] = {
    "kinetics400": kinetics, "audioset": audioset, "vggsound": vggsound, "ucf101": ucf101, "hmdb51": hmdb51, "esc50": esc50,
    "fsd50k": fsd50k,
}  # fmt: skip


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_media(tmp_path_factory.mktemp("media"))


# ------------------------------------------------------------------------------------- lists of the official numbers of entries


def named(number: int) -> str:
    """A YouTube id."""
    return f"{number:011d}"


def kinetics_list(count: int, split: str, first: int) -> str:
    rows = (f"c{number % 400},{named(first + number)},0,10,{split}" for number in range(count))
    return "\n".join(["label,youtube_id,time_start,time_end,split", *rows]) + "\n"


def audioset_list(count: int, first: int, promised: int | None = None) -> str:
    heading = f"# num_ytids=1, num_segs={promised}\n" if promised else "# segments\n"
    return heading + "".join(f'{named(first + number)}, 0.000, 10.000, "/m/{number % 527}"\n' for number in range(count))


def vggsound_list(train: int, test: int) -> str:
    sides = ["train"] * train + ["test"] * test
    return "".join(f"{named(number)},0,c{number % 309},{side}\n" for number, side in enumerate(sides))


def ucf101_lists(train: int, test: int) -> dict[str, str]:
    videos = [f"C{number % 101}/v_C{number % 101}_x{number}.avi" for number in range(train + test)]
    return {
        "classInd.txt": "".join(f"{number + 1} C{number}\n" for number in range(101)),
        "trainlist02.txt": "\n".join(videos[:train]),
        "testlist02.txt": "\n".join(videos[train:]),
    }


def hmdb51_lists(train: int, test: int) -> dict[str, str]:
    marks = "\n".join(f"x{number}.avi {1 if number < train else 2}" for number in range(train + test))
    return {f"c{number}_test_split3.txt": marks.replace("x", f"c{number}_") for number in range(51)}


def esc50_list(each: int) -> str:
    rows = (f"{fold}-{number}.wav,{fold},{number % 50},c{number % 50}" for fold in range(1, 6) for number in range(each))
    return "filename,fold,target,category\n" + "\n".join(rows)


def fsd50k_lists(train: int, val: int, test: int) -> dict[str, str]:
    development = "\n".join(f"{number},c{number % 200},{'train' if number < train else 'val'}" for number in range(train + val))
    evaluation = "\n".join(f"e{number},c{number % 200}" for number in range(test))
    return {
        "vocabulary.csv": "".join(f"{number},c{number},/m/{number}\n" for number in range(200)),
        "dev.csv": f"fname,labels,split\n{development}",
        "eval.csv": f"fname,labels\n{evaluation}",
    }


AUDIOSET_CLASSES = "index,mid,display_name\n" + "".join(f"{number},/m/{number},c{number}\n" for number in range(527))

# The data set, what is asked of it, lists of a split whose official size a change by `more` entries misses, and a file of it.
Lists = Callable[[int], dict[str, str]]
OFFICIAL: list[tuple[str, dict[str, Any], Lists, int, str]] = [
    ("kinetics400", {"split": "val"}, lambda more: {"val.csv": kinetics_list(19906 + more, "val", 0)}, 19906,
     f"{named(0)}_000000_000010.mp4"),
    ("kinetics400", {"split": "test"}, lambda more: {"test.csv": kinetics_list(39805 + more, "test", 0)}, 39805,
     f"{named(0)}_000000_000010.mp4"),
    ("audioset", {}, lambda more: {
        "balanced_train_segments.csv": audioset_list(22160 + more, 0), "class_labels_indices.csv": AUDIOSET_CLASSES,
        "eval_segments.csv": audioset_list(20371, 30000)}, 22160, f"{named(0)}_0.mp4"),
    ("audioset", {"split": "eval"}, lambda more: {
        "eval_segments.csv": audioset_list(20371 + more, 0), "class_labels_indices.csv": AUDIOSET_CLASSES}, 20371,
     f"{named(0)}_0.mp4"),
    ("vggsound", {"split": "test"}, lambda more: {"vggsound.csv": vggsound_list(183730, 15446 + more)}, 15446,
     f"{named(183730)}_0.mp4"),
    ("ucf101", {"fold": 2}, lambda more: ucf101_lists(9586 + more, 3734), 9586, "v_C0_x0.avi"),
    ("ucf101", {"fold": 2, "split": "test"}, lambda more: ucf101_lists(9586, 3734 + more), 3734, "v_C92_x9586.avi"),
    ("hmdb51", {"fold": 3}, lambda more: hmdb51_lists(70 + more, 30), 3570, "c0_0.avi"),
    ("hmdb51", {"fold": 3, "split": "test"}, lambda more: hmdb51_lists(70, 30 + more), 1530, "c0_70.avi"),
    ("esc50", {"fold": 4, "split": "test"}, lambda more: {"esc50.csv": esc50_list(400 + more)}, 400, "4-0.wav"),
    ("fsd50k", {}, lambda more: fsd50k_lists(36796 + more, 4170, 10231), 36796, "0.wav"),
    ("fsd50k", {"split": "val"}, lambda more: fsd50k_lists(36796, 4170 + more, 10231), 4170, "36796.wav"),
    ("fsd50k", {"split": "test"}, lambda more: fsd50k_lists(36796, 4170, 10231 + more), 10231, "e0.wav"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "asked", "lists", "official", "file"), OFFICIAL)
def test_a_list_of_the_official_size_is_taken_and_one_that_is_cut_off_is_not(
    tmp_path: Path, name: str, asked: dict[str, Any], lists: Lists, official: int, file: str
) -> None:
    """Red if half a download passes for the data set, a whole one is refused, or a subset that is meant cannot be taken."""

    def lay(more: int) -> Path:
        root = tmp_path / f"{more}"
        root.mkdir()
        for place, text in lists(more).items():
            (root / place).write_text(text)
        (root / file).touch()
        return root

    found = open_dataset(name, lay(0), **asked)
    assert len(found.sources) == official and len(found.classes) == DATASETS[name].classes
    assert not [warning for warning in found.warnings if "official" in warning] and "subset" not in found.about
    short, long = lay(-1), lay(1)
    step = 51 if name == "hmdb51" else 1
    words = rf"lists {official - step} entries of \w+, the official release [\d or]*\b{official}\b.* add --subset, if"
    if name == "esc50":  # training, too, is a sound short of each other fold
        words = "lists 399 entries of test, the official release 400: it may have been cut off"
    with pytest.raises(UserError, match=words):
        open_dataset(name, short, **asked)
    meant = open_dataset(name, short, subset=True, **asked)
    assert len(meant.sources) == official - step and meant.about["subset"] is True
    assert any(f"the official release {official}" in warning or f" {official}" in warning for warning in meant.warnings)
    if name == "vggsound":  # between its two editions
        with pytest.raises(UserError, match=r"lists 15447 entries of test, the official release 15446 or 15496"):
            open_dataset(name, long, **asked)
        return
    warnings = open_dataset(name, long, **asked).warnings
    assert any("it is of another edition" in warning for warning in warnings)


@pytest.mark.parametrize("name", sorted(BUILDERS))
def test_a_small_release_is_refused_unless_it_is_meant(media: Path, tmp_path: Path, name: str) -> None:
    """Red if a data set has no official sizes at all, or the way out is not named."""
    root = BUILDERS[name](media, tmp_path)
    with pytest.raises(UserError, match=r"the official release \d+.*: it may have been cut off .*; or add --subset, if it was"):
        open_dataset(name, root)
    assert opened(name, root).about["subset"] is True


def test_a_list_of_the_other_side_that_is_cut_off_is_refused(tmp_path: Path) -> None:
    """Red if leaks are looked for in the half of a test list that arrived."""
    for place, text in ucf101_lists(9586, 3700).items():
        (tmp_path / place).write_text(text)
    with pytest.raises(UserError, match=r"testlist02\.txt lists 3700 entries of test, the official release 3734"):
        open_dataset("ucf101", tmp_path, fold=2)


def test_fewer_classes_than_official_are_refused(tmp_path: Path) -> None:
    """Red if a list of the right length whose classes are lost gives numbers on an easier task."""
    (tmp_path / "val.csv").write_text(kinetics_list(19906, "val", 0).replace("c7,", "c8,"))
    (tmp_path / f"{named(0)}_000000_000010.mp4").touch()
    with pytest.raises(UserError, match=r"Kinetics-400 has 399 classes, the official release 400: .*--subset"):
        open_dataset("kinetics400", tmp_path, split="val")


def test_kinetics_sound_is_counted_before_its_classes_are_chosen(media: Path, tmp_path: Path) -> None:
    """Red if a cut list of Kinetics-400 passes as Kinetics-Sound, of which no file says how large it is."""
    with pytest.raises(UserError, match=r"lists 3 entries of train, the official release 246534"):
        open_dataset("kinetics-sound", kinetics(media, tmp_path))


def test_audioset_lists_are_held_to_their_own_header(tmp_path: Path) -> None:
    """Red if the largest list, whose size only its header tells, may arrive in part; or one without that says nothing."""
    (tmp_path / "class_labels_indices.csv").write_text(AUDIOSET_CLASSES)
    (tmp_path / "eval_segments.csv").write_text(audioset_list(20371, 10_000_000))
    (tmp_path / f"{named(0)}_0.mp4").touch()
    lists = tmp_path / "unbalanced_train_segments.csv"
    lists.write_text(audioset_list(999, 0, promised=1000))
    with pytest.raises(UserError, match=r"unbalanced_train_segments\.csv lists 999 segments, its own header 1000: it may have"):
        open_dataset("audioset", tmp_path, split="unbalanced_train")
    found = open_dataset("audioset", tmp_path, split="unbalanced_train", subset=True)
    assert len(found.sources) == 999 and found.about["subset"] is True
    lists.write_text(audioset_list(1000, 0, promised=1000))
    assert not [
        warning for warning in open_dataset("audioset", tmp_path, split="unbalanced_train").warnings if "whole" in warning
    ]
    heading, rows = lists.read_text().split("\n", 1)
    lists.write_text(f"{heading}{'0' * 5000}\n{rows}")  # no number of anything
    warnings = open_dataset("audioset", tmp_path, split="unbalanced_train").warnings
    assert any("does not say how many segments it holds" in warning for warning in warnings)
    lists.write_text(audioset_list(1000, 0))
    warnings = open_dataset("audioset", tmp_path, split="unbalanced_train").warnings
    assert any("does not say how many segments it holds" in warning for warning in warnings)


# ----------------------------------------------------------------------------------------------------- lists that are not there


@pytest.mark.parametrize(
    ("name", "asked", "gone", "told"),
    [
        ("kinetics400", {}, ("val.csv",), "val.csv and test.csv of Kinetics-400 were not found"),
        ("kinetics400", {"split": "val"}, ("train.csv",), "train.csv and test.csv of Kinetics-400 were not found"),
        ("audioset", {}, ("eval_segments.csv",), "eval_segments.csv of AudioSet was not found"),
        ("audioset", {"split": "eval"}, ("balanced_train_segments.csv",), "balanced_train_segments.csv of AudioSet was not"),
        ("ucf101", {}, ("testlist01.txt",), "testlist01.txt of UCF101 was not found"),
        ("ucf101", {"split": "test"}, ("trainlist01.txt",), "trainlist01.txt of UCF101 was not found"),
        ("fsd50k", {}, ("eval.csv",), "eval.csv of FSD50K was not found"),
        ("fsd50k", {"split": "test"}, ("dev.csv",), "dev.csv of FSD50K was not found"),
    ],
)
def test_a_leak_that_nobody_looked_for_is_told(
    media: Path, tmp_path: Path, name: str, asked: dict[str, Any], gone: tuple[str, ...], told: str
) -> None:
    """Red if the comparison of the two sides is left out without a word, or reported as left out where it was made."""
    root = BUILDERS[name](media, tmp_path)
    if name == "kinetics400":
        (root / "annotations" / "test.csv").write_text("youtube_id,time_start,time_end\nEeeeeeeeeee,1,11\n")
    assert not [warning for warning in opened(name, root, **asked).warnings if "nobody has checked" in warning]
    for file in (*gone, *(["test.csv"] if name == "kinetics400" else [])):
        (path,) = root.rglob(file)
        path.unlink()
    (warning,) = [warning for warning in opened(name, root, **asked).warnings if "nobody has checked" in warning]
    assert (
        warning.startswith(told)
        and f"that the {asked.get('split', DATASETS[name].request(root, None, None, None).split)} split" in warning
    )


def test_the_two_training_lists_of_audioset_need_not_both_be_here(media: Path, tmp_path: Path) -> None:
    """Red if the balanced training list cannot be used without a word on two million other training segments."""
    root = audioset(media, tmp_path)
    (root / "unbalanced_train_segments.csv").unlink()
    assert not [warning for warning in opened("audioset", root).warnings if "nobody has checked" in warning]


# -------------------------------------------------------------------------------------------------- files named by an id alone

FIRST, SECOND, THIRD = named(1), named(2), named(3)


def audioset_of(root: Path, media: Path, starts: dict[str, float], files: dict[str, str]) -> Path:
    """Segments of 1 s by their starts, and which of the media are where."""
    rows = "".join(f'{name}, {start:.3f}, {start + 1:.3f}, "/m/0"\n' for name, start in starts.items())
    (root / "class_labels_indices.csv").write_text("index,mid,display_name\n0,/m/0,Speech\n")
    (root / "balanced_train_segments.csv").write_text(rows)
    for name, kind in files.items():
        shutil.copyfile(media / kind, root / name)
    return root


def parts_of(root: Path, **asked: Any) -> tuple[list[str], str]:
    """Names of the sources, and what is said of files named by an id alone."""
    found = opened("audioset", root, **asked)
    return [source.name for source in found.sources], " ".join(text for text in found.warnings if "id alone" in text)


def test_files_named_by_an_id_alone_are_what_their_lengths_tell(media: Path, tmp_path: Path) -> None:
    """Red if clips that are cut already are cut again, so that nothing is left of them, or whole videos pass for clips."""
    files = {f"{FIRST}.mkv": "film.mkv", f"{SECOND}.mkv": "film.mkv"}  # 0.52 s
    root = audioset_of(tmp_path, media, {FIRST: 30.0, SECOND: 2.0}, files)
    names, told = parts_of(root)
    assert names == [f"{FIRST}.mkv", f"{SECOND}.mkv"]
    assert "are taken for the clips, cut out already, by the lengths of 2 of them; --id-files videos says otherwise" in told
    assert parts_of(root, id_files="videos") == ([f"{FIRST}.mkv#t=30,31", f"{SECOND}.mkv#t=2,3"], "")
    for name in files:
        shutil.copyfile(media / "long.mkv", root / name)  # 3 s
    audioset_of(root, media, {FIRST: 2.0, SECOND: 1.5}, {})
    names, told = parts_of(root)
    assert names == [f"{FIRST}.mkv#t=2,3", f"{SECOND}.mkv#t=1.5,2.5"]
    assert "are taken for whole videos, of which the clip is cut out, by the lengths of 2 of them; --id-files clips" in told
    assert parts_of(root, id_files="clips") == ([f"{FIRST}.mkv", f"{SECOND}.mkv"], "")


def test_lengths_that_tell_two_things_are_refused(media: Path, tmp_path: Path) -> None:
    """Red if the first file decides for all, or the user is not told which is which."""
    files = {f"{FIRST}.mkv": "film.mkv", f"{SECOND}.mkv": "long.mkv"}
    root = audioset_of(tmp_path, media, {FIRST: 2.0, SECOND: 2.0}, files)
    words = rf"are of two kinds: 1 of 2 are as short as their clip \(such as .*{FIRST}\.mkv, 0\.6 s\), the others reach "
    with pytest.raises(UserError, match=rf"{words}further \(.*{SECOND}\.mkv, 3 s\); .*say with --id-files clips or"):
        parts_of(root)
    assert parts_of(root, id_files="clips")[0] == [f"{FIRST}.mkv", f"{SECOND}.mkv"]
    for name in files:
        (root / name).write_text("no video")
    with pytest.raises(UserError, match=r"named by a YouTube id alone, and none tells its length; say with --id-files"):
        parts_of(root)


def test_no_length_is_asked_for_where_the_answer_does_not_matter(media: Path, tmp_path: Path) -> None:
    """Red if files are opened for nothing: parts from the beginning, or files with a name of their own."""
    root = audioset_of(
        tmp_path, media, {FIRST: 0.0, SECOND: 30.0}, {f"{FIRST}.mkv": "film.mkv", f"{SECOND}_30.mkv": "film.mkv"}
    )
    (root / f"{FIRST}.mkv").write_text("no video")
    assert parts_of(root) == ([f"{FIRST}.mkv#t=0,1", f"{SECOND}_30.mkv"], "")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["--dataset", "ucf101", "--id-files", "clips"],
            "--id-files clips: files of UCF101 are not named by YouTube ids alone",
        ),
        (["--subset"], "--subset says something of a data set; name it with --dataset"),
        (["--id-files", "videos"], "--id-files videos says something of a data set; name it with --dataset"),
    ],
)
def test_options_that_mean_nothing_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    """Red if an option is passed over in silence where it has nothing to say."""
    assert cli.main(["prepare", str(tmp_path), str(tmp_path / "shards"), *arguments]) == 2
    assert words in capsys.readouterr().err


def test_the_choice_reaches_prepare(media: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Red if --subset and --id-files end at the command line."""
    root = audioset_of(tmp_path, media, {FIRST: 2.0, THIRD: 0.0}, {f"{FIRST}.mkv": "long.mkv"})
    arguments = ["prepare", "--dataset", "audioset", str(root), str(tmp_path / "shards"), "--dry-run", "--workers", "1"]
    assert cli.main(arguments) == 2
    assert "lists 2 entries of balanced_train, the official release 22160" in capsys.readouterr().err
    assert cli.main([*arguments, "--subset", "--id-files", "videos"]) == 0
    assert "1 is a part of a file" in capsys.readouterr().out
    assert cli.main([*arguments, "--subset", "--id-files", "clips"]) == 0
    assert "are parts of files" not in capsys.readouterr().out
