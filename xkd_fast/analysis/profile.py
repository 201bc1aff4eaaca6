"""Where a training step spends its time, arithmetic and memory, part by part."""

from __future__ import annotations

import json
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode

from xkd_fast.analysis.flops import flop_counter, step_flops
from xkd_fast.analysis.flops import total as all_parts
from xkd_fast.analysis.kept import Kept
from xkd_fast.config import Config
from xkd_fast.data.views import MaskNoise, Views
from xkd_fast.engine.heap import keep_freed_memory
from xkd_fast.engine.local import LocalUpdate
from xkd_fast.engine.updates import choose_update
from xkd_fast.errors import UserError
from xkd_fast.files import write_aside
from xkd_fast.model.attention import Attention
from xkd_fast.model.attention import described as attention_described
from xkd_fast.model.build import build_model, random_views
from xkd_fast.model.components import component, listening
from xkd_fast.model.kernels import described
from xkd_fast.model.options import ModelOptions
from xkd_fast.model.products import multiplied_in
from xkd_fast.model.switches import obstacle_to, settled
from xkd_fast.model.vit import require_compiler
from xkd_fast.objective.losses import Losses
from xkd_fast.reference import XKD

HIDES_PARTS = "cuda_graph: off in a profile, a graph hides the parts of the step"
PEAK_SECONDS = 1.0  # after which no further product is timed: types that a processor lacks can take seconds each


@dataclass(frozen=True)
class Part:
    """One part of a step."""

    name: str
    seconds: float
    forward_flops: int  # of its forward pass, matrix products and attention; 0 for parts that are no forward pass
    tokens: int  # that pass through it, per clip
    saved_bytes: int  # kept for the backward pass


@dataclass(frozen=True)
class Profile:
    """What a step of ``clips`` clips costs."""

    device: str
    precision: str
    clips: int
    seconds: float  # median of undisturbed steps
    clips_per_second: float
    flops: int  # of the model, forward and backward; what is computed again for the backward pass is left out
    peak_flops_per_second: float  # measured on a large matrix product
    utilisation: float  # model FLOPs utilisation: flops / seconds / peak
    peak_bytes: int  # of device memory; 0 on a CPU
    parameters: int
    trainable: int
    parts: tuple[Part, ...]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


class _Clock:
    """Seconds by part; waits for the device at every boundary."""

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._device, self._began = device, 0.0

    def enter(self, name: str) -> None:
        _wait(self._device)
        self._began = time.perf_counter()

    def leave(self, name: str) -> None:
        _wait(self._device)
        self.seconds[name] += time.perf_counter() - self._began


class _FlopCount:
    """Forward FLOPs by part."""

    def __init__(self, counter: FlopCounterMode) -> None:
        self.flops: dict[str, int] = defaultdict(int)
        self._counter, self._before = counter, 0

    def enter(self, name: str) -> None:
        self._before = self._counter.get_total_flops()

    def leave(self, name: str) -> None:
        self.flops[name] += self._counter.get_total_flops() - self._before


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def tokens_of_parts(options: ModelOptions) -> dict[str, int]:
    """Tokens per clip that pass through each part, both modalities, CLS included."""
    cls = int(options.cls_token)
    students = teachers = decoders = views = 0
    for clip in (options.video, options.audio):
        local = cls
        cells = 1
        for length in clip.local_grid:
            cells *= length
        local += cells
        students += cls + clip.keep + clip.local_views * local
        teachers += local if options.teacher_view == "local" else cls + clip.tokens
        decoders += cls + clip.tokens
        views += 1 + clip.local_views
    return {"teachers": teachers, "students": students, "decoders": decoders, "heads": views}


