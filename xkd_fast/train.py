"""The main job: pretrain XKD.

``deepspeed xkd_fast/train.py`` trains ``configs/demo.yaml`` and renders its data on first use;
``deepspeed xkd_fast/train.py --config FILE key.path=value …`` trains anything. ``torchrun``, plain ``python`` and
``xkd-fast train`` start the same job.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __package__ in (None, ""):  # run as a file: import the package beside it, installed or not, and hide its modules' bare names
    root = Path(__file__).resolve().parent.parent
    sys.path[:1] = [str(root), str(root / "kernels")]

import argparse
import json
import os
import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from xkd_fast.config import Config, load_config, render_config
from xkd_fast.errors import UserError
from xkd_fast.files import write_aside

if TYPE_CHECKING:
    import psutil

    from xkd_fast.data.pipeline import ViewPipeline
    from xkd_fast.data.views import MaskNoise, Views
    from xkd_fast.engine.engine import Engine
    from xkd_fast.engine.reporter import Reporter, StepCost
    from xkd_fast.engine.schedule import Schedule
    from xkd_fast.model.options import ModelOptions

TELLING = 2.0  # seconds that the first rank has to tell an error, before the launcher ends all ranks for another's end

EXAMPLES = """examples:
  deepspeed xkd_fast/train.py                            train the demo; its data is rendered on first use
  deepspeed xkd_fast/train.py --config xkd_base_k400 'data.train=[/data/k400/shards]' output=runs/k400
  deepspeed xkd_fast/train.py 'data.train=[https://HOST/shards]' data.cache.folder=/scratch/shards    shards behind an address
  deepspeed xkd_fast/train.py --config FILE --resume auto        go on from the run's newest checkpoint
  python xkd_fast/train.py --config FILE --print-config          every option, resolved and explained
