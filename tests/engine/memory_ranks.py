"""The rank side of test_engine's tests of memory: what ZeRO keeps of weights, and what it never writes. Run by run_ranks."""

from __future__ import annotations

import gc
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.reductions import StorageWeakRef

from tests.engine.engine_ranks import Cell, cell_config, moment
from tests.tiny import part_of, random_batch
from xkd_fast.engine import zero
from xkd_fast.engine.engine import Engine
from xkd_fast.engine.health import squared_distance
from xkd_fast.engine.launch import start_deepspeed
from xkd_fast.model.build import build_model


def trained_engine(stage: int, deepspeed: Any) -> Engine:
    """After a step on one clip per rank."""
    config = cell_config(Cell(stage), 1)
    world_size = dist.get_world_size()
    config = replace(config, train=replace(config.train, global_batch=world_size, micro_batch=1))
    engine = Engine(build_model(config.model, seed=1), config, deepspeed)
    views, masks = random_batch(config.model, world_size, dtype=torch.float32)
    engine.prepare(moment(1))
    rank = dist.get_rank()
    engine.forward_backward(*part_of(views, masks, slice(rank, rank + 1)))
    engine.step()
    return engine


def partitions_left(deepspeed: Any) -> int:
    """How many of the float32 partitions that ZeRO 1 made beside the model's own weights are still there."""
    made: list[StorageWeakRef] = []
    one_copy = zero._one_copy_of_weights

    def watched(wrapped: Any) -> None:
        made.extend(StorageWeakRef(partition.untyped_storage()) for partition in wrapped.single_partition_of_fp32_groups)
        one_copy(wrapped)

    zero._one_copy_of_weights = watched
    engine = trained_engine(1, deepspeed)
    zero._one_copy_of_weights = one_copy
    gc.collect()
    assert made and engine.deepspeed is not None
    return sum(not partition.expired() for partition in made)


def unwritten_met(deepspeed: Any) -> dict[str, int]:
    """Numbers of ZeRO 3's shares that nobody has written, among those that distances and checks of weights look at."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills what torch.empty returns with NaN
    engine = trained_engine(3, deepspeed)
    torch.use_deterministic_algorithms(False)
    parameters = list(engine.module.parameters())
    shares = [parameter.ds_tensor for parameter in parameters]
    distances = torch.stack([squared_distance(engine.teachers.pairs(modality)) for modality in ("video", "audio")])
    own = engine.own_parameters()
    counts = torch.tensor([sum(share.numel() for share in own)])
    dist.all_reduce(counts)
    return {
        "in_shares": sum(int(share.isnan().sum()) for share in shares),
        "in_weights": sum(int(share.isnan().sum()) for share in own),
        "in_distances": int(distances.isnan().sum()),
        "weights_missed": sum(parameter.ds_numel for parameter in parameters) - int(counts),
    }


def main(folder: Path) -> None:
    """Write what the last rank met: its shares are those with padding."""
    deepspeed = start_deepspeed()
    found = {"partitions_left": partitions_left(deepspeed), **unwritten_met(deepspeed)}
    if dist.get_rank() == dist.get_world_size() - 1:
        (folder / "memory.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
