"""The rank side of test_engine: trains a tiny model a few steps in every cell and writes what came out. Run by run_ranks."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.tiny import part_of, random_batch, tiny_options
from xkd_fast.config import Config, DataOptions, OptimizerOptions, TrainOptions
from xkd_fast.data.log_mel import MelOptions
from xkd_fast.engine.engine import Engine
from xkd_fast.engine.launch import start_deepspeed
from xkd_fast.engine.schedule import Moment
from xkd_fast.engine.zero import whole
from xkd_fast.model.build import build_model
from xkd_fast.model.options import EncoderOptions, ModelOptions
from xkd_fast.reference import MODALITIES
from xkd_fast.weights import write_safetensors
from xkd_kernels import naive_quantise_rows

STEPS, BATCH = 3, 16
# With the usual eps of 1e-8 AdamW turns the rounding of a gradient that is nearly 0 into a whole step.
WEIGHT_DECAY, CLIP_NORM, EPS = 0.3, 0.05, 1e-3


@dataclass(frozen=True)
class Cell:
    """One way to take the same steps."""

    stage: int = 1
    accumulation: int = 1
    variant: str = "xkd"
    precision: str = "float32"
    implementation: str = "fast"  # of the model
    update: str = "auto"  # of the optimiser
    scope: str = "rank"  # of the MMD
    offload: bool = False
    checkpointing: bool = False
    fp8: bool = False  # the teachers
    overflow: bool = False  # a loss scale at which the first attempts overflow
    on_gpu: bool = False  # with NCCL

    @property
    def name(self) -> str:
        """What distinguishes it, for a file's name and the table."""
        usual = asdict(Cell())
        shown = {key: value for key, value in asdict(self).items() if key == "stage" or value != usual[key]}
        return "-".join(f"{key}_{value}" for key, value in shown.items())


def moment(step: int) -> Moment:
    """Schedules that differ from step to step; in the first step the heads' last layers are frozen."""
    return Moment(1e-3 * (1 + step), 0.9 + 0.02 * step, 0.8 + 0.05 * step, 0.1, 0.07, last_layer_frozen=step == 0)


def cell_options(cell: Cell) -> ModelOptions:
    """The model of a cell."""
    options = tiny_options(variant=cell.variant, implementation=cell.implementation, checkpointing=cell.checkpointing)
    if cell.fp8:
        options = replace(options, encoder=EncoderOptions(32, 2, 4), teacher_precision="fp8")
    return replace(options, objective=replace(options.objective, mmd_scope=cell.scope))


def cell_config(cell: Cell, world_size: int) -> Config:
    """The configuration of a cell."""
    data = DataOptions(fps=8, clip_seconds=1.0, local_audio_seconds=0.5)
    train = TrainOptions(
        epochs=1,
        global_batch=BATCH,
        micro_batch=BATCH // (world_size * cell.accumulation),
        precision=cell.precision,  # type: ignore[arg-type]
        zero_stage=cell.stage,  # type: ignore[arg-type]
        offload_optimizer=cell.offload,
    )
    optimizer = OptimizerOptions(
        weight_decay=WEIGHT_DECAY,
        clip_norm=CLIP_NORM,
        eps=EPS,
        implementation=cell.update,  # type: ignore[arg-type]
    )
    return Config(model=cell_options(cell), data=data, mel=MelOptions(hop=200), train=train, optimizer=optimizer)


def train_cell(cell: Cell, deepspeed: Any) -> dict[str, torch.Tensor]:
    """Train one cell; the state, the losses averaged over ranks and the gradient norms."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    config = cell_config(cell, world_size)
    engine = Engine(build_model(config.model, seed=1), config, deepspeed)
    if cell.overflow:
        engine.loss_scale.value = 2.0**40
    size, totals, norms, skipped = BATCH // (world_size * cell.accumulation), [], [], 0
    for step in range(STEPS):
        views, masks = random_batch(config.model, BATCH, seed=step, dtype=torch.float32)
        views, masks = views.to(engine.device), masks.to(engine.device)
        applied = False
        while not applied:
            engine.prepare(moment(step))
            found = []
            if cell.fp8 and step == 0:
                engine.check_teachers(part_of(views, masks, slice(rank * size, (rank + 1) * size))[0])
            for micro in range(engine.accumulation):
                start = (micro * world_size + rank) * size
                losses = engine.forward_backward(*part_of(views, masks, slice(start, start + size)))
                found.append(losses.total.detach())
                applied = engine.step()
            skipped += not applied
        totals.append(torch.stack(found).mean())
        norms.append(torch.stack([engine.optimizer.gradient_norm(), engine.optimizer.clipped_gradient_norm()]))
    total = torch.stack(totals)
    dist.all_reduce(total)
    with whole(list(engine.module.parameters())):
        state = {name: tensor.detach().clone() for name, tensor in engine.module.state_dict().items()}
        if cell.fp8:
            require_fresh_copies(engine.module)
    for name, tensor in state.items():
        first = tensor.clone()
        dist.broadcast(first, src=0)
        assert torch.equal(first, tensor), f"{cell.name}: ranks hold different {name}"
    extra = {"total": total / world_size, "norms": torch.stack(norms), "skipped": torch.tensor(skipped)}
    return {name: tensor.cpu() for name, tensor in {**state, **{name: each.float() for name, each in extra.items()}}.items()}


def require_fresh_copies(model: Any) -> None:
    """Whole as they are here, the teachers' weights in E4M3 must be those of the teachers."""
    with torch.autocast("cpu", torch.bfloat16):
        copies = model.teachers_for(torch.device("cpu"))
    for modality in MODALITIES:
        for original, copy in zip(model.teacher(modality).encoder.blocks, copies[modality].encoder.blocks, strict=True):
            for name in ("qkv", "proj", "fc1", "fc2"):
                expected, _ = naive_quantise_rows(getattr(original, name).weight.detach())
                assert torch.equal(getattr(copy, name).weight.float(), expected.float()), f"{modality} {name} is stale"


def main(folder: Path) -> None:
    """Train every cell that ``cells.json`` lists; rank 0 writes what came out."""
    deepspeed = start_deepspeed()
    for values in json.loads((folder / "cells.json").read_text()):
        cell = Cell(**values)
        assert (dist.get_backend() == "nccl") == cell.on_gpu
        state = train_cell(cell, deepspeed)
        if dist.get_rank() == 0:
            write_safetensors(state, folder / f"{cell.name}.safetensors")
        dist.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
