"""The command line: help, wrong input, and what the commands print."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

import pytest

from tests.data.media import noise, write_video
from tests.data.zoo import SECOND, endless
from xkd_fast import cli, doctor
from xkd_fast.amounts import amount_of
from xkd_fast.data.shards import ShardSet
from xkd_fast.data.synthetic import SyntheticOptions
from xkd_fast.errors import UserError
from xkd_fast.model.options import option

ROOT = Path(__file__).parent.parent


def run(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """The installed command, in a process of its own."""
    command = [sys.executable, "-m", "xkd_fast.cli", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120)


def test_help_teaches(capsys):
    """Catches a command left out of the help, or examples with a command that does not exist."""
    with pytest.raises(SystemExit) as stop:
        cli.main(["--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    for name, command in cli.COMMANDS.items():
        assert f"  {name} " in shown and command.summary in shown
    examples = [line.split()[1] for line in shown.splitlines() if line.strip().startswith("xkd-fast ")]
    assert len(examples) >= 4
    assert set(examples) - {"COMMAND"} <= set(cli.COMMANDS)


def test_version_is_the_installed_one(capsys: pytest.CaptureFixture[str]) -> None:
    """Red if ``--version`` needs a command, names another program, or another version than what pip has installed."""
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"xkd-fast {metadata.version('xkd-fast')}\n"


@pytest.mark.parametrize("name", sorted(cli.COMMANDS))
def test_every_command_explains_itself(capsys, name):
    """Catches a command whose own --help fails, or lacks a usage line."""
    with pytest.raises(SystemExit) as stop:
        cli.main([name, "--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert shown.startswith("usage: ") and "examples:" in shown


@pytest.mark.parametrize("arguments", [[], ["trian"], ["--nothing"]])
def test_a_command_line_without_a_command_shows_the_usage(capsys, arguments):
    """Catches a silent success where nothing was done."""
    try:
        code = cli.main(arguments)
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    shown = capsys.readouterr()
    assert shown.out == "" and "usage: xkd-fast COMMAND" in shown.err


WRONG_INPUT = [
    (("train", "--config", "nowhere.yaml"), "configuration file nowhere.yaml does not exist; name a YAML file"),
    (("train", "train.epoch=2"), "train.epoch is not an option; the nearest one is train.epochs"),
    (("train", "--config", "xkd_base_k400", "model.video.size=113"), "model.video.size = 113 must be a positive multiple of"),
    (("prepare", "{tmp}", "{tmp}/shards"), "holds no video; files with one of these endings count"),
    (("prepare", "{tmp}/nowhere", "{tmp}/shards"), "nowhere is not a folder; name the folder that holds the videos"),
    (("prepare", "{tmp}", "{tmp}/shards", "--codec", "mjpeg", "--quality", "99"), "quality = 99 must lie in 2-31 for mjpeg"),
    (("render", "{root}"), "so it was not rendered by xkd-fast; choose an empty folder"),
    (("render", "{tmp}", "--clips-per-class", "0"), "clips_per_class = 0 must be 1 or more"),
    (("render", "{root}/setup.py"), "setup.py cannot be made a folder (File exists); name another one for the clips"),
    (("render", "{root}/setup.py/videos"), "setup.py/videos cannot be made a folder (Not a directory); name another one"),
    (("demo", "--processes", "0"), "--processes 0 must be 1 or more"),
    (("demo", "--config", "xkd_base_k400"), "has no data.demo section"),
    (("demo", "data.train=[somewhere]"), "data.train = ['somewhere']: the demo trains and evaluates on what it renders"),
    (("doctor", "--shards", "{tmp}/nowhere"), "nowhere"),
    (("profile", "--json", "{tmp}/nowhere/step.json"), "--json {tmp}/nowhere/step.json cannot be written"),
    (("profile", "model.cuda_graph=true"), "model.cuda_graph = true hides the parts of the step"),
    (("render", "{tmp}", "--fps", "many"), "argument --fps: invalid int value: 'many'"),
    (("prepare", "", "{tmp}/shards"), "SOURCE is empty, such as of a shell variable that is not set; write . for this folder"),
    (("prepare", "{tmp}", ""), "DESTINATION is empty"),
    (("prepare", "{tmp}", "{tmp}/shards", "--retry", "--dry-run"), "--retry converts, --audit and --dry-run only look"),
    (
        ("doctor", "--shards", "s3://bucket/shards"),
        "s3://bucket/shards is no place of shards: they are read from folders and by",
    ),
]


@pytest.mark.parametrize(("arguments", "sentence"), WRONG_INPUT)
def test_wrong_input_ends_with_one_sentence(tmp_path, capsys, arguments, sentence):
    """Catches exceptions for a user's mistake, exit code 0, and messages on standard output."""
    try:
        code = cli.main([argument.format(root=ROOT, tmp=tmp_path) for argument in arguments])
    except SystemExit as stop:  # argparse's own way
        code = stop.code
    shown = capsys.readouterr()
    assert (code, shown.out) == (2, "")
    assert sentence.replace("{tmp}", str(tmp_path)) in shown.err


