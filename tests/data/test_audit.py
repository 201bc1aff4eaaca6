"""What a pile holds: every kind of file counted for what it is, bad ones with a reason, nothing written."""

from __future__ import annotations

import io
import json
import os
import shutil
import time
from pathlib import Path

import av
import numpy as np
import pytest
from rich.console import Console

from tests.data.media import noise, numbered, write_video
from xkd_fast import cli
from xkd_fast.data.audit import Audit, audit, write_json
from xkd_fast.data.audit_figures import audit_table, plot_audit
from xkd_fast.data.prepare import PrepareOptions, prepare
from xkd_fast.data.probe import Probe, ProbeTask, probe
from xkd_fast.data.sources import MEDIA_SUFFIXES, find_sources, read_list
from xkd_fast.errors import UserError

SMALL = PrepareOptions(short_side=16, workers=2)
BAD_UTF8 = os.fsdecode(b"\xff\xfe")


@pytest.fixture(scope="module")
def pile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Good films of two sizes and rates, copies, and whatever else a pile holds."""
    root = tmp_path_factory.mktemp("pile")
    (root / "a").mkdir()
    (root / BAD_UTF8).mkdir()
    small, large = [numbered(k, 48, 64) for k in range(50)], [numbered(k, 240, 320) for k in range(30)]
    write_video(root / "a" / "good.mkv", small, sound=noise(2.0))
    write_video(root / "a" / "other.mp4", large, fps=30, sound=noise(1.0, 44100), rate=44100, codecs=("libx264", "aac"))
    write_video(root / "mute.mkv", small[:25])
    write_video(root / "silent.mkv", small[:25], sound=np.zeros(16000, np.int16))
    write_video(root / "late.mkv", small, sound=np.concatenate([np.zeros(31000, np.int16), noise(0.1)]))
    write_video(root / "sound.wav", sound=noise(0.5))
    for name in ("copy.mkv", f"{BAD_UTF8}/copy.mkv"):
        shutil.copyfile(root / "a" / "good.mkv", root / name)
    data = bytearray((root / "a" / "good.mkv").read_bytes())
    data[-1] ^= 1
    (root / "almost.mkv").write_bytes(data)  # as many bytes, but others
    (root / "text.mp4").write_text("no video\n" * 50)
    (root / "empty.mp4").write_bytes(b"")
    (root / "dead.mp4").symlink_to("nowhere")
    os.mkfifo(root / "pipe.mp4")
    return root


@pytest.fixture(scope="module")
def found(pile: Path) -> Audit:
    return audit(find_sources(pile, MEDIA_SUFFIXES), SMALL)


def test_every_file_is_counted_for_what_it_is(pile: Path, found: Audit) -> None:
    """Red if a kind is miscounted, a bad file ends the audit, or a film whose sound comes late passes for silent."""
    told = found.summary()
    assert (told["files"], told["readable"], told["unreadable"], told["without_picture"]) == (13, 9, 4, 1)
    assert told["sound"] == {"heard": 7, "silent": 1, "none": 1}
    assert {Path(path).name for path in found.unreadable} == {"text.mp4", "empty.mp4", "dead.mp4", "pipe.mp4"}
    assert all(found.unreadable.values())
    counts = told["counts"]
    assert counts["container"] == {"matroska": 7, "mov": 1, "wav": 1}
    assert counts["video"] == {"ffv1": 7, "h264": 1, "none": 1}
    assert counts["side"] == {"below 144": 7, "240+": 1, "none": 1}
    assert counts["fps"] == {"25": 7, "30": 1, "none": 1}
    assert counts["sample_rate"] == {"16000": 7, "44100": 1, "none": 1} and counts["channels"] == {"1": 8, "none": 1}
    assert told["bytes"] == sum(path.stat().st_size for path in pile.rglob("*") if path.is_file())
    assert told["seconds"]["of_files"] == 9 and told["seconds"]["longest"] == pytest.approx(2.0, abs=0.1)
    assert told["seconds"]["total"] == pytest.approx(5 * 2 + 1 + 1 + 1 + 0.5, abs=0.3)


def test_copies_are_found_by_their_bytes(found: Audit) -> None:
    """Red if files of one size pass for copies, or copies under other names are missed."""
    assert [[Path(path).name for path in group] for group in found.duplicates] == [["good.mkv", "copy.mkv", "copy.mkv"]]
    twins = found.summary()["duplicates"]
    assert (twins["groups"], twins["surplus_files"]) == (1, 2)
    assert twins["surplus_bytes"] == 2 * found.sizes[found.duplicates[0][0]]


def test_the_estimate_is_of_what_prepare_makes(pile: Path, tmp_path: Path) -> None:
    """Red if an estimate from all of the sources is far from the shards that they become."""
    found = audit(find_sources(pile), SMALL)
    assert found.estimate is not None and found.estimate.tried == 12
    assert found.estimate.skipped == {"unreadable": 4, "no_audio": 1, "silent_audio": 1}
    prepare(pile, tmp_path / "shards", SMALL)
    written = sum(path.stat().st_size for path in (tmp_path / "shards").glob("shard-*"))
    assert 0.7 < found.estimate.bytes / written < 1.3


def test_parts_of_one_file_are_one_file(pile: Path) -> None:
    """Red if a file is opened once for each of its parts, or files that a list misses go unmentioned."""
    (pile / "list.csv").write_text("path,start\na/good.mkv,\na/good.mkv,1\ngone.mkv,\n")
    found = audit(read_list(pile / "list.csv"), SMALL)
    assert [Path(path).name for path in found.files] == ["good.mkv"] and found.missing == ["gone.mkv"]


def test_a_file_that_hangs_is_one_bad_file(pile: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Red if one file holds up the audit of all others."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys, time\n"
        "if 'xkd_fast.data.probe:probe' in sys.argv:\n"
        "    import xkd_fast.data.probe as module\n"
        "    original = module._probe\n"
        "    module._probe = lambda task: time.sleep(1000) if task.path.endswith('late.mkv') else original(task)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    started = time.monotonic()
    found = audit(find_sources(pile), PrepareOptions(short_side=16, workers=2, seconds_per_file=2.0))
    (reason,) = [reason for path, reason in found.unreadable.items() if path.endswith("late.mkv")]
    assert reason == "timed out: not done after 2 s" and len(found.unreadable) == 5
    assert time.monotonic() - started < 30


def test_what_a_file_says_of_itself(pile: Path) -> None:
    """Red if width and height are swapped, or the pixel format and the rates are another stream's."""
    found = probe(ProbeTask(str(pile / "a" / "other.mp4"), 8.0, 16000))
    assert found == Probe(
        container="mov", seconds=pytest.approx(1.02, abs=0.05), video="h264", width=320, height=240, fps=30.0,
        pixels="yuv420p", audio="aac", sample_rate=44100, channels=1, sound="heard",
    )  # fmt: skip


