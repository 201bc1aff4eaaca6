"""The fast model's reconstruction loss: the reference's numbers, and no more memory than it needs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from xkd_fast import reference
from xkd_fast.analysis.kept import Kept
from xkd_fast.model.options import AudioOptions, VideoOptions
from xkd_fast.objective.reconstruction import reconstruction_loss

VIDEO = VideoOptions(8, 32, 1, 4, 16, 2, 8, mask_ratio=0.7, pixel_mean=(0.5, 0.3, 0.1), pixel_std=(0.2, 0.3, 0.5))
AUDIO = AudioOptions(16, 64, 1, 32, 4, 16, mask_ratio=0.6)
MASKED = 10
BACKENDS = ["torch", "triton"]


def batch(options: VideoOptions | AudioOptions, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Predictions of all patches of 3 clips, clips far from zero, and 10 masked patches of each."""
    generator = torch.Generator().manual_seed(0)
    predicted = torch.randn(3, options.tokens, options.patch_numbers, generator=generator, dtype=torch.float64)
    shape = (3, 8, 32, 32) if isinstance(options, VideoOptions) else (1, 16, 64)
    clip = torch.randn(3, *shape, generator=generator, dtype=torch.float64) * 0.3 + 5
    masked = torch.rand(3, options.tokens, generator=generator).argsort(dim=1)[:, -MASKED:]
    return predicted.to(dtype), clip, masked


def of_masked(predicted: Tensor, masked: Tensor) -> Tensor:
    """The predictions that the fast model makes."""
    return predicted.detach().gather(1, masked.unsqueeze(-1).expand(-1, -1, predicted.shape[-1])).requires_grad_()


@pytest.mark.parametrize("options", [VIDEO, AUDIO], ids=["video", "audio"])
@pytest.mark.parametrize(
    ("dtype", "kernels", "error"),
    [
        (torch.float64, "torch", 1e-13),
        *((torch.float32, kernels, 2e-6) for kernels in BACKENDS),
        *((torch.bfloat16, kernels, 5e-3) for kernels in BACKENDS),
    ],
)
def test_value_and_gradient_are_the_references(options, dtype, kernels, error):
    """Catches a biased variance (off by 2 % here), a target that is not normalised, a gradient off by a factor."""
    predicted, clip, masked = batch(options, dtype)
    clip = clip.to(torch.promote_types(dtype, torch.float32))
    exact = predicted.double().clone().requires_grad_()
    expected = reference.reconstruction_loss(exact, reference.patchify(clip.double(), options.patch), masked)
    expected.backward()
    own = of_masked(predicted, masked)
    loss = reconstruction_loss(own, clip, masked, options, kernels)
    (3 * loss).backward()
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert loss.item() == pytest.approx(expected.item(), rel=min(error, 2e-6))
    assert own.grad is not None and exact.grad is not None and own.grad.dtype == dtype
    expected_grad = of_masked(exact.grad, masked)
    limit = error if kernels == "torch" else max(error, 7e-3 * (dtype == torch.bfloat16))  # cut off where a GPU rounds
    assert (own.grad - 3 * expected_grad).norm() < limit * 3 * expected_grad.norm()


@pytest.mark.parametrize("kernels", BACKENDS)
def test_bytes_are_normalised_by_channel_first(kernels):
    """Catches raw bytes for pixels, a mean for another channel's, and a spectrogram or a ready video that is normalised."""
    predicted, _, masked = batch(VIDEO, torch.float32)
    own = of_masked(predicted, masked)
    pixels = torch.randint(256, (3, 8, 32, 32, 3), generator=torch.Generator().manual_seed(1)).byte().movedim(-1, 1)
    ready = reference.normalised_pixels(pixels, VIDEO, axis=1)
    expected = reference.reconstruction_loss(predicted, reference.patchify(ready, VIDEO.patch), masked)
    for clip in (pixels, ready):
        assert reconstruction_loss(own, clip, masked, VIDEO, kernels).item() == pytest.approx(expected.item(), rel=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kernels", BACKENDS)
def test_keeps_as_much_as_the_prediction(kernels, dtype):
    """Catches targets, or a float32 copy of a prediction in bfloat16, kept for the backward pass.

    Our kernel keeps the prediction itself, two numbers a patch, and the batch's own clip and ids.
    """
    predicted, clip, masked = batch(VIDEO, dtype)
    own, clip = of_masked(predicted, masked), clip.float()
    kept = Kept()
    kept.count(lambda: reconstruction_loss(own, clip, masked, VIDEO, kernels))
    more = 2 * 4 * masked.numel() + clip.nbytes + masked.untyped_storage().nbytes() if kernels == "triton" else 0
    assert sum(kept.bytes.values()) == own.nbytes + more
