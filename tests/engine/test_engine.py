"""The engine under DeepSpeed on two ranks takes the step that the plain reference takes on the same global batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.distributed import run_ranks
from tests.engine.engine_ranks import BATCH, CELLS, CLIP_NORM, STEPS, WEIGHT_DECAY, cell_options, moment
from tests.tiny import part_of, random_batch
from xkd_fast import reference
from xkd_fast.model.build import build_model
from xkd_fast.model.options import ModelOptions
from xkd_fast.weights import read_safetensors

WORLD_SIZE = 2


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the final state of every cell."""
    folder = tmp_path_factory.mktemp("engine")
    run_ranks(["-m", "tests.engine.engine_ranks", str(folder)], WORLD_SIZE)
    return folder


def plain_training(variant: str, precision: str, accumulation: int) -> dict[str, torch.Tensor]:
    """The same steps in one process with the reference's functions; MMD per micro-batch, as on its rank.

    The model is the reference too, but in bfloat16: there the two round in different places, which AdamW blows up.
    """
    options = cell_options(variant)
    model = fresh_reference(options) if precision == "float32" else build_model(options, seed=1)
    optimizer = torch.optim.AdamW(reference.parameter_groups(model, WEIGHT_DECAY), betas=(0.9, 0.95), eps=1e-8)
    parts = WORLD_SIZE * accumulation
    size, totals, norm = BATCH // parts, [], torch.zeros(())
    for step in range(STEPS):
        now = moment(step)
        model.set_teacher_temperatures(now.video_temperature, now.audio_temperature)
        views, masks = random_batch(options, BATCH, seed=step, dtype=torch.float32)
        optimizer.zero_grad()
        means: dict[str, torch.Tensor] = {}
        total = 0.0
        for part in range(parts):
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
                losses = model(*part_of(views, masks, slice(part * size, (part + 1) * size)))
            (losses.total / parts).backward()
            total += losses.total.item() / parts
            for modality, mean in losses.outputs.teacher_means.items():
                means[modality] = means.get(modality, 0) + mean / parts
        if now.last_layer_frozen:
            for modality in ("video", "audio"):
                model.student(modality).head.prototypes.grad = None
        norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
        reference.clip_gradients(model, CLIP_NORM)
        for group in optimizer.param_groups:
            group["lr"] = now.learning_rate
        optimizer.step()
        reference.update_teachers(model, now.video_momentum, now.audio_momentum)
        reference.update_centres(model, means)
        totals.append(total)
    return {**model.state_dict(), "total": torch.tensor(totals), "gradient_norm": norm}


def fresh_reference(options: ModelOptions) -> reference.XKD:
    """The reference with the weights that every rank starts from."""
    torch.manual_seed(1)
    return reference.XKD(options)


@pytest.mark.parametrize("name", CELLS)
def test_two_ranks_equal_the_reference(name: str, trained: Path) -> None:
    """Red if clipping, decay groups, freezing, EMA, centres, averaging over ranks or accumulation differ from the reference."""
    variant, precision, _, accumulation = CELLS[name]
    expected = plain_training(variant, precision, accumulation)
    actual = read_safetensors(trained / f"{name}.safetensors")
    start = fresh_reference(cell_options(variant)).state_dict()
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        change = value - start.get(key, 0)  # how far training moved it: the error must be small beside that
        error = actual[key] - value
        if precision == "float32":
            bound = 2e-3 * change.norm() + 1e-7 * change.numel() ** 0.5
            assert error.norm() <= bound, f"{name} {key}: {error.norm():.2e} of {change.norm():.2e}"
            assert error.abs().max() <= 2e-2 * change.abs().max() + 2e-7, f"{name} {key}: {error.abs().max():.2e}"
        else:  # AdamW blows single roundings of small gradients up to whole steps
            assert error.norm() <= 0.1 * change.norm() + 1e-6, f"{name} {key}: {error.norm():.2e} of {change.norm():.2e}"