class Step:
    """One rank's whole step on fixed random views: forward, backward, clip and AdamW, teachers and centres."""

    def __init__(self, config: Config, clips: int, device: torch.device) -> None:
        self.config, self.device = config, device
        self.model: XKD = build_model(config.model, seed=config.seed).to(device)
        options = config.optimizer
        update, reason = choose_update(options.implementation, device, options.betas, options.eps)
        self.update_reason = f"{update.name}: {reason}"
        self.local = LocalUpdate(self.model, update, lr=1e-6, weight_decay=options.weight_decay, clip_norm=options.clip_norm)
        torch.manual_seed(config.seed)
        self.views: Views = random_views(config.model, clips, device)
        self.masks: MaskNoise = self.model.draw_masks(self.views)

    def autocast(self) -> AbstractContextManager[object]:
        """The configured precision."""
        precision = self.config.train.precision
        half = precision != "float32"
        return torch.autocast(self.device.type, getattr(torch, precision)) if half else nullcontext()

    def forward(self) -> Losses:
        """The losses. The reference marks no parts: its forward pass is one."""
        whole = component("forward") if self.config.model.implementation == "reference" else nullcontext()
        with self.autocast(), whole:
            return self.model(self.views, self.masks)  # type: ignore[no-any-return]

    def __call__(self) -> float:
        """The whole step; returns the loss, which waits for the device."""
        losses = self.forward()
        with component("backward"):
            losses.total.backward()
        with component("clip and AdamW"):
            self.local.step(self.config.ema.video_start, self.config.ema.audio_start)
        with component("teacher update"):
            self.local.follow(losses.outputs.teacher_means)
        return float(losses.total.detach())


