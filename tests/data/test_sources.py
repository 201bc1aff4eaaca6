"""Lists of sources, parts and several classes: what a csv says is what shards hold, and what it gets wrong is named by line."""

from __future__ import annotations

import csv
import io
import json
import os
import re
from pathlib import Path

import pytest
from rich.console import Console

from tests.data.media import noise, numbered, write_video
from xkd_fast import cli
from xkd_fast.amounts import amount_of
from xkd_fast.data.prepare import PLAN, PrepareOptions, PrepareReport, prepare, standing_shards
from xkd_fast.data.shards import MANIFEST, ShardSet
from xkd_fast.data.sources import SourceSet, read_list
from xkd_fast.errors import UserError

SMALL = PrepareOptions(short_side=16, samples_per_shard=3, workers=1)
BAD_UTF8 = os.fsdecode(b"\xff\xfe")


def run(source: Path | SourceSet, destination: Path, options: PrepareOptions = SMALL) -> PrepareReport:
    return prepare(source, destination, options, console=Console(file=io.StringIO()))


def rows(destination: Path) -> dict[str, dict[str, str]]:
    with open(destination / "report.csv", newline="", encoding="utf-8") as file:
        return {row["source"]: row for row in csv.DictReader(file)}


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three films of 2 s, one of them with a comma in its name."""
    folder = tmp_path_factory.mktemp("media")
    (folder / "sub").mkdir()
    for name in ("a.mkv", "sub/b.mkv", "sub/c, d.mkv"):
        write_video(folder / name, [numbered(k, 24, 32) for k in range(50)], sound=noise(2.0))
    return folder


def write(folder: Path, text: str, name: str = "list.csv") -> Path:
    path = folder / name
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    return path


def test_a_csv_gives_files_classes_and_parts(media: Path, tmp_path: Path) -> None:
    """Red if a label, a part or a class of several gets lost between the list, the index and the sample's own description."""
    listed = write(
        media,
        "path,label,start,end\r\na.mkv,dog,,\r\nsub/b.mkv,cat|dog,0.5,1.5\r\nsub/b.mkv,,1.5,\r\n"
        f'"sub/c, d.mkv",cat,,1\r\n{media}/sub/../a.mkv,cat,1,2\r\ngone.mkv,bird,,\r\n',
    )
    sources = read_list(listed)
    assert sources.classes == ["bird", "cat", "dog"] and [source.name for source in sources.missing] == ["gone.mkv"]
    report = run(sources, tmp_path / "shards")
    assert (report.written, dict(report.skipped)) == (5, {"missing": 1})
    shards, found = ShardSet.open(tmp_path / "shards"), rows(tmp_path / "shards")
    assert found["gone.mkv"]["reason"] == "missing" and len(found) == 6
    expected = {
        "a.mkv": (16, ("dog",)),
        "sub/b.mkv#t=0.5,1.5": (8, ("cat", "dog")),
        "sub/b.mkv#t=1.5": (4, ()),
        "sub/c, d.mkv#t=0,1": (8, ("cat",)),
        f"{media}/sub/../a.mkv#t=1,2": (8, ("cat",)),
    }
    for index in range(5):
        details = shards.details(index)
        frames, classes = expected.pop(details["source"])
        assert (int(shards.frames[index]), tuple(details["classes"])) == (frames, classes)
        numbers = tuple(shards.classes.index(name) for name in classes)
        assert shards.labels_of(index) == numbers
        assert shards.labels[index] == (numbers[0] if len(numbers) == 1 else -1)
        assert details.get("labels") == (list(numbers) if len(numbers) > 1 else None)
        assert details["class"] == (classes[0] if len(classes) == 1 else None)
    assert not expected and shards.multi_label
    assert json.loads((tmp_path / "shards" / MANIFEST).read_text())["about"] == {"list": "list.csv"}


