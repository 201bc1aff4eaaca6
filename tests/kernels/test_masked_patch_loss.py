"""The loss of masked patches against the naive twin in float64, and what it is made of."""

from __future__ import annotations

import sys

import pytest
import torch

from tests.kernels.compare import TOLERANCE, assert_agrees, relative_error
from xkd_fast import reference
from xkd_fast.analysis.kept import Kept
from xkd_kernels import masked_patch_loss, naive_masked_patch_loss
from xkd_kernels.masked_patch_loss import masked_patch_loss_backward, masked_patch_loss_forward

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BACKENDS = ["triton", "torch"]
TYPES = [torch.float32, torch.bfloat16, torch.float16]


def video(layout, dtype, device):
    """Two clips of 12 patches (4, 16, 16); no two channels alike."""
    torch.manual_seed(3)
    last = torch.randn(2, 8, 32, 48, 3) * torch.tensor([0.2, 1.0, 3.0]) + torch.tensor([0.5, -2.0, 8.0])
    last = (last * 8 + 128).clamp(0, 255).byte() if dtype == torch.uint8 else last.to(dtype)
    clip = last.permute(0, 4, 1, 2, 3)
    return (clip if layout == "last" else clip.contiguous()).to(device)


def spectrogram(device):
    """Two clips of 20 patches (4, 16), far from zero."""
    torch.manual_seed(4)
    return torch.randn(2, 1, 20, 64, device=device) - 7


def some_ids(count, total, device):
    return torch.stack([torch.randperm(total, device=device)[:count] for _ in range(2)])


def guess(ids, numbers, dtype, device):
    torch.manual_seed(numbers)
    return torch.randn(*ids.shape, numbers, device=device).to(dtype)


