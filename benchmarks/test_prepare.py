"""Source files per second of `prepare`, beside loops over the ffmpeg program and over PyAV that make the same of every file.

The same: 8 frames a second, short side 128, Motion JPEG in AVI, the sound in FLAC at 16 kHz mono. ``ffmpeg`` is one process a
file, one after the other, with as many threads as it likes, and beside it ``xargs -P`` with a process per core; where that
program is not on the PATH, nor named by XKD_FFMPEG, PyAV alone is timed. `prepare` runs as its users run it, start of all
processes included, and also checks, hashes and packs; its memory is watched while it does.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks import media, record
from benchmarks.originals import pyav_frames, pyav_sound
from xkd_fast.data.encode import encode_flac
from xkd_fast.data.prepare import processors
from xkd_fast.data.read_video import target_size
from xkd_fast.data.shards import ShardSet

FPS, SHORT_SIDE, RATE, QUALITY = 8, 128, 16000, 4
SCALE = rf"scale=w=if(gt(iw\,ih)\,-2\,{SHORT_SIDE}):h=if(gt(iw\,ih)\,{SHORT_SIDE}\,-2):flags=area"


@dataclass(frozen=True)
class Pile:
    """Source files: ``rendered`` of them, each under ``names`` names."""

    kind: media.SourceKind
    rendered: int
    names: int


FULL = (Pile(media.KINETICS, 16, 2), Pile(media.HD, 4, 2))
SMOKE = (Pile(media.TINY, 2, 1),)


def pile_up(pile: Pile, folder: Path) -> list[Path]:
    """The files of a pile, in class folders."""
    rendered = media.write_sources(folder / "rendered", pile.kind, pile.rendered)
    paths = []
    for number in range(pile.names):
        for path in rendered:
            named = folder / "pile" / path.parent.name / f"{path.stem}-{number}.mp4"
            named.parent.mkdir(parents=True, exist_ok=True)
            if not named.exists():
                os.link(path, named)
            paths.append(named)
    return paths


def ffmpeg_program() -> str | None:
    """The program, by XKD_FFMPEG or on the PATH."""
    return os.environ.get("XKD_FFMPEG") or shutil.which("ffmpeg")


class Memory(threading.Thread):
    """Watches a process and its children until it ends.

    Attributes:
        largest: the most that one process of them held at once, bytes.
        together: the most that all of them held at one of the instants looked at, bytes; shared pages counted in each.
    """

    def __init__(self, process: int) -> None:
        super().__init__(daemon=True)
        self._process, self._ended = process, threading.Event()
        self.largest = self.together = 0

    def run(self) -> None:
        while not self._ended.wait(0.05):
            found = [numbers for process in self._family() if (numbers := _memory_of(process))]
            self.largest = max([self.largest, *(peak for peak, _ in found)])
            self.together = max(self.together, sum(now for _, now in found))

    def stop(self) -> None:
        """No more is looked at."""
        self._ended.set()
        self.join()

    def _family(self) -> list[int]:
        members, place = [self._process], 0
        while place < len(members):
            children = Path(f"/proc/{members[place]}/task/{members[place]}/children")
            members += [int(child) for child in _text(children).split()]
            place += 1
        return members


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:  # it has ended
        return ""


def _memory_of(process: int) -> tuple[int, int] | None:
    """Peak and present resident bytes."""
    rows = dict(line.split(":", 1) for line in _text(Path(f"/proc/{process}/status")).splitlines())
    if "VmHWM" not in rows:
        return None
    return 1024 * int(rows["VmHWM"].split()[0]), 1024 * int(rows["VmRSS"].split()[0])


def by_prepare(folder: Path, out: Path, cores: int) -> Memory:
    """`xkd-fast prepare` as a process of its own."""
    command = [sys.executable, "-m", "xkd_fast.cli", "prepare", str(folder / "pile"), str(out), "--codec", "mjpeg"]
    with open(out.with_suffix(".log"), "w") as log:
        process = subprocess.Popen([*command, "--workers", str(cores)], stdout=log, stderr=subprocess.STDOUT)
        memory = Memory(process.pid)
        memory.start()
        code = process.wait()
        memory.stop()
    assert code == 0, out.with_suffix(".log").read_text()
    return memory


def ffmpeg_command(program: str) -> str:
    """For a shell: of the file ``$1`` makes what lies beside ``$2``."""
    both = f'{shlex.quote(program)} -nostdin -v error -y -i "$1" -map 0:v:0 -vf fps={FPS},{shlex.quote(SCALE)} '
    both += f'-c:v mjpeg -q:v {QUALITY} "$2.avi" -map 0:a:0 -ac 1 -ar {RATE} -c:a flac "$2.flac"'
    return both


def by_ffmpeg(program: str, paths: list[Path], out: Path, processes: int) -> None:
    """One process a file, so many at a time: a loop of the shell, or ``xargs``."""
    out.mkdir(parents=True)
    pairs = [word for number, path in enumerate(paths) for word in (str(path), str(out / f"{number:06d}"))]
    if processes == 1:
        loop = f"while [ $# -gt 0 ]; do {ffmpeg_command(program)} || exit 1; shift 2; done"
        subprocess.run(["bash", "-c", loop, "bash", *pairs], check=True)
    else:
        command = ["xargs", "-0", "-n", "2", "-P", str(processes), "bash", "-c", ffmpeg_command(program), "bash"]
        subprocess.run(command, input="\0".join(pairs).encode(), check=True)


def by_pyav(paths: list[Path], kind: media.SourceKind, out: Path) -> None:
    """A plain loop in one process, on one thread."""
    out.mkdir(parents=True)
    width, height = target_size(kind.width, kind.height, SHORT_SIDE)
    for number, path in enumerate(paths):
        frames = pyav_frames(path, 0.0, round(FPS * kind.seconds), FPS, (height, width))
        sound = pyav_sound(path, 0.0, round(RATE * kind.seconds), RATE)
        _write_mjpeg(out / f"{number:06d}.avi", frames)
        (out / f"{number:06d}.flac").write_bytes(encode_flac((sound.clip(-1, 1) * 32767).astype(np.int16), RATE))


def _write_mjpeg(path: Path, frames: NDArray[np.uint8]) -> None:
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("mjpeg", rate=Fraction(FPS))
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt, stream.options = "yuvj420p", {"qmin": str(QUALITY), "qmax": str(QUALITY)}
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))


def check(out: Path, pile: Pile, files: int) -> int:
    """Bytes of a loop's outputs, once they are what was asked for."""
    made = sorted(out.glob("*.avi"))
    assert len(made) == len(list(out.glob("*.flac"))) == files
    with av.open(str(made[-1])) as container:
        stream = container.streams.video[0]
        wanted = round(FPS * pile.kind.seconds)
        assert abs(sum(1 for _ in container.decode(stream)) - wanted) <= 2
        assert (stream.width, stream.height) == target_size(pile.kind.width, pile.kind.height, SHORT_SIDE)
    return sum(path.stat().st_size for path in out.iterdir())