def test_columns_come_in_any_order(media: Path) -> None:
    """Red if a list whose first column is the label is read as one of paths."""
    (source,) = read_list(write(media, "label,end,path\ncat,1.5,a.mkv\n", "order.csv")).sources
    assert (source.name, source.classes, source.start, source.end) == ("a.mkv#t=0,1.5", ("cat",), None, 1.5)


def test_plain_lines_are_paths(media: Path, tmp_path: Path) -> None:
    """Red if commas, blank lines or odd names in a plain list are taken for more than a path."""
    odd = f"{BAD_UTF8} 鳥.mkv"
    (media / odd).unlink(missing_ok=True)
    (media / odd).symlink_to(media / "a.mkv")
    sources = read_list(write(media, f"\ufeffa.mkv\n\nsub/c, d.mkv\r\n#gone.mkv\n{odd}\n", "plain.txt"))
    assert [(source.name, source.missing) for source in sources.sources] == [
        ("a.mkv", False), ("sub/c, d.mkv", False), ("#gone.mkv", True), (odd, False),
    ]  # fmt: skip
    assert sources.classes == [] and run(sources, tmp_path / "shards").written == 3


@pytest.mark.parametrize(
    "text", ["path,label\ra.mkv,cat\rsub/b.mkv,cat\r", "label,path\rcat,a.mkv\rcat,sub/b.mkv", "a.mkv\rsub/b.mkv\r"]
)
def test_lines_of_old_macs_are_lines(media: Path, text: str) -> None:
    """Red if a list whose lines end in a carriage return alone is read as one long name."""
    sources = read_list(write(media, text, "mac.csv"))
    assert [source.name for source in sources.present] == ["a.mkv", "sub/b.mkv"]
    assert sources.classes == (["cat"] if "cat" in text else [])


def test_a_folder_in_a_list_is_told_as_one(media: Path, tmp_path: Path) -> None:
    """Red if a line that names a folder ends the run, or in a reason that nobody understands."""
    (tmp_path / "folder.mp4").mkdir()
    report = run(read_list(write(tmp_path, f"path\n{media}/a.mkv\nfolder.mp4\n")), tmp_path / "shards")
    assert (report.written, report.skipped) == (1, {"unreadable": 1})
    assert rows(tmp_path / "shards")["folder.mp4"]["detail"].startswith("a folder, not a file; list the files in it")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "lists no file; write one path a line, or a csv with the header path,label,start,end"),
        ("path,label\n", "lists no file"),
        ("path,label\na.mkv,x\na.mkv,y\n", "line 3: 'a.mkv' was named in line 2 already; remove one of the two"),
        ("a.mkv\nsub/../a.mkv\n", "line 2: 'sub/../a.mkv' was named in line 1 already"),
        ("path,start\na.mkv,0\na.mkv,\n", "line 3: 'a.mkv' was named in line 2 already"),
        ("path,start\na.mkv,soon\n", "line 2: start 'soon' is no number of seconds; write one such as 12.5, or nothing"),
        ("path,start\na.mkv,1_0\n", "line 2: start '1_0' is no number of seconds; write one such as 12.5, or nothing"),
        ("path,start\na.mkv,\u0663\n", "line 2: start '\u0663' is no number of seconds"),
        ("path,start\na.mkv,nan\n", "line 2: start = nan must be 0 or more seconds"),
        ("path,start\na.mkv,-1\n", "line 2: start = -1 must be 0 or more seconds"),
        ("path,start,end\na.mkv,3,2\n", "line 2: end = 2 must come after start = 3"),
        ("path,label\na.mkv\n", "line 2: 1 cells where the header has 2"),
        ("path,label\nsub/c, d.mkv,x\n", 'line 2: 3 cells where the header has 2; write " around a cell that holds a comma'),
        ("path,class\na.mkv,x\n", "line 1: the header path,class must hold path, and may hold label, start and end, each once"),
        ("path,label\n ,x\n", "line 2: the path is empty"),
        ('path,label\n"a.mkv,x\n', 'unexpected end of data; write it as csv, with " around cells that hold a comma'),
        ("gone.mkv\nlost.mkv\n", "none of the 2 files that it lists exists, such as .*gone.mkv; paths count from the list's"),
        ("file, 1.mkv\nlost.mkv\n", "such as .*file, 1.mkv; paths count from the list's"),
        (
            "filename,label\na.mkv,cat\n",
            "filename,label; its first line, 'filename,label', looks like a header of other names; "
            "write the header path[,label[,start[,end]]]",
        ),
        (
            "path;label\na.mkv;cat\n",
            "its first line, 'path;label', looks like a header of cells between semicolons; write them between commas, under",
        ),
        ("Video File\tclass\na.mkv\tcat\n", "looks like a header of cells between tabs; write them between commas, under the"),
        ("video_name,y\ra.mkv,cat\r", "its first line, 'video_name,y', looks like a header of other names"),
    ],
)
def test_what_a_list_gets_wrong_is_named(media: Path, text: str, words: str) -> None:
    """Red if a wrong line is skipped in silence, or ends in a traceback."""
    with pytest.raises(UserError, match=f"wrong.csv.*{words if '.*' in words else re.escape(words)}"):
        read_list(write(media, text, "wrong.csv"))


