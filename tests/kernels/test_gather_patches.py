"""Gathering of patches against its naive twin, and against the reference's own patches."""

from __future__ import annotations

import math

import pytest
import torch

from tests.kernels.compare import TOLERANCE, assert_agrees, relative_error
from xkd_fast.reference import patchify
from xkd_kernels import gather_patches, naive_gather_patches
from xkd_kernels.gather_patches import gather_patches_backward, gather_patches_forward, geometry

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def video(layout, dtype, device):
    torch.manual_seed(3)
    shape = (2, 3, 8, 32, 48) if layout == "first" else (2, 8, 32, 48, 3)
    clip = (
        torch.randint(0, 256, shape, device=device).to(torch.uint8)
        if dtype == torch.uint8
        else torch.randn(shape).to(device, dtype)
    )
    return clip if layout == "first" else clip.permute(0, 4, 1, 2, 3)


def some_ids(count, total, device):
    return torch.stack([torch.randperm(total, device=device)[:count] for _ in range(2)])


@pytest.mark.parametrize("layout", ["first", "last"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("patch", [(4, 16, 16), (2, 8, 12)])
def test_video(layout, dtype, patch, device):
    """Catches strides, grid or channels taken in the wrong order, a clip's patches out of another, a missing division."""
    clip = video(layout, dtype, device)
    total = (8 // patch[0]) * (32 // patch[1]) * (48 // patch[2])
    ids = some_ids(5, total, device)
    # the copy is exact; one multiplication and addition in place of two divisions and a difference
    tolerance = TOLERANCE[torch.float32] if dtype == torch.uint8 else TOLERANCE[dtype]
    assert_agrees(
        lambda x, i: gather_patches(x, i, patch, MEAN, STD, backend="triton"),
        lambda x, i: naive_gather_patches(x, i, patch, MEAN, STD, dtype=torch.float64),
        [clip, ids],
        tolerance,
        gradients=dtype != torch.uint8,
    )


def test_spectrogram(device):
    """Catches two axes taken for three, and values that are normalised though nobody asked."""
    torch.manual_seed(4)
    clip = torch.randn(2, 1, 20, 64, device=device)
    ids = some_ids(7, 20, device)
    found = gather_patches(clip, ids, (4, 16), backend="triton")
    assert torch.equal(found, patchify(clip, (4, 16)).gather(1, ids.unsqueeze(-1).expand(-1, -1, 64)))


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_all_patches_in_the_released_order(backend, device):
    """Catches an order of tokens or numbers other than the reference's."""
    clip = video("last", torch.float32, device)
    ids = torch.arange(12, device=device).expand(2, -1)
    assert torch.equal(gather_patches(clip, ids, (4, 16, 16), backend=backend), patchify(clip, (4, 16, 16)))


def test_a_patch_taken_twice_gathers_both_gradients(device):
    """Catches a gradient that is stored instead of added."""
    clip = video("first", torch.float32, device).requires_grad_()
    ids = torch.tensor([[3, 3], [0, 1]], device=device)
    gather_patches(clip, ids, (4, 16, 16), backend="triton").sum().backward()
    assert clip.grad.max() == 2 and clip.grad.sum() == 4 * 3072


@pytest.mark.parametrize("patch", [(4, 16, 16), (2, 8, 12), (1, 4, 6), (4, 32, 1), (1, 1, 8)])
def test_runs_of_numbers_lie_side_by_side(patch):
    """Catches a load of a vector of no neighbours, or that begins between vectors: no interpreter would show it."""

    def places(*shape):
        return torch.arange(torch.Size(shape).numel(), device="cpu").view(shape)

    clips = {
        "channels first": (places(2, 3, 8, 32, 48), 1),
        "channels first, every third column": (places(2, 3, 8, 32, 144)[..., ::3], 1),
        "channels last": (places(2, 8, 32, 48, 3).movedim(-1, 1), math.gcd(16, 3 * patch[2])),
        "channels last, wider rows": (places(2, 8, 32, 50, 3)[:, :, :, :48].movedim(-1, 1), None),
        "columns first": (places(2, 1, 8, 48, 32).transpose(3, 4), 1 if patch[2] > 1 else None),
        "one channel": (places(2, 1, 8, 32, 48), math.gcd(16, patch[2])),
        "one channel, wider rows": (places(2, 1, 8, 32, 50)[..., :48], None),
        "one channel, every other column": (places(2, 1, 8, 32, 96)[..., ::2], 1),
    }
    for name, (clip, expected) in clips.items():
        run = geometry(clip, list(patch))[0]["RUN"]
        assert expected in (run, None), name
        own = clip[0, :, : patch[0], : patch[1], : patch[2]].permute(1, 2, 3, 0).reshape(-1, run)  # origin: 0
        assert torch.equal(own, own[:, :1] + torch.arange(run)) and not (own[:, 0] % run).any(), name


def test_torch_backend_and_types(device):
    """Catches a fallback that normalises otherwise, or returns another type."""
    clip, ids = video("last", torch.uint8, device), some_ids(5, 12, device)
    exact = naive_gather_patches(clip, ids, (4, 16, 16), MEAN, STD)
    for backend in ("torch", "triton"):
        found = gather_patches(clip, ids, (4, 16, 16), MEAN, STD, dtype=torch.bfloat16, backend=backend)
        assert found.dtype == torch.bfloat16 and relative_error(found, exact) < 5e-3


def test_opcheck(device):
    """Catches a fake implementation of other shapes."""
    clip, ids = video("last", torch.float32, device), some_ids(5, 12, device)
    torch.library.opcheck(gather_patches_forward, (clip, ids, [4, 16, 16], list(MEAN), list(STD), torch.bfloat16))
    gradient = torch.randn(2, 5, 3072, device=device)
    torch.library.opcheck(gather_patches_backward, (gradient, ids, clip, [4, 16, 16], list(STD)))


def test_wrong_arguments_are_refused(device):
    """Catches patches that hang over the edge, and channels without a mean."""
    clip, ids = video("first", torch.float32, device), torch.zeros(2, 1, dtype=torch.int64, device=device)
    with pytest.raises(ValueError, match=r"patch = \[3, 16, 16\] does not divide the clip's \[8, 32, 48\]"):
        gather_patches(clip, ids, (3, 16, 16))
    with pytest.raises(ValueError, match="of a clip with 3 channels"):
        gather_patches(clip, ids, (4, 16, 16), (0.5,), (0.5,))
