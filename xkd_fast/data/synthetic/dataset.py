"""A data set of class folders: rendered, gone on with after an interruption, replaced only where that is asked for."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from xkd_fast.data.synthetic.clip import render_clip, write_clip
from xkd_fast.data.synthetic.options import CLASSES, SyntheticOptions
from xkd_fast.data.workers import Outcome, require_workers, run_tasks
from xkd_fast.errors import UserError
from xkd_fast.files import write_aside

DATASET_FILE = "dataset.json"
RENDERER = 2  # raise whenever a clip of unchanged options would look or sound different

_CLIP_NAME = re.compile(r"^clip_\d{6}\.mp4$")
_PART_NAME = re.compile(r"^\.clip_\d{6}\.mp4\.\d+\.part$")


def render_file(task: tuple[str, str, int, SyntheticOptions]) -> None:
    """Render one clip to a file; the task is (path, class name, index, options). Runs in a worker process."""
    path, class_name, index, options = task
    write_clip(path, render_clip(class_name, index, options), fps=options.fps, sample_rate=options.sample_rate)


def clip_path(root: str | os.PathLike[str], class_name: str, index: int) -> Path:
    """Where ``render_dataset`` puts a clip."""
    return Path(root) / class_name / f"clip_{index:06d}.mp4"


def _description(options: SyntheticOptions) -> dict[str, Any]:
    described = {
        "renderer": RENDERER,
        "options": asdict(options),
        "labels": {name: i for i, name in enumerate(sorted(options.classes))},
    }
    return json.loads(json.dumps(described))


def _differences(stored: dict[str, Any], wanted: dict[str, Any]) -> dict[str, str]:
    """What two descriptions differ in, by name, each as ``name = stored (now wanted)``."""
    then, now = ({"renderer": description.get("renderer"), **description["options"]} for description in (stored, wanted))
    names = sorted(name for name in then | now if then.get(name) != now.get(name))
    return {name: f"{name} = {then.get(name)} (now {now.get(name)})" for name in names}


def _read_description(root: Path) -> dict[str, Any] | None:
    path = root / DATASET_FILE
    if not path.exists():
        if any(not p.name.startswith(".") for p in root.iterdir()):
            raise UserError(
                f"{root} holds files but no {DATASET_FILE}, so it was not rendered by xkd-fast; choose an empty folder"
            )
        return None
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        assert isinstance(stored, dict) and isinstance(stored["options"], dict)
        return stored
    except (ValueError, KeyError, AssertionError) as error:
        raise UserError(
            f"{path} is not a data set description ({error}); choose an empty folder, or delete this one"
        ) from error


def _written_files(root: Path) -> Iterator[Path]:
    """Files in ``root`` that a renderer wrote: clips and leftovers of interrupted writes."""
    for name in CLASSES:
        if (root / name).is_dir():
            yield from (p for p in (root / name).iterdir() if _CLIP_NAME.match(p.name) or _PART_NAME.match(p.name))


def render_dataset(
    root: str | os.PathLike[str],
    options: SyntheticOptions,
    *,
    workers: int = 1,
    replace: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Render a data set of class folders: ``root/CLASS/clip_000000.mp4`` and ``root/dataset.json``.

    Complete files of the same options are kept, so an interrupted rendering goes on where it stopped. More classes
    or clips than before keep the old ones.

    Args:
        root: folder to write; made where missing. It must be empty or hold a rendered data set.
        options: what to render.
        workers: processes; 1 renders in this process. The clips are the same for any number.
        replace: remove clips that other options left (others, or more of them) rather than refuse the folder.
        progress: called with (clips done, clips in all), the clips that were there already included.

    Returns:
        Number of clips rendered now.

    Raises:
        UserError: ``root`` holds something else or clips of other options, ``workers`` is below 1, or a clip cannot be rendered
            or written.
    """
    require_workers(workers)
    root = Path(root)
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{root} cannot be made a folder ({error.strerror}); name another one for the clips") from error
    wanted, stored = _description(options), _read_description(root)
    planned = {
        clip_path(root, name, index): (name, index)
        for index in range(options.clips_per_class)
        for name in sorted(options.classes)
    }
    differences = {} if stored is None else _differences(stored, wanted)
    keep = planned if differences.keys() <= {"clips_per_class", "classes"} else {}
    surplus = [path for path in _written_files(root) if path not in keep]
    if differences and not replace and any(_CLIP_NAME.match(path.name) for path in surplus):
        raise UserError(
            f"{root} holds clips rendered with {', '.join(differences.values())}; "
            "name another or an empty folder, or render with the same options"
        )
    for path in surplus:  # before the description changes, so that an old clip never passes for a new one
        path.unlink()
    for name in set(CLASSES) - set(options.classes):
        if (root / name).is_dir() and not any((root / name).iterdir()):
            (root / name).rmdir()
    if stored != wanted:
        write_aside(root / DATASET_FILE, (json.dumps(wanted, indent=2) + "\n").encode())
    for name in options.classes:
        (root / name).mkdir(exist_ok=True)
    tasks = [(str(path), name, index, options) for path, (name, index) in planned.items() if not path.exists()]
    present = len(planned) - len(tasks)
    if progress is not None:
        progress(present, len(planned))
    for count, outcome in enumerate(_outcomes(tasks, workers), start=1):
        if outcome.failure is not None:
            raise UserError(
                f"rendering {tasks[outcome.index][0]} failed ({outcome.failure}: {outcome.detail}); make room where it is "
                "written or name another folder; the same command goes on with what is missing"
            )
        if progress is not None:
            progress(present + count, len(planned))
    return len(tasks)


def _outcomes(tasks: list[tuple[str, str, int, SyntheticOptions]], workers: int) -> Iterator[Outcome]:
    if workers == 1:
        for index, task in enumerate(tasks):
            try:
                render_file(task)
            except OSError as error:  # a full disk, a folder that went away
                yield Outcome(index, failure="raised", detail=f"{type(error).__name__}: {error}")
            else:
                yield Outcome(index)
    else:
        yield from run_tasks("xkd_fast.data.synthetic.dataset:render_file", tasks, workers=workers, seconds=300.0)