def agrees(clip, ids, patch, mean, std, dtype, backend, device, tolerance=None):
    predicted = guess(ids, clip.shape[1] * torch.Size(patch).numel(), dtype, device)
    wide = clip if clip.dtype == torch.uint8 else clip.double()
    assert_agrees(
        lambda x: masked_patch_loss(x, clip, ids, patch, mean, std, backend=backend),
        lambda x: naive_masked_patch_loss(x, wide, ids, patch, mean, std),
        [predicted],
        tolerance or TOLERANCE[dtype],
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("layout", ["first", "last"])
@pytest.mark.parametrize("kind", [torch.uint8, torch.float32, torch.bfloat16])
def test_video(kind, layout, dtype, backend, device):
    """Catches bytes not divided, a channel's mean or deviation of another, another clip's patches, a factor of 2 / numel."""
    clip = video(layout, kind, device)
    agrees(clip, some_ids(5, 12, device), (4, 16, 16), MEAN, STD, dtype, backend, device)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("count", [1, 17, 20])
@pytest.mark.parametrize("dtype", TYPES)
def test_spectrogram(dtype, count, backend, device):
    """Catches padding rows of a program in the sum, two axes taken for three, patches of the next clip."""
    agrees(spectrogram(device), some_ids(count, 20, device), (4, 16), (), (), dtype, backend, device)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("patch", "size"),
    [((1, 1, 1), (2, 2, 2)), ((3, 3, 7), (6, 9, 14)), ((1, 3, 47), (2, 3, 47)), ((2, 8, 12), (4, 16, 24)), ((4, 32, 32),) * 2],
)
def test_other_patches(patch, size, backend, device):
    """Catches padding numbers in mean or variance, the biased variance (a third off at 3 numbers), a run that is none."""
    torch.manual_seed(5)
    for clip in (torch.randn(2, *size, 3, device=device).movedim(-1, 1), torch.randn(2, 3, *size, device=device)):
        total = torch.Size(n // p for n, p in zip(size, patch)).numel()
        # at 3 numbers a deviation may be small beside what its numbers are rounded to
        agrees(clip, some_ids(total, total, device), patch, MEAN, STD, torch.float32, backend, device, 3e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_statistics_far_from_zero(backend, device):
    """Catches a variance as the difference of two large numbers: at a mean of 1000 deviations half the digits are lost."""
    clip = video("first", torch.float32, device) + 1000
    agrees(clip, some_ids(5, 12, device), (4, 16, 16), (), (), torch.float32, backend, device, 1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [0.0, 0.25, -2.3917])  # the last, no sum of powers of two, is a spectrogram's silence
def test_a_patch_of_one_colour(value, backend, device):
    """Catches a missing epsilon: without it such a patch's target is no number, with it 0."""
    clip, ids = torch.full((2, 1, 8, 32), value, device=device), some_ids(3, 4, device)
    predicted = guess(ids, 64, torch.float32, device)
    loss = masked_patch_loss(predicted, clip, ids, (4, 16), backend=backend)
    assert loss.item() == pytest.approx(predicted.square().mean().item(), rel=1e-6 if value >= 0 else 1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_errors(backend, device):
    """Catches errors squared or summed in a half type, where 300² is infinite."""
    clip, ids = video("last", torch.uint8, device), some_ids(12, 12, device)
    predicted = (1000 * guess(ids, 3072, torch.float32, device)).half()
    exact = naive_masked_patch_loss(predicted.double(), clip, ids, (4, 16, 16), MEAN, STD)
    assert masked_patch_loss(predicted, clip, ids, (4, 16, 16), MEAN, STD, backend=backend).item() == pytest.approx(
        exact.item(), rel=1e-6
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_in_place_in_whatever_strides(backend, device):
    """Catches predictions, ids or clips taken for contiguous, and 32-bit ids read as 64-bit ones."""
    clip = video("last", torch.uint8, device)[:, :, ::2, 8:, 16:]  # 2 × 1 × 2 patches of (2, 12, 16)
    order = torch.stack([torch.randperm(4, device=device) for _ in range(2)])
    for ids in (order[:, 1:], order.int()[:, :3], order.t().contiguous().t()[:, ::2]):
        wide = guess(ids, 2 * 12 * 16 * 3 * 2, torch.float32, device)
        assert_agrees(
            lambda x, ids=ids: masked_patch_loss(x, clip, ids, (2, 12, 16), MEAN, STD, backend=backend),
            lambda x, ids=ids: naive_masked_patch_loss(x, clip, ids.long(), (2, 12, 16), MEAN, STD),
            [wide[..., ::2]],
            1e-6,
        )


def test_is_the_references_loss(device):
    """Catches a twin that has another definition than the trainer's yardstick."""
    clip, ids = spectrogram(device).double(), some_ids(20, 20, device)
    predicted = guess(ids, 64, torch.float64, device)
    patches = reference.patchify(clip, (4, 16)).gather(1, ids.unsqueeze(-1).expand(-1, -1, 64))
    expected = reference.patch_error(predicted, patches).item()
    assert naive_masked_patch_loss(predicted, clip, ids, (4, 16)).item() == pytest.approx(expected, rel=1e-13)
    assert masked_patch_loss(predicted, clip, ids, (4, 16)).item() == pytest.approx(expected, rel=1e-13)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_clip_gets_no_gradient(backend, device):
    """Catches targets that are trained, and a clip whose mere need of a gradient is an error."""
    clip, ids = spectrogram(device).requires_grad_(), some_ids(3, 20, device)
    predicted = guess(ids, 64, torch.float32, device).requires_grad_()
    masked_patch_loss(predicted, clip, ids, (4, 16), backend=backend).backward()
    assert clip.grad is None and predicted.grad.abs().min() > 0


def test_what_is_kept(device):
    """Catches a target, or a prediction in float32, kept for the backward pass."""
    clip, ids = video("last", torch.uint8, device), some_ids(5, 12, device)
    predicted = guess(ids, 3072, torch.bfloat16, device).requires_grad_()
    for backend, more in (("torch", 0), ("triton", clip.nbytes + ids.nbytes + 2 * 4 * ids.numel())):
        kept = Kept()
        kept.count(lambda backend=backend: masked_patch_loss(predicted, clip, ids, (4, 16, 16), MEAN, STD, backend=backend))
        assert sum(kept.bytes.values()) == predicted.nbytes + more


def test_derivatives_of_every_kind_by_torch(device):
    """Catches second derivatives that are silently 0, and forward mode or torch.func that a saved difference breaks."""
    clip, ids = spectrogram(device)[:1, :, :8, :32].double(), torch.tensor([[3, 0]], device=device)
    predicted = guess(ids, 64, torch.float64, device).requires_grad_()

    def loss(x):
        return masked_patch_loss(x, clip, ids, (4, 16), backend="torch")

    assert torch.autograd.gradgradcheck(loss, predicted)
    assert torch.autograd.gradcheck(loss, predicted, check_forward_ad=True)

    def with_penalty(loss):
        value = loss(predicted)
        (gradient,) = torch.autograd.grad(value, predicted, create_graph=True)
        return torch.autograd.grad(value + 100 * gradient.square().sum(), predicted)[0]

    exact = with_penalty(lambda x: naive_masked_patch_loss(x, clip, ids, (4, 16)))
    assert relative_error(with_penalty(loss), exact) < 1e-13
    exact = torch.func.grad(lambda x: naive_masked_patch_loss(x, clip, ids, (4, 16)))(predicted.detach())
    assert relative_error(torch.func.grad(loss)(predicted.detach()), exact) < 1e-13
    with pytest.raises(NotImplementedError, match="for forward mode take backend='torch'"):
        single = exact.float()
        torch.func.jvp(lambda x: masked_patch_loss(x, clip.float(), ids, (4, 16), backend="triton"), (single,), (single,))


def test_a_second_derivative_is_refused_by_the_kernel(device):
    """Catches one that is silently 0; PyTorch's operators have it."""
    clip, ids = spectrogram(device), some_ids(3, 20, device)
    predicted = guess(ids, 64, torch.float32, device).requires_grad_()
    loss = masked_patch_loss(predicted, clip, ids, (4, 16), backend="triton")
    (gradient,) = torch.autograd.grad(loss, predicted, create_graph=True)
    with pytest.raises((NotImplementedError, RuntimeError)):
        gradient.square().sum().backward()


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_changes_nothing(backend, device):
    """Catches a loss, or a target, in autocast's type."""
    clip, ids = spectrogram(device), some_ids(3, 20, device)
    predicted = guess(ids, 64, torch.float32, device)
    with torch.autocast(device.type, torch.bfloat16):
        found = masked_patch_loss(predicted, clip, ids, (4, 16), backend=backend)
    assert found.dtype == torch.float32
    assert torch.equal(found, masked_patch_loss(predicted, clip, ids, (4, 16), backend=backend))


def test_ids_of_no_patch_make_the_loss_nan_on_a_gpu(device, monkeypatch):
    """Catches a read outside of the clip where nothing waits to check: such a loss is NaN, and so is that patch's gradient."""
    monkeypatch.setattr(sys.modules["xkd_kernels.masked_patch_loss"], "check_ids", lambda *of: None)
    predicted = torch.randn(2, 2, 64, device=device, requires_grad=True)
    ids = torch.tensor([[0, 20], [-1, 3]], device=device)
    loss = masked_patch_loss(predicted, spectrogram(device), ids, (4, 16), backend="triton")
    loss.backward()
    assert loss.isnan() and predicted.grad.isnan().all(dim=-1).tolist() == [[False, True], [True, False]]
    assert predicted.grad[0, 0].isfinite().all() and predicted.grad[1, 1].isfinite().all()


def test_opcheck(device):
    """Catches a fake implementation of other shapes or types."""
    clip, ids = video("last", torch.uint8, device), some_ids(2, 12, device)
    predicted = guess(ids, 3072, torch.bfloat16, device).requires_grad_()
    geometry = ([4, 16, 16], list(MEAN), list(STD))
    torch.library.opcheck(masked_patch_loss_forward, (predicted, clip, ids, *geometry))
    loss, averages, inverses = masked_patch_loss_forward(predicted.detach(), clip, ids, *geometry)
    arguments = (loss, predicted.detach(), clip, ids, averages, inverses, *geometry)
    torch.library.opcheck(masked_patch_loss_backward, arguments)


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_whole(backend, device):
    """Catches a graph break, and a compiled program of other numbers."""
    torch._dynamo.reset()
    clip, ids = spectrogram(device), some_ids(5, 20, device)
    predicted = guess(ids, 64, torch.bfloat16, device).requires_grad_()

    def loss(x, clip, ids):
        return 2 * masked_patch_loss(x, clip, ids, (4, 16), backend=backend)

    found = torch.compile(loss, fullgraph=True, backend="aot_eager")(predicted, clip, ids)
    (gradient,) = torch.autograd.grad(found, predicted)
    (expected,) = torch.autograd.grad(loss(predicted, clip, ids), predicted)
    assert torch.equal(gradient, expected) and torch.equal(found, loss(predicted, clip, ids))


@pytest.mark.parametrize("backend", BACKENDS)
def test_wrong_inputs_are_refused(backend, device):
    """Catches predictions of other patches, which would be broadcast or read beyond their end, and a variance of one number."""
    clip, ids = spectrogram(device), some_ids(3, 20, device)

    def loss(predicted, ids=ids, patch=(4, 16)):
        return masked_patch_loss(predicted, clip, ids, patch, backend=backend)

    with pytest.raises(ValueError, match=r"predicted has the shape \[2, 1, 64\], but \[2, 3, 64\] is wanted"):
        loss(torch.zeros(2, 1, 64, device=device))
    with pytest.raises(ValueError, match=r"predicted has the shape \[2, 3, 63\]"):
        loss(torch.zeros(2, 3, 63, device=device))
    with pytest.raises(ValueError, match="at least 1 patch"):
        loss(torch.zeros(2, 0, 64, device=device), ids[:, :0])
    with pytest.raises(ValueError, match="1 number, which has no variance"):
        loss(torch.zeros(2, 3, 1, device=device), patch=(1, 1))