def test_the_command_shows_writes_and_draws(pile: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Red if the table, the JSON and the picture disagree or are not written, or shards are."""
    files = ["--json", str(tmp_path / "audit.json"), "--plot", str(tmp_path / "audit.png")]
    assert cli.main(["prepare", str(pile), "--audit", "--workers", "2", *files]) == 0
    shown = capsys.readouterr()
    assert "auditing: 16 of 16" in shown.err  # 12 files, and 4 of the same size read through
    assert "1 .wav" in shown.err, "what prepare would leave out is not counted, but told"
    written = json.loads((tmp_path / "audit.json").read_text())
    assert written["files"] == written["sources"] == 12 and len(written["by_file"]) == 12 and "12 files" in shown.out
    assert "seen by prepare alone" in " ".join(shown.out.split())
    for path, told in written["by_file"].items():
        assert (told["problem"] is None) == (f"unreadable: {path!r}" not in shown.out)
    assert (tmp_path / "audit.png").read_bytes()[:4] == b"\x89PNG"
    with av.open(str(tmp_path / "audit.png")) as image:
        (frame,) = image.decode(video=0)
    assert np.unique(frame.to_ndarray(format="gray")).size > 20
    assert sorted(path.name for path in tmp_path.iterdir()) == ["audit.json", "audit.png"]


def test_sounds_count_where_prepare_would_take_them(pile: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Red if the audit of a pile counts other files than prepare lists with the same options."""
    for words, count in (([], 12), (["--missing-video", "keep-as-audio-only"], 13)):
        assert cli.main(["prepare", str(pile), "--audit", "--workers", "2", *words]) == 0
        assert f"{count} files" in capsys.readouterr().out
        assert cli.main(["prepare", str(pile), "--dry-run", "--workers", "2", *words]) == 0
        assert f"{count} sources" in capsys.readouterr().out


def test_files_that_cannot_be_compared_are_told(pile: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Red if a file that takes too long to read through, or goes away in between, passes for one without a copy."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys, time\n"
        "if 'xkd_fast.data.probe:digest' in sys.argv:\n"
        "    import xkd_fast.data.probe as module\n"
        "    original = module.digest\n"
        "    def slow(path):\n"
        "        if path.endswith('almost.mkv'): time.sleep(1000)\n"
        "        return original(path + ('.gone' if path.endswith('a/good.mkv') else ''))\n"
        "    module.digest = slow\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    found = audit(find_sources(pile), PrepareOptions(short_side=16, workers=2, seconds_per_file=3.0))
    assert {Path(path).name: why.partition(":")[0] for path, why in found.not_compared.items()} == {
        "almost.mkv": "timed out",
        "good.mkv": "raised",
    }
    assert len(found.duplicates) == 1 and found.summary()["duplicates"]["not_compared"] == 2
    shown = io.StringIO()
    Console(file=shown, width=200).print(audit_table(found))
    assert "not compared" in shown.getvalue() and "not done after 3 s" in shown.getvalue()
    write_json(found, tmp_path / "audit.json")
    assert json.loads((tmp_path / "audit.json").read_text())["not_compared_files"] == found.not_compared


def test_what_is_looked_at_is_not_overwritten(pile: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Red if a mistyped place for the figures costs a video, or the list."""
    video, names = pile / "a" / "other.mp4", tmp_path / "list.json"
    names.write_text(f"{video}\n")
    before = video.read_bytes()
    assert cli.main(["prepare", str(pile), "--audit", "--json", str(video)]) == 2
    assert "must end in .json" in capsys.readouterr().err
    assert cli.main(["prepare", "--list", str(names), "--audit", "--json", str(tmp_path / "." / "list.json")]) == 2
    assert "is the list itself" in capsys.readouterr().err
    assert video.read_bytes() == before and names.read_text() == f"{video}\n"


def test_a_picture_of_an_unknown_kind_is_refused_before_the_work(pile: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Red if an hour's audit ends with an error about a file's ending."""
    assert cli.main(["prepare", str(pile), "--audit", "--plot", "audit.mp3"]) == 2
    shown = capsys.readouterr().err
    assert "--plot audit.mp3 must end in .png, .svg, .pdf" in shown and "auditing" not in shown


def test_an_empty_audit_can_be_shown(tmp_path: Path) -> None:
    """Red if a pile without one readable file breaks the table or the picture."""
    (tmp_path / "text.mp4").write_text("no video")
    found = audit(find_sources(tmp_path), SMALL)
    assert audit_table(found).row_count >= 10
    plot_audit(found, tmp_path / "audit.svg")
    write_json(found, tmp_path / "audit.json")
    with pytest.raises(UserError, match="must end in"):
        plot_audit(found, tmp_path / "audit")
