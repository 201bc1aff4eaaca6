"""The rank side of test_engine: trains a tiny model a few steps in every cell and writes what came out. Run by run_ranks."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from tests.tiny import part_of, random_batch, tiny_options
from xkd_fast.config import Config, DataOptions, OptimizerOptions, TrainOptions
from xkd_fast.data.log_mel import MelOptions
from xkd_fast.engine.engine import Engine
from xkd_fast.engine.launch import start_deepspeed
from xkd_fast.engine.schedule import Moment
from xkd_fast.model.build import build_model
from xkd_fast.model.options import ModelOptions
from xkd_fast.weights import write_safetensors

STEPS, BATCH = 3, 8
WEIGHT_DECAY, CLIP_NORM = 0.3, 0.05

# name: (variant, precision, ZeRO stage, accumulation)
CELLS = {
    "zero0": ("xkd", "float32", 0, 1),
    "zero1": ("xkd", "float32", 1, 1),
    "zero2": ("xkd", "float32", 2, 1),
    "zero1_accumulated": ("xkd", "float32", 1, 2),
    "zero2_accumulated": ("mats", "float32", 2, 2),
    "zero1_mas": ("mas", "float32", 1, 1),
    "zero0_bfloat16": ("xkd", "bfloat16", 0, 1),
    "zero1_bfloat16": ("xkd", "bfloat16", 1, 1),
}


def moment(step: int) -> Moment:
    """Schedules that differ from step to step; in the first step the heads' last layers are frozen."""
    return Moment(1e-3 * (1 + step), 0.9 + 0.02 * step, 0.8 + 0.05 * step, 0.1, 0.07, last_layer_frozen=step == 0)


def cell_options(variant: str) -> ModelOptions:
    """The model of a cell."""
    return tiny_options(variant=variant)


def cell_config(variant: str, precision: str, stage: int, accumulation: int, world_size: int) -> Config:
    """The configuration of a cell."""
    model = cell_options(variant)
    data = DataOptions(fps=8, clip_seconds=1.0, local_audio_seconds=0.5)
    train = TrainOptions(
        epochs=1, global_batch=BATCH, micro_batch=BATCH // (world_size * accumulation), precision=precision, zero_stage=stage
    )
    optimizer = OptimizerOptions(weight_decay=WEIGHT_DECAY, clip_norm=CLIP_NORM)
    return Config(model=model, data=data, mel=MelOptions(hop=200), train=train, optimizer=optimizer)


def main(folder: Path) -> None:
    """Train every cell; rank 0 writes weights, each rank checks that it holds the same ones."""
    deepspeed = start_deepspeed()
    rank, world_size = dist.get_rank(), dist.get_world_size()
    for name, cell in CELLS.items():
        config = cell_config(*cell, world_size)
        engine = Engine(build_model(config.model, seed=1), config, deepspeed)
        size = config.train.micro_batch
        totals = []
        for step in range(STEPS):
            views, masks = random_batch(config.model, BATCH, seed=step, dtype=torch.float32)
            engine.prepare(moment(step))
            for micro in range(engine.accumulation):
                start = (micro * world_size + rank) * size
                losses = engine.forward_backward(*part_of(views, masks, slice(start, start + size)))
                totals.append(losses.total.detach())
                engine.step(moment(step))
        total = torch.stack(totals).reshape(STEPS, -1).mean(dim=1)
        dist.all_reduce(total)
        state = engine.module.state_dict()
        for tensor in state.values():
            first = tensor.clone()
            dist.broadcast(first, src=0)
            assert torch.equal(first, tensor), f"{name}: ranks hold different weights"
        if rank == 0:
            state = {**state, "total": total / world_size, "gradient_norm": engine.optimizer.gradient_norm()}
            write_safetensors(state, folder / f"{name}.safetensors")
        dist.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
