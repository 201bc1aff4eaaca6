"""Wrong input is one clear error before a kernel reads memory by it, and both backends agree on what is wrong."""

from __future__ import annotations

import sys

import pytest
import torch

import xkd_kernels as X

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CLIP = torch.zeros(2, 3, 4, 32, 32, dtype=torch.uint8, device=DEVICE)
IDS = torch.tensor([[0, 7], [3, 3]], device=DEVICE)
PATCH = (2, 16, 16)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
QKV = torch.randn(10, 3, 2, 16, device=DEVICE)
ROWS, ONES, ZEROS = torch.randn(4, 8, device=DEVICE), torch.ones(8, device=DEVICE), torch.zeros(8, device=DEVICE)
PREDICTED = torch.zeros(2, 2, 1536, device=DEVICE)
TOKENS, OWN, OTHER = (torch.zeros(shape, device=DEVICE) for shape in ((2, 7, 8), (2, 3, 7), (2, 3, 5)))


def gather(clip=CLIP, ids=IDS, patch=PATCH, **more):
    return lambda backend: X.gather_patches(clip, ids, patch, backend=backend, **more)


def attend(qkv=QKV, segments=((2, 5),)):
    return lambda backend: X.packed_attention(qkv, segments, backend=backend)


def norm(x=ROWS, branch=ROWS, weight=ONES, bias=ZEROS, eps=1e-5, **more):
    return lambda backend: X.residual_layer_norm(x, branch, weight, bias, eps, backend=backend, **more)


def compare(x=ROWS, y=ROWS, gammas=(0.1, 1.0)):
    return lambda backend: X.mmd_loss(x, y, gammas, backend=backend)


def patch_loss(predicted=PREDICTED, clip=CLIP, ids=IDS, patch=PATCH, **more):
    return lambda backend: X.masked_patch_loss(predicted, clip, ids, patch, backend=backend, **more)


def refine(tokens=TOKENS, own=OWN, other=OTHER, mode="mean"):
    return lambda backend: X.refine(tokens, own, other, mode, backend=backend)


Q, SCALE = X.quantise_rows(torch.randn(4, 16, device=DEVICE))
WEIGHT_Q, WEIGHT_SCALE = X.quantise_rows(torch.randn(32, 16, device=DEVICE))


def norm_fp8(x=ROWS, branch=ROWS, weight=ONES, bias=ZEROS, eps=1e-5):
    return lambda backend: X.residual_layer_norm_fp8(x, branch, weight, bias, eps, backend=backend)


def linear_fp8(q=Q, scale=SCALE, weight_q=WEIGHT_Q, weight_scale=WEIGHT_SCALE, bias=None, dtype=torch.float32):
    return lambda _: X.fp8_linear(q, scale, weight_q, weight_scale, bias, dtype)