def test_a_path_to_resume_from_is_taken_as_it_is(capsys):
    """Catches a path that is read as YAML: commas, brackets and colons are part of a name."""
    assert cli.main(["train", "--resume", "odd, [name: ", "--print-config"]) == 0
    assert 'resume: "odd, [name: "' in capsys.readouterr().out


@pytest.mark.parametrize(("arguments", "sentence"), [WRONG_INPUT[1], WRONG_INPUT[6]])
def test_wrong_input_shows_no_traceback(arguments, sentence):
    """Catches a traceback or a lost exit code on the way out of a real process."""
    result = run(*(argument.format(root=ROOT) for argument in arguments))
    assert result.returncode == 2, result.stderr
    assert result.stderr.startswith("error: ") and sentence in result.stderr
    assert "Traceback" not in result.stderr and result.stdout == ""


def test_print_config_prints_what_load_config_reads(tmp_path):
    """Catches output mixed with log lines: the printed file must be usable as a configuration."""
    from xkd_fast.config import load_config

    result = run("train", "--config", "mas_base_k400", "--print-config", "train.epochs=7")
    assert result.returncode == 0, result.stderr
    path = tmp_path / "printed.yaml"
    path.write_text(result.stdout, encoding="utf-8")
    assert load_config(path) == load_config("mas_base_k400", ["train.epochs=7"])


def test_an_interrupt_is_no_error_report(monkeypatch, capsys):
    """Catches a traceback on Ctrl-C."""

    def interrupted(arguments: list[str]) -> int:
        raise KeyboardInterrupt

    monkeypatch.setitem(cli.COMMANDS, "train", cli.Command("", interrupted))
    assert cli.main(["train"]) == 130
    assert "Traceback" not in capsys.readouterr().err


def test_a_reader_that_goes_away_is_no_error_report():
    """Catches a traceback in `xkd-fast … | head -1`."""
    program = (
        "import sys; from xkd_fast import cli\ncli.COMMANDS['train'] = cli.Command('', lambda a: print('x' * 10**6) or 0)\n"
    )
    program += "sys.exit(cli.main(['train']))"
    process = subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    error = process.stderr.read()
    process.stderr.close()
    assert process.wait(timeout=60) == 1
    assert error == ""


def test_render_writes_a_data_set_and_keeps_what_is_there(tmp_path, capsys):
    """Catches arguments that do not reach the renderer, and a second run that renders everything anew."""
    arguments = ["render", str(tmp_path / "videos"), "--clips-per-class", "1", "--classes", "orbit", "flash", "--workers", "1"]
    arguments += ["--seconds", "0.5", "0.6", "--width", "32", "--height", "32"]
    assert cli.main(arguments) == 0
    assert "2 clips of 2 classes, 2 of them rendered now" in capsys.readouterr().out
    assert sorted(path.parent.name for path in (tmp_path / "videos").rglob("*.mp4")) == ["flash", "orbit"]
    assert cli.main(arguments) == 0
    assert "2 clips of 2 classes, 0 of them rendered now" in capsys.readouterr().out