def test_a_list_that_is_not_there(tmp_path: Path) -> None:
    """Red if a mistyped name ends in a traceback."""
    with pytest.raises(UserError, match=r"gone\.csv, a list of sources, cannot be read: No such file"):
        read_list(tmp_path / "gone.csv")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("path,label\na.mkv,cat\nsub/b.mkv,cat\n", "this call names 2 or others, by name or class"),
        ("path,label,start\na.mkv,dog,1\nsub/b.mkv,cat,\n", "by name or class"),
    ],
)
def test_a_folder_is_continued_with_the_same_classes_only(media: Path, tmp_path: Path, text: str, words: str) -> None:
    """Red if a list whose labels or parts were changed goes on with the shards of the old ones."""
    run(read_list(write(media, "path,label\na.mkv,dog\nsub/b.mkv,cat\n", "same.csv")), tmp_path / "shards")
    with pytest.raises(UserError, match=words):
        run(read_list(write(media, text, "same.csv")), tmp_path / "shards")
    with pytest.raises(UserError, match=r'was prepared from \{"list": "same.csv"\}, this call names a folder of videos'):
        run(media, tmp_path / "shards")


def test_a_plan_of_fewer_options_is_gone_on_with(media: Path, tmp_path: Path) -> None:
    """Red if a set that was begun before an option existed is refused, or one that differs from its default is not."""
    run(media, tmp_path / "shards")
    plan = json.loads((tmp_path / "shards" / PLAN).read_text())
    del plan["options"]["missing_audio"]
    (tmp_path / "shards" / PLAN).write_text(json.dumps(plan))
    run(media, tmp_path / "shards")
    other = PrepareOptions(short_side=16, samples_per_shard=3, workers=1, missing_audio="keep-as-video-only")
    with pytest.raises(UserError, match="missing_audio = skip, this call asks for keep-as-video-only"):
        run(media, tmp_path / "shards", other)


def test_missing_files_do_not_thin_out_shards(media: Path, tmp_path: Path) -> None:
    """Red if a list of which most is missing gives a shard for every few samples that are there."""
    gone = "".join(f"gone{k}.mkv\n" for k in range(30))
    sources = read_list(write(media, f"{gone}a.mkv\nsub/b.mkv\nsub/c, d.mkv\n", "thin.txt"))
    report = run(sources, tmp_path / "shards")
    assert (report.written, report.shards, report.skipped["missing"]) == (3, 1, 30)
    assert len(rows(tmp_path / "shards")) == 33
    assert standing_shards(sources, tmp_path / "shards", SMALL) == 1