"""


def main(arguments: list[str] | None = None, program: str = "deepspeed xkd_fast/train.py") -> int:
    """Command line of the job, which its help calls ``program``; returns the exit code."""
    args = parse_arguments(arguments, program)
    try:
        resume = [] if args.resume is None else [f"checkpoint.resume={json.dumps(args.resume)}"]
        if resume and any(override.startswith("checkpoint.resume=") for override in args.overrides):
            raise UserError(f"--resume {args.resume} and checkpoint.resume=… are the same option; give one of them")
        config = load_config(args.config, [*args.overrides, *resume])
        if args.print_config:
            print(render_config(config), end="")
        else:
            train(config)
    except UserError as error:
        if error.is_told:
            time.sleep(TELLING)
        else:
            print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.filename is None:
            raise
        print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def parse_arguments(arguments: list[str] | None, program: str) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog=program,
        description="Pretrain XKD, XKD-MAS or XKD-MATS.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", default="demo", help="YAML file, or the name of a shipped one (default: demo)")
    parser.add_argument("--resume", metavar="none|auto|PATH", help="the same as checkpoint.resume=…")
    parser.add_argument("--print-config", action="store_true", help="print the resolved configuration with comments, and exit")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # appended by the deepspeed launcher
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="options that differ from the file")
    return parser.parse_intermixed_args(arguments)


def train(config: Config) -> None:
    """Train as ``config`` says, from the checkpoint it names if it does.

    Raises:
        UserError: wrong configuration or data, or a loss that is no longer finite.
    """
    import torch.distributed as dist

    from xkd_fast.data.dali import require_dali
    from xkd_fast.engine.launch import launchers_above, run_folder, set_threads, start_deepspeed

    launchers = launchers_above()
    require_dali()
    deepspeed = start_deepspeed(config.train.device)
    set_threads(config.train.threads)
    try:
        with run_folder(Path(config.output)):
            run(config, deepspeed, launchers)
    finally:
        dist.destroy_process_group()


def run(config: Config, deepspeed: Any, launchers: Sequence[psutil.Process]) -> None:
    """One run inside a process group: data, model, loop."""
    import torch.distributed as dist

    from xkd_fast.data.pipeline import ViewPipeline
    from xkd_fast.data.sampler import check_clips_per_file
    from xkd_fast.data.shards import ShardSet
    from xkd_fast.engine.checkpoint import Checkpoints, TrainState
    from xkd_fast.engine.engine import Engine
    from xkd_fast.engine.heap import keep_freed_memory
    from xkd_fast.engine.launch import StopSignal, first_rank_first, own_device
    from xkd_fast.engine.memory import MemoryRecord
    from xkd_fast.engine.reporter import Reporter
    from xkd_fast.engine.schedule import Schedule
    from xkd_fast.model.build import build_model

    world_size = dist.get_world_size()
    checkpoints = Checkpoints.from_config(config)
    first_rank_first(checkpoints.recover)
    path = checkpoints.resolve(config.checkpoint.resume)
    if path is None and checkpoints.found():
        raise UserError(
            f"{config.output} holds checkpoints of an earlier run; go on with --resume auto, name another output, or delete it"
        )
    # refuse a batch that does not divide, before hours go into rendering
    check_clips_per_file(config.data.clips_per_file, config.train.clips_per_pass(world_size))
    model_options, switches = settle(config, world_size)
    if own_device().type == "cpu":
        keep_freed_memory()
    first_rank_first(lambda: make_ready(config, model_options))

    stop = StopSignal(launchers)
    shards = ShardSet.open(training_shards(config), remote=config.data.remote, cache=config.data.cache)
    pipeline = ViewPipeline.from_config(config, shards, dist.get_rank(), world_size, own_device())
    schedule = Schedule(config, pipeline.sampler.steps_per_epoch)
    last_step = min(schedule.total_steps, config.train.stop_after_steps or schedule.total_steps)
    with MemoryRecord(Path(config.output), config.log.memory_snapshot, own_device()) as record:
        engine = Engine(build_model(model_options, seed=config.seed), config, deepspeed)
        state = TrainState.start(config, pipeline.shards, world_size=world_size)
        if path is not None:
            state = checkpoints.load(engine, path, state, config)
        first_rank_first(lambda: write_aside(Path(config.output) / "config.yaml", render_config(config).encode()))
        record.expect(state.step + 1, last_step)
        with pipeline, Reporter(config, engine, state, schedule, step_cost(config, engine)) as reporter:
            reporter.say(describe(config, engine, world_size, pipeline, schedule, switches, path))
            reporter.watch(pipeline.times)
            batches = timed(pipeline.batches(*divmod(state.batches, schedule.steps_per_epoch)), reporter)
            if config.model.teacher_precision == "fp8":
                batches = checked(batches, engine, reporter)
            while state.step < last_step and not stop.agreed:
                moment = schedule.at(state.step)
                engine.prepare(moment)
                for _ in range(engine.accumulation):
                    views, masks = next(batches)
                    losses = engine.forward_backward(views, masks)
                    reporter.add(losses)
                    applied = engine.step()
                state = state.after_step(applied=applied)
                if not applied:
                    reporter.skip_step()
                    continue
                synchronised = reporter.end_step(state.step, moment, pipeline.damage, is_last=state.step == last_step)
                record.after(state.step)
                if synchronised or engine.device.type == "cpu":
                    stop.agree(engine.device)
                    if stop.agreed:
                        reporter.say(f"asked to stop: this ends after step {state.step}; --resume auto goes on from there")
                if checkpoints.due(state.step) or state.step == last_step or stop.agreed:
                    reporter.check_savable(state.step)
                    reporter.say(f"checkpoint {checkpoints.save(engine, state, config)}")


def settle(config: Config, world_size: int) -> tuple[ModelOptions, list[str]]:
    """The model's options without an ``auto`` among its switches, and why they are as they are."""
    from xkd_fast.engine.launch import own_device
    from xkd_fast.model.switches import obstacle_to, settled

    train = config.train
    obstacle = partial(obstacle_to, config.model, train.zero_stage, train.precision)
    return settled(config.model, own_device(), train.precision, train.clips_per_pass(world_size), obstacle=obstacle)


def step_cost(config: Config, engine: Engine) -> StepCost:
    """What a step costs, and what this run's devices can do together."""
    import torch
    import torch.distributed as dist

    from xkd_fast.analysis.flops import step_flops, total
    from xkd_fast.analysis.profile import measured_peak
    from xkd_fast.engine.reporter import StepCost

    is_gpu = engine.device.type == "cuda"
    dtype = getattr(torch, config.train.precision)
    peak = torch.tensor(measured_peak(engine.device, dtype, 8192 if is_gpu else 1024), device=engine.device)
    dist.all_reduce(peak)
    return StepCost(total(step_flops(config.model)).total, peak.item())