def measured_peak(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """FLOP/s of the best of several ``size``³ matrix products, in the type in which ``dtype`` is multiplied there."""
    computed = multiplied_in(dtype, device)
    a, b = (torch.randn(size, size, device=device, dtype=computed) for _ in range(2))
    best, end = float("inf"), time.perf_counter() + PEAK_SECONDS
    for _ in range(6):
        _wait(device)
        start = time.perf_counter()
        a @ b
        _wait(device)
        best = min(best, time.perf_counter() - start)
        if time.perf_counter() > end:
            break
    return 2 * size**3 / best


@contextmanager
def traced(device: torch.device, path: Path | None) -> Iterator[None]:
    """Write a Chrome trace of what runs inside to ``path``; nothing without one."""
    if path is None:
        yield
        return
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        yield
    path = Path(os.path.realpath(path))
    aside = path.with_name(f"{path.name}.partial")
    try:
        profiler.export_chrome_trace(str(aside))  # tells of no failure
        os.replace(aside, path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise UserError(f"--trace {path} cannot be written: {error.strerror}; name another file") from error


def profile(
    config: Config, *, clips: int, steps: int, trace: Path | None = None, nvtx: bool = False, say: Callable[[str], None]
) -> Profile:
    """Measure a step of ``config``'s model on this machine.

    Args:
        config: model, precision and optimiser.
        clips: clips per step.
        steps: timed steps.
        trace: file for a Chrome trace of one step; None = none.
        nvtx: mark all ranges for Nsight, around the timed steps.
        say: told what is going on.

    Raises:
        UserError: sizes below 1, no room in memory, a trace that cannot be written, or what only a GPU or a compiler has.
    """
    for name, value in (("--clips", clips), ("--steps", steps)):
        if value < 1:
            raise UserError(f"{name} {value} must be 1 or more")
    if config.model.cuda_graph is True:
        raise UserError("model.cuda_graph = true hides the parts of the step that a profile tells apart; set it to false")
    wanted = config.train.device
    device = torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")
    if wanted == "cuda" and device.type == "cpu":
        raise UserError("train.device = cuda, but no GPU is found; set train.device=auto or cpu")
    if nvtx and device.type == "cpu":
        raise UserError("--nvtx marks ranges for Nsight Systems, which needs a GPU; leave it out, or use --trace")
    obstacle = partial(obstacle_to, config.model, 0, config.train.precision)
    model, switches = settled(config.model, device, config.train.precision, clips, obstacle=obstacle)  # as in a run
    if model.cuda_graph is True:
        model = replace(model, cuda_graph=False)
        switches = [*(line for line in switches if not line.startswith("cuda_graph: ")), HIDES_PARTS]
    config = replace(config, model=model)
    if config.model.compile is True:
        require_compiler()
    if device.type == "cpu":
        keep_freed_memory()
    torch.manual_seed(config.seed)
    try:
        say(f"building the {config.model.variant} model ({config.model.implementation})")
        step = Step(config, clips, device)
        attention = getattr(step.model, "attention", None)
        if isinstance(attention, Attention):
            where = (config.model, device, getattr(torch, config.train.precision))
            for line in (*attention_described(attention, *where), *described(*where), *switches):
                say(line)
        say(f"optimiser: {step.update_reason}")
        say(f"timing {steps} steps of {clips} clips on {device.type}, {config.train.precision}")
        step()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        seconds = []
        with torch.autograd.profiler.emit_nvtx(enabled=nvtx):
            for _ in range(steps):
                start = time.perf_counter()
                step()
                seconds.append(time.perf_counter() - start)
        peak_bytes = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
        say("taking the step apart")
        clock = _Clock(device)
        with listening(clock):
            step()
        with torch.compiler.set_stance("force_eager"):  # compiled blocks cannot be counted
            with flop_counter() as counter:
                counted = _FlopCount(counter)
                with listening(counted):
                    step()
            kept = Kept()
            with listening(kept):
                kept.count(lambda: step.forward().total)
        with traced(device, trace):
            step()
    except RuntimeError as error:  # of a CPU's memory PyTorch tells by words alone
        if isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error):
            raise UserError(f"--clips {clips} do not fit into the {device.type.upper()}'s memory; name fewer") from error
        raise
    peak = measured_peak(device, getattr(torch, config.train.precision), 8192 if device.type == "cuda" else 1024)
    tokens = tokens_of_parts(config.model)
    names = list(dict.fromkeys([*clock.seconds, *counted.flops]))
    no_forward = ("backward", "clip and AdamW", "teacher update")
    parts = tuple(
        Part(
            name=name,
            seconds=clock.seconds[name],
            forward_flops=0 if name in no_forward else counted.flops[name],
            tokens=tokens.get(name, 0),
            saved_bytes=kept.bytes[name],
        )
        for name in names
    )
    median, total = statistics.median(seconds), clips * all_parts(step_flops(config.model)).total
    return Profile(
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads",
        precision=config.train.precision,
        clips=clips,
        seconds=median,
        clips_per_second=clips / median,
        flops=total,
        peak_flops_per_second=peak,
        utilisation=total / median / peak,
        peak_bytes=peak_bytes,
        parameters=sum(p.numel() for p in step.model.parameters()),
        trainable=sum(p.numel() for p in step.model.parameters() if p.requires_grad),
        parts=parts,
    )


def write_json(result: Profile, path: Path) -> None:
    """Write a profile as JSON.

    Raises:
        UserError: the file cannot be written.
    """
    try:
        write_aside(path, (json.dumps(result.as_dict(), indent=2) + "\n").encode())
    except OSError as error:
        raise UserError(f"--json {path} cannot be written: {error.strerror}; name another file") from error


def profile_table(result: Profile) -> Table:
    """A profile for the terminal."""
    whole = sum(part.seconds for part in result.parts)
    title = (
        f"{result.clips} clips in {1e3 * result.seconds:.1f} ms = {result.clips_per_second:.4g} clips/s on {result.device}, "
        f"{result.precision}"
    )
    caption = (
        f"{result.flops / result.clips / 1e9:.4g} GFLOP per clip; {100 * result.utilisation:.1f} % of the "
        f"{result.peak_flops_per_second / 1e12:.3g} TFLOP/s of a large matrix product; "
        f"{result.trainable / 1e6:.1f} M of {result.parameters / 1e6:.1f} M parameters train"
    )
    if result.peak_bytes:
        caption += f"; peak memory {result.peak_bytes / 2**30:.2f} GiB"
    table = Table(title=title, caption=caption)
    for heading in ("part", "ms", "share", "forward GFLOP per clip", "tokens per clip", "kept MiB"):
        table.add_column(heading, justify="left" if heading == "part" else "right")
    for part in result.parts:
        table.add_row(
            part.name,
            f"{1e3 * part.seconds:.1f}",
            f"{100 * part.seconds / whole:.0f} %",
            f"{part.forward_flops / result.clips / 1e9:.4g}" if part.forward_flops else "",
            str(part.tokens or ""),
            f"{part.saved_bytes / 2**20:.1f}" if part.saved_bytes else "",
        )
    return table