def test_what_cannot_be_reached_is_not_missing(media: Path, tmp_path: Path) -> None:
    """Red if a file behind a folder that nobody may enter is counted as one that does not exist, or its reason is not told."""
    (tmp_path / "loop").symlink_to("loop")
    listed = write(tmp_path, f"loop/a.mkv\n{media}/a.mkv\n{media}/a.mkv/b.mkv\nnowhere/a.mkv\n{'long' * 99}.mkv\n", "reach.txt")
    sources = read_list(listed)
    assert [source.missing for source in sources.sources] == [False, False, True, True, True]
    run(sources, tmp_path / "shards")
    row = rows(tmp_path / "shards")["loop/a.mkv"]
    assert row["reason"] == "unreadable" and re.fullmatch("it cannot be reached: .*symbolic links", row["detail"])


# -------------------------------------------------------------------------------------------------------- the command line


def test_dry_run_tells_and_writes_nothing(media: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Red if --dry-run leaves a file, or promises sizes that the real run is far from."""
    listed = write(
        media, "path,label,end\na.mkv,x,\nsub/b.mkv,x|y,1\nsub/c, d.mkv,,\ngone.mkv,y,\n".replace("sub/c, d", "sub/b")
    )
    options = ["--short-side", "16", "--workers", "1"]
    before = sorted(media.rglob("*"))
    assert cli.main(["prepare", "--list", str(listed), str(tmp_path / "shards"), "--dry-run", *options]) == 0
    shown = capsys.readouterr().out
    assert "3 sources in 2 classes: 1 shard of at most 512 samples, 0 of which are there already" in shown
    for line in (
        "  1 file is missing\n",
        "  1 is a part of a file\n",
        "  1 has several classes\n",
        "  1 has no class\n",
        f"  {amount_of(3 * (media / 'a.mkv').stat().st_size)} to read\n",
        "with 1 worker\n",
        "nothing was written",
    ):
        assert line in shown
    assert not list(tmp_path.iterdir()) and sorted(media.rglob("*")) == before
    assert cli.main(["prepare", "--list", str(listed), str(tmp_path / "shards"), *options]) == 0
    promised = re.search(r"about ([\d.]+) ([kM])B", shown)
    assert promised is not None
    written = sum(path.stat().st_size for path in (tmp_path / "shards").glob("*.tar"))
    assert 0.5 < float(promised[1]) * {"k": 1e3, "M": 1e6}[promised[2]] / written < 1.5
    capsys.readouterr()
    assert cli.main(["prepare", "--list", str(listed), str(tmp_path / "shards"), "--dry-run", *options]) == 0
    assert "1 of which is there already" in capsys.readouterr().out
    assert cli.main(["prepare", "--list", str(listed), str(tmp_path / "shards"), "--dry-run", "--fps", "4"]) == 2
    assert "was prepared with fps = 8.0, this call asks for 4.0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "no source is named: write xkd-fast prepare SOURCE DESTINATION, or --list FILE DESTINATION"),
        (["videos"], "no DESTINATION is named: name the folder of the shards, or ask with --dry-run or --audit"),
        (["--list", "l.csv", "videos", "shards"], "--list l.csv names the sources, so videos is one place too many"),
        (["--list", "l.csv", "--dataset", "ucf101", "shards"], "leave one of them out"),
        (["videos", "shards", "--split", "test"], "--split test says something of a data set; name it with --dataset"),
        (["videos", "shards", "--fold", "2"], "--fold 2 says something of a data set"),
        (["videos", "shards", "--audit"], "--audit writes no shards, so shards is one place too many"),
        (["videos", "--audit", "--dry-run"], "ask one at a time"),
        (["videos", "shards", "--plot", "a.png"], "--plot a.png goes with --audit"),
        (["videos", "--audit", "--json", "nowhere/a.json"], "--json nowhere/a.json cannot be written"),
    ],
)
def test_arguments_that_mean_nothing_are_refused(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Red if an argument is ignored in silence."""
    monkeypatch.chdir(tmp_path)
    assert cli.main(["prepare", *arguments]) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and words in shown.err