def timed(batches: Iterator[tuple[Views, MaskNoise]], reporter: Reporter) -> Iterator[tuple[Views, MaskNoise]]:
    """The same batches, with the time spent waiting for each reported."""
    while True:
        start = time.perf_counter()
        batch = next(batches)
        reporter.waited(time.perf_counter() - start)
        yield batch


def checked(
    batches: Iterator[tuple[Views, MaskNoise]], engine: Engine, reporter: Reporter
) -> Iterator[tuple[Views, MaskNoise]]:
    """The same batches; on the first one, teachers in FP8 are compared with themselves in bfloat16, and the result is told.

    Raises:
        UserError: they are too far apart.
    """
    views, masks = next(batches)
    reporter.say(engine.check_teachers(views))
    yield views, masks
    yield from batches


def training_shards(config: Config) -> list[Path | str]:
    """The shard sets of a run, folders and addresses: ``data.train``, or the rendered demo's.

    Raises:
        UserError: if neither is set.
    """
    if config.data.train:
        from xkd_fast.data.shards import shard_place

        return [shard_place(place) for place in config.data.train]
    if config.data.demo is None:
        raise UserError(
            "data.train is empty: name shard folders made by `xkd-fast prepare`, such as 'data.train=[/data/k400/shards]'"
        )
    return [Path(config.data.demo.shards) / "train"]


def make_ready(config: Config, model: ModelOptions) -> None:
    """The first rank's part before all others start: what is asked of this machine, and the demo's data where it is missing."""
    from rich.console import Console

    from xkd_fast.data.rendered import ensure_rendered
    from xkd_fast.engine.log import require_wandb
    from xkd_fast.model.attention import choose
    from xkd_fast.model.fp8 import require_fp8
    from xkd_fast.model.kernels import require_kernels
    from xkd_fast.model.vit import require_compiler

    if config.log.wandb:
        require_wandb()
    if model.implementation == "fast":
        choose(model.attention)
        require_kernels(model.kernels)
    if model.compile is True:
        require_compiler()
    if config.model.teacher_precision == "fp8":
        require_fp8()
    if not config.data.train:
        ensure_rendered(config, Console(), workers=os.cpu_count() or 1)


def describe(
    config: Config,
    engine: Engine,
    world_size: int,
    pipeline: ViewPipeline,
    schedule: Schedule,
    switches: list[str],
    resumed: Path | None,
) -> str:
    """What is about to happen, in a few lines."""
    import torch

    from xkd_fast.model.attention import described as attention_described
    from xkd_fast.model.kernels import described

    train, model = config.train, config.model
    clips, accumulation = train.clips_per_pass(world_size), train.accumulation(world_size)
    attention = getattr(engine.module, "attention", None)
    choices: list[str] = []
    if attention:
        where = (model, engine.device, getattr(torch, train.precision))
        choices = [*attention_described(attention, *where), *described(*where), *switches]
    machine = f"{world_size} × {engine.device.type}, {train.precision}, ZeRO {train.zero_stage}"
    lines = [
        f"{model.variant} ({model.implementation}) on {machine}",
        epochs_of_files(len(pipeline.shards), config, schedule),
        *pipeline.describe(),
        f"{train.global_batch} clips per step = {world_size} ranks × {clips} × {accumulation} accumulated",
        *choices,
        f"optimiser: {engine.update_reason}",
        f"peak learning rate {schedule.base_learning_rate:.3g}; run folder {config.output}",
    ]
    if resumed is not None:
        lines.append(f"resumed from {resumed}")
    return "\n".join(lines)


def epochs_of_files(files: int, config: Config, schedule: Schedule) -> str:
    """How long a run is, in passes over the files, and in clips where there are several of a file."""
    epochs, repeats = config.train.epochs, config.data.clips_per_file
    steps = f"{epochs} epochs × {schedule.steps_per_epoch} steps"
    if repeats == 1:
        return f"{files} clips, {steps}"
    return f"{files} files × {repeats} clips, {steps}: as many clips as {epochs * repeats} epochs of one clip a file"


if __name__ == "__main__":
    sys.exit(main())