def test_render_tells_what_its_classes_are(capsys: pytest.CaptureFixture[str]) -> None:
    """Red if a class is listed by its name alone, which does not tell what is seen and heard."""
    with pytest.raises(SystemExit):
        cli.main(["render", "--help"])
    shown = capsys.readouterr().out
    for name in SyntheticOptions().classes:
        assert re.search(rf"^  {name} +[A-Z][^;]+; .+\.$", shown, re.MULTILINE), name


def test_progress_without_a_terminal_is_a_line_a_tenth(capsys):
    """Catches hours of silence in a log file, and a line for every clip."""
    with cli.progress_bar("rendering") as show:
        for done in range(3, 26):
            show(done, 25)
    lines = [f"rendering: {done} of 25" for done in (3, 5, 8, 10, 13, 15, 18, 20, 23, 25)]
    assert capsys.readouterr().err.splitlines() == lines


def test_prepare_tells_what_it_wrote_and_what_it_skipped(tmp_path, capsys):
    """Catches arguments that do not reach the conversion, and skipped videos that go unmentioned."""
    videos, shards = tmp_path / "videos", tmp_path / "shards"
    small = ["--seconds", "0.5", "0.6", "--width", "32", "--height", "32", "--workers", "1"]
    assert cli.main(["render", str(videos), "--clips-per-class", "2", "--classes", "flash", *small]) == 0
    (videos / "flash" / "torn.mp4").write_bytes(b"not a video")
    capsys.readouterr()
    assert cli.main(["prepare", str(videos), str(shards), "--short-side", "16", "--fps", "4", "--workers", "1"]) == 0
    shown = capsys.readouterr().out
    assert f"{shards}: 2 samples in 1 shard, 3 videos handled now" in shown
    assert f"1 of 3 videos skipped (1 unreadable); listed in {shards}/report.csv" in shown
    manifest = json.loads((shards / "manifest.json").read_text(encoding="utf-8"))
    assert (manifest["fps"], manifest["short_side"], manifest["samples"]) == (4, 16, 2)


def test_prepare_names_the_way_out_of_what_it_skipped(tmp_path, capsys):
    """Red if a user has to search the help for what keeps silent videos, or gives slow ones more time."""
    videos, shards = tmp_path / "videos", tmp_path / "shards"
    videos.mkdir()
    write_video(videos / "a.mkv", SECOND, sound=noise(1))
    write_video(videos / "silent.mkv", SECOND)
    endless(videos / "slow.mkv")
    prepare = ["prepare", str(videos), str(shards), "--short-side", "16", "--workers", "2"]
    assert cli.main([*prepare, "--seconds-per-file", "2.5"]) == 0
    shown = capsys.readouterr().out
    assert f"{shards}: 1 sample in 1 shard, 3 videos handled now" in shown
    assert "; --missing-audio keep-as-video-only, with another DESTINATION, keeps videos without sound" in shown
    assert "; --seconds-per-file 25 --retry, with this DESTINATION, gives what timed out more time" in shown
    (videos / "slow.mkv").unlink()
    prepare[2] = str(tmp_path / "others")
    assert cli.main([*prepare, "--missing-audio", "keep-as-video-only"]) == 0
    shown = capsys.readouterr().out
    assert "1 sample has no sound" in shown and "--" not in shown