WRONG = {
    "an FP8 norm of a row to be broadcast": (norm_fp8(branch=ROWS[:1]), r"x, branch, weight, bias .* \[4, 8\], \[1, 8\]"),
    "an FP8 norm of integers": (norm_fp8(x=ROWS.long()), "x is of type int64"),
    "an FP8 norm elsewhere": (norm_fp8(branch=None, weight=ONES.to("meta")), "weight is on meta"),
    "an FP8 norm with a negative eps": (norm_fp8(eps=-1.0), "eps ≥ 0"),
    "an FP8 norm to be differentiated": (norm_fp8(x=ROWS.clone().requires_grad_()), "x requires a gradient"),
    "an FP8 GELU with a bias to be broadcast": (lambda b: X.bias_gelu_fp8(ROWS, ONES[:1], backend=b), r"\[4, 8\] and \[1\]"),
    "an FP8 GELU of integers": (lambda b: X.bias_gelu_fp8(ROWS.int(), ZEROS, backend=b), "h is of type int32"),
    "quantised nothing": (lambda b: X.quantise_rows(ROWS[:, :0], backend=b), "rows of at least 1 number"),
    "quantised bytes": (lambda b: X.quantise_rows(ROWS.byte(), backend=b), "x is of type uint8"),
    "quantised to be differentiated": (
        lambda b: X.quantise_rows(ROWS.clone().requires_grad_(), backend=b),
        "x requires",
    ),
    "an FP8 product of other sizes": (linear_fp8(weight_q=WEIGHT_Q[:, :8]), r"\[4, 16\], \[4, 1\], \[32, 8\], \[32, 1\]"),
    "an FP8 product of one scale": (linear_fp8(scale=SCALE[:1]), r"the shapes \[4, 16\], \[1, 1\]"),
    "an FP8 product of odd inputs": (linear_fp8(q=Q[:, :8], weight_q=WEIGHT_Q[:, :8]), r"\[32, 8\], but multiples of 16"),
    "an FP8 product of odd outputs": (linear_fp8(weight_q=WEIGHT_Q[:9], weight_scale=WEIGHT_SCALE[:9]), "multiples of 16"),
    "an FP8 product of halves": (linear_fp8(q=Q.half()), "q is of type float16; float8_e4m3fn"),
    "an FP8 product with half a bias": (linear_fp8(bias=ONES), r"bias has the shape \[8\], but \[32\]"),
    "an FP8 product elsewhere": (linear_fp8(weight_q=WEIGHT_Q.to("meta")), "weight_q is on meta"),
    "an FP8 product to integers": (linear_fp8(dtype=torch.int8), "dtype = int8"),
    "ids beyond the last patch": (gather(ids=IDS + 1), "."),
    "ids far away": (gather(ids=IDS + 10**9), "."),
    "ids below the first": (gather(ids=IDS - 1), "."),
    "ids of another batch": (gather(ids=IDS.repeat(2, 1)), r"ids has the shape \[4, 2\] .* the clip's B = 2"),
    "ids for one clip": (gather(ids=IDS[:1]), r"ids has the shape \[1, 2\]"),
    "ids without a batch": (gather(ids=IDS[0]), r"ids has the shape \[2\]"),
    "ids that are truths": (gather(ids=IDS > 0), "type bool"),
    "ids that are floats": (gather(ids=IDS.float()), "type float32"),
    "ids elsewhere": (gather(ids=IDS.to("meta")), f"ids is on meta, clip on {DEVICE.type}"),
    "a clip of 64-bit integers": (gather(clip=CLIP.long(), mean=MEAN, std=STD), "clip is of type int64"),
    "a clip of truths": (gather(clip=CLIP > 0), "clip is of type bool"),
    "a complex clip": (gather(clip=CLIP.to(torch.complex64)), "clip is of type complex64"),
    "a clip without frames": (gather(clip=CLIP[:, :, :0]), r"does not divide the clip's \[0, 32, 32\]"),
    "a clip with an axis too many": (gather(clip=CLIP.unsqueeze(0)), r"clip has the shape .* with three extents"),
    "a patch of nothing": (gather(patch=(0, 16, 16)), "does not divide"),
    "a patch of parts": (gather(patch=(2.0, 16, 16)), "must be a list of whole numbers"),
    "a result of integers": (gather(dtype=torch.uint8), "dtype = uint8"),
    "a deviation of nothing": (gather(mean=MEAN, std=(0.0, 1.0, 1.0)), "each above 0"),
    "a deviation of NaN": (gather(mean=MEAN, std=(float("nan"), 1.0, 1.0)), "each above 0"),
    "predicted ids beyond the last patch": (patch_loss(ids=IDS + 1), "."),
    "predicted ids below the first": (patch_loss(ids=IDS - 1), "."),
    "predictions of other patches": (patch_loss(ids=IDS[:, :1]), r"predicted has the shape \[2, 2, 1536\]"),
    "predictions of integers": (patch_loss(PREDICTED.int()), "predicted is of type int32"),
    "predictions elsewhere": (patch_loss(PREDICTED.to("meta")), f"clip is on {DEVICE}.*, predicted on meta"),
    "predicted patches that do not fit": (patch_loss(patch=(3, 16, 16)), "does not divide"),
    "predicted channels without a mean": (patch_loss(mean=(0.5,), std=(0.5,)), "of a clip with 3 channels"),
    "a patch of one number": (patch_loss(PREDICTED[..., :1], CLIP[:, :1], patch=(1, 1, 1)), "has no variance"),
    "looks at other patches": (refine(own=OWN[..., 1:]), r"but \[B, N, D\], \[B, h, N\] and \[B, h, M\]"),
    "looks of other heads": (refine(other=OTHER[:, 1:]), "are wanted"),
    "no tokens": (refine(TOKENS[:, :0], OWN[..., :0]), "are wanted"),
    "tokens of integers": (refine(TOKENS.int()), "tokens is of type int32"),
    "looks elsewhere": (refine(other=OTHER.to("meta")), f"other is on meta, tokens on {DEVICE}"),
    "an unknown mode": (refine(mode="max"), "mode = 'max' is not one of mean, softmax"),
    "no segments": (attend(segments=[]), "segments is empty"),
    "segments that are lengths": (attend(segments=[5, 5]), "must be a list of pairs"),
    "segments of three numbers": (attend(segments=[(2, 5, 1)]), "must be a list of pairs"),
    "segments of parts": (attend(segments=[(2.0, 5)]), "must be a list of pairs"),
    "no segments at all": (attend(segments=None), "must be a list of pairs"),
    "segments in words": (attend(segments="25"), "must be a list of pairs"),
    "integers to attend": (attend(qkv=torch.ones_like(QKV, dtype=torch.int32)), "qkv is of type int32"),
    "heads of no width": (attend(qkv=QKV[..., :0]), "heads, head width"),
    "a branch elsewhere": (norm(branch=ROWS.to("meta")), f"branch is on meta, x on {DEVICE.type}"),
    "integers to normalise": (norm(x=ROWS.long()), "x is of type int64"),
    "a norm of integers": (norm(dtype=torch.int32), "dtype = int32"),
    "a negative eps": (norm(eps=-1.0), "eps ≥ 0"),
    "rows of nothing": (norm(*[ROWS[:, :0]] * 2, ONES[:0], ZEROS[:0]), "rows of at least 1 number"),
    "a bias elsewhere": (lambda backend: X.bias_gelu(ROWS, ZEROS.to("meta"), backend=backend), "bias is on meta"),
    "a GELU of integers": (lambda backend: X.bias_gelu(ROWS.int(), ZEROS, backend=backend), "h is of type int32"),
    "rows of another width": (compare(y=ROWS[:, :7]), r"the shapes \[4, 8\] and \[4, 7\]"),
    "no rows to compare": (compare(y=ROWS[:0]), r"\[0, 8\], but \[n, K\] and \[m, K\], each at least 1"),
    "rows with a batch": (compare(x=ROWS[None], y=ROWS[None]), r"\[1, 4, 8\]"),
    "integers to compare": (compare(x=ROWS.int(), y=ROWS.int()), "x is of type int32"),
    "rows of two types": (compare(y=ROWS.bfloat16()), "of the types float32 and bfloat16"),
    "rows elsewhere": (compare(y=ROWS.to("meta")), f"y is on meta, x on {DEVICE}"),
    "no kernels": (compare(gammas=()), r"gammas = \[\] must be a list of at least one number"),
    "a kernel that grows": (compare(gammas=(1.0, -0.1)), "each above 0"),
    "a kernel of NaN": (compare(gammas=(float("nan"),)), "each above 0"),
}


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_is_refused(name, backend):
    """Catches memory read or written outside of a tensor, numbers computed from nonsense, and backends that disagree."""
    call, message = WRONG[name]
    if message == "." and DEVICE.type == "cuda":
        pytest.skip("no call waits for a GPU's ids: our kernel makes NaN of them, PyTorch's assertion ends all work on it")
    with pytest.raises((ValueError, IndexError), match=message):
        call(backend)