def time_pile(pile: Pile, folder: Path, scratch: Path, rounds: int) -> dict[str, Any]:
    """Times everyone on a pile, in turns."""
    paths, cores, program = pile_up(pile, folder), processors(), ffmpeg_program()
    memories: list[Memory] = []
    works: dict[str, Callable[[Path], object]] = {"prepare": lambda out: memories.append(by_prepare(folder, out, cores))}
    if program:
        works["ffmpeg loop"] = lambda out: by_ffmpeg(program, paths, out, 1)
        works[f"xargs -P {cores} ffmpeg"] = lambda out: by_ffmpeg(program, paths, out, cores)
    works["PyAV loop"] = lambda out: by_pyav(paths, pile.kind, out)
    seconds: dict[str, list[float]] = {name: [] for name in works}
    sizes: dict[str, int] = {}
    for number in range(rounds):
        for name, work in works.items():
            out = scratch / f"{pile.kind.width}-{number}-{name.replace(' ', '-')}"
            begun = time.perf_counter()
            work(out)
            seconds[name].append(time.perf_counter() - begun)
            if name == "prepare":
                assert len(ShardSet.open(out)) == len(paths)
                sizes[name] = sum(path.stat().st_size for path in out.glob("*.tar"))
            else:
                sizes[name] = check(out, pile, len(paths))
            shutil.rmtree(out)
    rows = [
        {
            "name": name,
            "files_per_second": record.spread([len(paths) / taken for taken in times]),
            "prepare_against": record.spread([a / b for a, b in zip(times, seconds["prepare"], strict=True)]),
            "bytes_written_per_file": round(sizes[name] / len(paths)),
        }
        for name, times in seconds.items()
    ]
    return {
        "source": vars(pile.kind),
        "files": len(paths),
        "bytes_per_file": round(sum(path.stat().st_size for path in paths) / len(paths)),
        "prepare_peak_bytes_of_a_process": max(memory.largest for memory in memories),
        "prepare_peak_bytes_together": max(memory.together for memory in memories),
        "rows": rows,
    }


def ffmpeg_version() -> str | None:
    """The program's own first words."""
    if not (program := ffmpeg_program()):
        return None
    shown = subprocess.run([program, "-version"], capture_output=True, text=True, check=True).stdout
    return " ".join(shown.split()[:3])


def test_prepare(measuring: bool, tmp_path: Path) -> None:
    """Times `prepare` beside loops; fails if one of them leaves a file out, or makes another length or size of it."""
    folder = media.folder(measuring, tmp_path)
    piles = []
    for pile in FULL if measuring else SMOKE:
        place = folder / "prepare" / str(pile.kind.width)
        piles.append(time_pile(pile, place, tmp_path, rounds=3 if measuring else 1))
    version = ffmpeg_version()
    print(f"{processors()} processes; {version or 'no ffmpeg program on the PATH or in XKD_FFMPEG: PyAV alone is timed'}")
    for found in piles:
        print(told(found))
    if measuring:
        result = {"workers": processors(), "ffmpeg": version, "av": av.__version__, "piles": piles}
        record.write(f"prepare_{record.place(torch.device('cpu'))}", result)


def told(found: dict[str, Any]) -> str:
    """Lines for a pile."""
    lines = [f"{found['files']} files of {found['source']['name']}, {found['source']['seconds']:g} s"]
    for row in found["rows"]:
        speed, ratio = row["files_per_second"]["median"], row["prepare_against"]["median"]
        lines.append(f"  {row['name']}: {speed:.2f} files/s; prepare is {ratio:.2f} × as fast")
    one, all_ = (found[f"prepare_peak_bytes_{which}"] / 2**20 for which in ("of_a_process", "together"))
    return "\n".join([*lines, f"  prepare's processes: at most {one:.0f} MiB in one, {all_:.0f} MiB together"])