def test_prepare_help_tells_what_options_leave_and_widen(capsys):
    """Red if --retry seems to try all again, or --missing-video to change nothing about which files count."""
    with pytest.raises(SystemExit):
        cli.main(["prepare", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "if the file's size has changed since; without such a change, truncated, no_video and no_audio are never" in shown
    assert "then sound files of a folder count too (.wav, .flac" in shown


@pytest.mark.parametrize(
    ("count", "words"), [(0, "0 bytes"), (999, "999 bytes"), (34_800, "34.8 kB"), (5e6, "5 MB"), (1.25e12, "1.25 TB")]
)
def test_amounts_are_readable(count, words):
    """Red if small amounts are told as parts of a GB."""
    assert amount_of(count) == words


@dataclass(frozen=True)
class Sample:
    """Options of every kind of field."""

    count: int = option(3, "a count, 100 % sure")
    share: float = option(0.5, "a share")
    kind: Literal["a", "b"] = option("a", "a choice")
    pair: tuple[float, float] = option((1.0, 2.0), "two numbers")
    names: tuple[str, ...] = option(("x",), "names")
    limit: int | None = option(None, "a limit; none = off")
    fast: bool = option(False, "a switch")

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"count = {self.count} must be 1 or more")


def test_options_become_arguments(capsys):
    """Catches a kind of field that is read as text, loses its default, or whose documentation breaks argparse."""
    parser = cli._command_parser("sample", "description", "")
    cli.add_options(parser, Sample)
    assert cli.read_options(parser.parse_args([]), Sample) == Sample()
    given = ["--count", "4", "--share", ".25", "--kind", "b", "--pair", "3", "4", "--names", "p", "q", "--limit", "9", "--fast"]
    assert cli.read_options(parser.parse_args(given), Sample) == Sample(4, 0.25, "b", (3.0, 4.0), ("p", "q"), 9, True)
    assert cli.read_options(parser.parse_args(["--limit", "none"]), Sample).limit is None
    with pytest.raises(UserError, match="count = 0 must be 1 or more"):
        cli.read_options(parser.parse_args(["--count", "0"]), Sample)
    with pytest.raises(SystemExit):
        parser.parse_args(["--kind", "c"])
    parser.print_help()
    assert "a count, 100 % sure (default: 3)" in capsys.readouterr().out


def test_doctor_tells_found_missing_and_broken_apart(monkeypatch):
    """Catches a crash or a hang of one package that takes the whole report along, and noise taken for an answer."""
    monkeypatch.setattr(doctor, "SECONDS", 3)
    checks = [
        doctor.Check("noisy", "import os; os.write(1, b'hello\\n'); return 'version 1'", "a"),
        doctor.Check("absent", "import a_package_that_does_not_exist", "b"),
        doctor.Check("nothing", "raise LookupError", "c"),
        doctor.Check("faulty", "raise RuntimeError('two\\nlines')", "d"),
        doctor.Check("crash", "import os; os.kill(os.getpid(), 9)", "e"),
        doctor.Check("hang", "import time; time.sleep(60)", "f"),
    ]
    findings = {finding.name: finding for finding in doctor.examine(checks)}
    assert findings["noisy"] == doctor.Finding("noisy", "found", "version 1", "")
    assert findings["absent"] == doctor.Finding("absent", "missing", "", "b")
    assert findings["nothing"] == doctor.Finding("nothing", "missing", "", "c")
    assert findings["faulty"] == doctor.Finding("faulty", "broken", "RuntimeError: two lines", "d")
    assert findings["crash"] == doctor.Finding("crash", "broken", f"the process ended with code {-signal.SIGKILL}", "e")
    assert findings["hang"] == doctor.Finding("hang", "broken", "gave no answer within 3 s", "f")


def test_doctor_prints_a_table_or_json(monkeypatch, capsys):
    """Catches findings that are lost in printing, and an exit code that fails a script on a machine without a GPU."""
    checks = [check for check in doctor.CHECKS if check.name in ("Python", "C++ compiler", "ninja")]
    monkeypatch.setattr(doctor, "CHECKS", [*checks, doctor.Check("[odd]", "raise LookupError", "install [it]")])
    assert cli.main(["doctor", "--json"]) == 0
    findings = json.loads(capsys.readouterr().out)
    assert [finding["name"] for finding in findings] == ["Python", "C++ compiler", "ninja", "[odd]"]
    assert findings[0]["status"] == "found" and sys.version.split()[0] in findings[0]["detail"]
    assert cli.main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert "[odd]" in shown and "install [it]" in shown


def flip_a_bit(shards: Path, key: str, part: str) -> None:
    """Damage a part of a sample in whichever tar of a folder holds it."""
    for tar in shards.glob("*.tar"):
        with tarfile.open(tar) as archive:
            found = [member for member in archive if member.name.startswith(key) and member.name.endswith(part)]
        if found:
            break
    (member,) = found
    data = bytearray(tar.read_bytes())
    data[member.offset_data + member.size // 2] ^= 1
    tar.write_bytes(data)


def test_doctor_lists_every_shard_that_is_broken(tmp_path, capsys):
    """Red if it stops at the first one, so that a set is mended one call at a time, or leaves the whole ones unread."""
    small = ["--seconds", "0.5", "0.6", "--width", "32", "--height", "32", "--workers", "1", "--classes", "flash"]
    assert cli.main(["render", str(tmp_path / "videos"), "--clips-per-class", "26", *small]) == 0
    shards = tmp_path / "shards"
    prepare = ["--short-side", "16", "--min-seconds", "0.1", "--workers", "1", "--codec", "mjpeg", "--samples-per-shard", "1"]
    assert cli.main(["prepare", str(tmp_path / "videos"), str(shards), *prepare]) == 0
    whole = ShardSet.open(shards)
    flip_a_bit(shards, whole.keys[25], "flac")
    (shards / "shard-000000.tar").unlink()
    (shards / "shard-000001.index.json").unlink()
    os.truncate(shards / "shard-000002.tar", 100)
    (shards / "shard-000003.index.json").write_text("{}")
    capsys.readouterr()
    assert cli.main(["doctor", "--shards", str(shards)]) == 1
    shown = capsys.readouterr().out
    assert "22 samples read, 1 damaged; 4 shards broken" in shown and shown.count("CRC") == 1
    assert all(f"shard-00000{number}" in shown for number in range(4)) and "shard-000004" not in shown
    for number in range(4, 25):
        (shards / f"shard-{number:06d}.tar").unlink()
    assert cli.main(["doctor", "--shards", str(shards)]) == 1
    shown = capsys.readouterr().out
    assert shown.count("shard-") == 21 and "and 5 more like these; --json lists all" in shown
    assert "1 samples read, 1 damaged; 25 shards broken" in shown
    assert cli.main(["doctor", "--shards", str(shards), "--json"]) == 1
    assert len(json.loads(capsys.readouterr().out)["broken_shards"]) == 25


def test_doctor_reads_shards_through(tmp_path, capsys):
    """Red if damage goes unseen in any sample, part or folder, or samples of one key in two folders count as one."""
    small = ["--seconds", "0.5", "0.6", "--width", "32", "--height", "32", "--workers", "1", "--classes", "flash", "slide"]
    assert cli.main(["render", str(tmp_path / "videos"), "--clips-per-class", "2", *small]) == 0
    folders = [tmp_path / "first", tmp_path / "second"]
    prepare = ["--short-side", "16", "--min-seconds", "0.1", "--workers", "1", "--codec", "mjpeg"]
    assert cli.main(["prepare", str(tmp_path / "videos"), str(folders[0]), *prepare]) == 0
    shutil.copytree(*folders)
    examine = ["doctor", "--shards", *map(str, folders)]
    capsys.readouterr()
    assert cli.main(examine) == 0
    assert "8 samples read, 0 damaged" in capsys.readouterr().out
    sound, picture, both = ShardSet.open(folders[0]).keys[1:]
    flip_a_bit(folders[0], sound, "flac")
    flip_a_bit(folders[1], picture, "avi")
    for folder in folders:
        flip_a_bit(folder, both, "flac")
    assert cli.main(examine) == 1
    shown = capsys.readouterr().out
    assert (
        "8 samples read, 4 damaged" in shown
        and "delete these .tar files and call the same prepare of this version again" in shown
        and shown.count("CRC") == 4
    )
    assert cli.main([*examine, "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    first, second = folders
    assert found["samples"] == 8
    assert list(found["damaged"]) == [f"{first}/{sound}", f"{first}/{both}", f"{second}/{picture}", f"{second}/{both}"]
    assert all("CRC" in reason for reasons in found["damaged"].values() for reason in reasons)


@pytest.mark.slow
def test_doctor_finds_what_the_tests_run_on():
    """Catches a look that misreads an installed package: here everything that training needs is installed."""
    findings = {finding.name: finding for finding in doctor.examine()}
    for name in ("PyTorch", "DALI", "DeepSpeed", "C++ compiler", "ninja", "Python headers", "PyAV, FFmpeg", "scikit-learn"):
        assert findings[name].status == "found", findings[name]
    assert all(finding.consequence for finding in findings.values() if finding.status != "found")