def test_a_kernel_on_a_gpu_makes_ids_of_no_patch_show(monkeypatch):
    """Catches a read outside of the clip where nothing waits to check: there such a patch is NaN, and gives no gradient."""
    monkeypatch.setattr(sys.modules["xkd_kernels.gather_patches"], "check_ids", lambda *of: None)
    clip = torch.randn(2, 3, 4, 32, 32, device=DEVICE, requires_grad=True)
    ids = torch.tensor([[0, 8], [-1, 3]], device=DEVICE)
    patches = X.gather_patches(clip, ids, PATCH, backend="triton")
    assert patches.isnan().all(dim=-1).tolist() == [[False, True], [True, False]]
    patches.nan_to_num().sum().backward()
    there = X.naive_gather_patches(torch.ones_like(clip), torch.tensor([[0], [3]], device=DEVICE), PATCH)
    assert clip.grad.sum() == there.sum() and clip.grad.max() == 1


def test_segments_given_as_a_tensor_are_read_and_left_alone():
    """Catches a caller's tensor changed in place by a helper, and kernels launched by tensors for numbers."""
    segments = torch.tensor([[2, 5]], device="cpu")
    for backend in ("torch", "triton"):
        found = X.packed_attention(QKV, segments, backend=backend)
        torch.testing.assert_close(found, X.naive_packed_attention(QKV, [(2, 5)]), rtol=1e-5, atol=1e-6)
    assert segments.tolist() == [[2, 5]]


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, torch.float32])
def test_half_clips_are_normalised_in_float32(kind, backend):
    """Catches a clip normalised in its own type: three digits lost."""
    clip = torch.rand(2, 3, 4, 32, 32, device=DEVICE).to(kind)
    found = X.gather_patches(clip, IDS, PATCH, MEAN, STD, backend=backend)
    torch.testing.assert_close(found, X.naive_gather_patches(clip, IDS, PATCH, MEAN, STD), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_autocast_changes_no_type(backend):
    """Catches results whose type depends on who computes them."""
    with torch.autocast(DEVICE.type, torch.bfloat16):
        assert X.packed_attention(QKV, [(2, 5)], backend=backend).dtype == torch.float32
        assert X.cls_attention(QKV, [(2, 5)], backend=backend).dtype == torch.float32
        assert X.bias_gelu(ROWS, ZEROS, backend=backend).dtype == torch.float32
        assert compare()(backend).dtype == torch.float32


def test_forward_mode_is_refused_by_kernels():
    """Catches tangents of zero where there is a derivative."""
    calls = {
        "packed_attention": lambda x: X.packed_attention(x, [(2, 5)], backend="triton"),
        "cls_attention": lambda x: X.cls_attention(x, [(2, 5)], backend="triton"),
    }
    for call in calls.values():
        with pytest.raises(NotImplementedError, match="for forward mode take backend='torch'"):
            torch.func.jvp(call, (QKV,), (torch.ones_like(QKV),))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(ROWS, torch.ones_like(ROWS))
        for call in (lambda: norm(x=dual)("triton"), lambda: X.bias_gelu(dual, ZEROS, backend="triton")):
            with pytest.raises(NotImplementedError, match="differentiate backward only"):
                call()
    _, tangent = torch.func.jvp(lambda x: X.cls_attention(x, [(2, 5)], backend="torch"), (QKV,), (torch.randn_like(QKV),))
    assert tangent.abs().max() > 0


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_other_lengths_and_widths_compile_again(backend):
    """Catches a graph break, or an error, at the second shape that a compiled program meets."""
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, backend="eager")
    def attend_and_norm(qkv, segments, x, weight, bias):
        mixed = X.packed_attention(qkv, segments, backend=backend)
        return mixed, X.residual_layer_norm(x, x, weight, bias, backend=backend)[1], X.bias_gelu(x, bias, backend=backend)

    for rows, segments, width in ((10, [(2, 5)], 8), (12, [(2, 6)], 24), (14, [(1, 6), (2, 4)], 40)):
        qkv, x = torch.randn(rows, 3, 2, 16, device=DEVICE), torch.randn(4, width, device=DEVICE)
        mixed, *_ = attend_and_norm(qkv, segments, x, torch.ones_like(x[0]), torch.zeros_like(x[0]))
        torch.testing.assert_close(mixed, X.naive_packed_attention(qkv, segments), rtol=1e-5, atol=1e-6)


def test_unknown_operators_and_backends_are_named():
    """Catches a mistyped operator that is quietly PyTorch's."""
    with pytest.raises(X.BackendError, match="operator 'packed_atention' is not one of packed_attention"):
        X.choose("packed_atention", torch.device("cpu"), torch.float32, "128x64")
    with pytest.raises(X.BackendError, match="backend 'cuda' of bias_gelu is not one of auto, triton, torch"):
        X.bias_gelu(ROWS, ZEROS, backend="cuda")
    if not torch.cuda.is_available():
        with pytest.raises(X.BackendError, match="torch sees no CUDA device here; torch can"):
            X.choose("bias_gelu", torch.device("cuda"), torch.float32, "8", "triton")
