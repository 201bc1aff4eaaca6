"""What the golden files do not cover of the reference, against the text: XKD.md read into plain numpy, in float64."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from scipy.special import erf, log_softmax, softmax
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from tests.tiny import part_of, random_batch, tiny_options
from xkd_fast import reference
from xkd_fast.data.views import MaskNoise, Views
from xkd_fast.engine.launch import free_port
from xkd_fast.model.options import HeadOptions, ModelOptions, ObjectiveOptions

GAMMAS = (0.001, 0.01, 0.1, 1, 10, 100, 1000)


def make_model(options, seed=0):
    """A float64 model in which nothing is left at 0 or 1 and teachers differ from students."""
    torch.manual_seed(seed)
    model = reference.XKD(options).double()
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith(("prototype_scale", "_temperature")):
                continue
            noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            tensor.add_(noise, alpha=0.05 if tensor.ndim > 1 else 0.2)
    return model


# -------------------------------------------------------------------------------------- XKD.md sections 2-7 in plain numpy


def layer_norm(x, weight=1.0, bias=0.0):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * weight + bias


def gelu(x):
    return x * 0.5 * (1 + erf(x / math.sqrt(2)))


def plain_patches(clip, patch):
    """One clip [C, …] → [N, P], by loops: tokens in grid order, numbers with the channel last."""
    counts = [size // extent for size, extent in zip(clip.shape[1:], patch, strict=True)]
    rows = []
    for place in np.ndindex(*counts):
        numbers = []
        for inner in np.ndindex(*patch):
            where = tuple(p * e + i for p, e, i in zip(place, patch, inner, strict=True))
            numbers += [clip[(channel, *where)] for channel in range(clip.shape[0])]
        rows.append(numbers)
    return np.array(rows)


def axis_weights(size, target, cubic):
    """[target, size] weights of src = (dst + 0.5)·N/(n + 0.1) − 0.5, edges clamped, cubic a = −0.75."""
    weights = np.zeros((target, size))
    for dst in range(target):
        src = (dst + 0.5) * size / (target + 0.1) - 0.5
        if cubic:
            first, a = math.floor(src), -0.75
            for tap in range(first - 1, first + 3):
                d = abs(src - tap)
                value = (a + 2) * d**3 - (a + 3) * d**2 + 1 if d <= 1 else a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a
                weights[dst, min(max(tap, 0), size - 1)] += value
        else:
            src = min(max(src, 0.0), size - 1.0)
            low = min(int(src), size - 1)
            weights[dst, low] += 1 - (src - low)
            weights[dst, min(low + 1, size - 1)] += src - low
    return weights


def plain_positions(table, grid, target):
    """A table [N, D] without CLS, resampled."""
    if grid == target:
        return table
    volume = table.reshape(*grid, -1)
    if len(grid) == 3:
        axes = [axis_weights(n, m, cubic=False) for n, m in zip(grid, target, strict=True)]
        return np.einsum("ai,bj,ck,ijkd->abcd", *axes, volume).reshape(-1, table.shape[1])
    return np.einsum("bj,ijd->ibd", axis_weights(grid[1], target[1], cubic=True), volume).reshape(-1, table.shape[1])


class Plain:
    """The model's losses for one batch, clip by clip, from its state alone."""

    def __init__(self, model):
        self.options = model.options
        self.state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
        self.cls = int(model.options.cls_token)

    def linear(self, name, x):
        return x @ self.state[f"{name}.weight"].T + self.state.get(f"{name}.bias", 0.0)

    def norm(self, name, x):
        return layer_norm(x, self.state[f"{name}.weight"], self.state[f"{name}.bias"])

    def blocks(self, name, x, heads):
        """[N, D] → output and the last block's attention [h, N, N]."""
        depth = 1 + max(int(n.removeprefix(f"{name}.").split(".")[0]) for n in self.state if n.startswith(f"{name}."))
        for block in (f"{name}.{number}" for number in range(depth)):
            qkv, width = self.linear(f"{block}.qkv", self.norm(f"{block}.norm1", x)), x.shape[1]
            head, attention, mixed = width // heads, [], []
            for h in range(heads):
                q, k, v = (qkv[:, part * width + h * head : part * width + (h + 1) * head] for part in range(3))
                attention.append(softmax(q @ k.T / math.sqrt(head), axis=1))
                mixed.append(attention[-1] @ v)
            x = x + self.linear(f"{block}.proj", np.concatenate(mixed, axis=1))
            x = x + self.linear(f"{block}.fc2", gelu(self.linear(f"{block}.fc1", self.norm(f"{block}.norm2", x))))
        return x, np.array(attention)

    def encode(self, modality, role, clip, visible=None):
        name, part = f"{modality}_{role}.encoder", getattr(self.options, modality)
        target = tuple(size // extent for size, extent in zip(clip.shape[1:], part.patch, strict=True))
        table = self.state[f"{name}.position"][0]
        x = self.linear(f"{name}.patch_embedding", plain_patches(clip, part.patch))
        x = x + plain_positions(table[self.cls :], part.grid, target)
        x = x if visible is None else x[visible]
        if self.cls:
            x = np.concatenate([self.state[f"{name}.cls_token"][0] + table[:1], x])
        x, attention = self.blocks(f"{name}.blocks", x, self.options.encoder.heads)
        return self.norm(f"{name}.norm", x), attention

    def head(self, modality, role, pooled):
        name = f"{modality}_{role}.head"
        x = gelu(self.norm(f"{name}.norm", self.linear(f"{name}.linear1", pooled)))
        x = self.linear(f"{name}.linear3", gelu(self.norm(f"{name}.norm", self.linear(f"{name}.linear2", x))))
        directions = self.state[f"{name}.prototypes"]
        directions = directions / np.linalg.norm(directions, axis=1, keepdims=True) * self.state[f"{name}.prototype_scale"]
        return layer_norm(directions @ (x / np.linalg.norm(x)))

    def autoencode(self, modality, clip, noise):
        """Squared errors of the masked patches' numbers, and the student's pooled visible tokens."""
        part, name = getattr(self.options, modality), f"{modality}_decoder"
        order = sorted(range(len(noise)), key=lambda token: noise[token])
        keep = round(part.tokens * (1 - part.mask_ratio))
        encoded, _ = self.encode(modality, "student", clip, order[:keep])
        projected = self.linear(f"{name}.project_in", encoded)
        in_grid = np.repeat(self.state[f"{name}.mask_token"][0], part.tokens, axis=0)
        in_grid[order[:keep]] = projected[self.cls :]
        x = np.concatenate([projected[: self.cls], in_grid]) + self.state[f"{name}.position"][0]
        x, _ = self.blocks(f"{name}.blocks", x, self.options.decoder.heads)
        predicted, patches = self.linear(f"{name}.project_out", x)[self.cls :], plain_patches(clip, part.patch)
        errors = []
        for token in order[keep:]:
            values = patches[token]
            variance = ((values - values.mean()) ** 2).sum() / (len(values) - 1)
            errors.append((predicted[token] - (values - values.mean()) / math.sqrt(variance + 1e-6)) ** 2)
        return np.array(errors), encoded[self.cls :].mean(0)

    def teach(self, clips):
        """Refinement weights and logits of one clip's two teachers."""
        tokens, attention, weights, logits = {}, {}, {}, {}
        for m in clips:
            encoded, full = self.encode(m, "teacher", clips[m])
            tokens[m] = encoded[self.cls :]
            attention[m] = full[:, 0, 1:] if self.cls else full.mean(1)
        for own, other in (("video", "audio"), ("audio", "video")):
            per_head = []
            for p, q in zip(attention[own], attention[other], strict=True):
                averaged = np.outer(p, q).mean(1)
                per_head.append(softmax(averaged) if self.options.refinement == "softmax" else averaged / p.mean())
            weights[own] = np.mean(per_head, axis=0)
            weighted = weights[own][:, None] * tokens[own]
            s = math.sqrt((tokens[own].mean(0) ** 2).sum() / (weighted.mean(0) ** 2).sum())
            logits[own] = self.head(own, "teacher", (s * weighted).mean(0))
        return weights, logits

    def losses(self, views, masks):
        """All ten losses, and the teachers' refinement weights and both roles' logits."""
        arrays = {m: getattr(views, f"{m}_global").numpy() for m in ("video", "audio")}
        views_of = {m: [view.numpy() for view in getattr(views, f"{m}_locals")] for m in arrays}
        noise = {"video": masks.video.numpy(), "audio": masks.audio.numpy()}
        clips = range(len(arrays["video"]))
        recon, student, teacher, weights = {}, {}, {}, {}
        for m in arrays:
            auto = [self.autoencode(m, arrays[m][b], noise[m][b]) for b in clips]
            recon[m] = np.mean([errors for errors, _ in auto])
            rows = [[self.head(m, "student", pooled) for _, pooled in auto]]
            for view in views_of[m]:
                pooled = [self.encode(m, "student", view[b])[0][self.cls :].mean(0) for b in clips]
                rows.append([self.head(m, "student", one) for one in pooled])
            student[m] = np.array(rows)  # [views, B, K]
        seen = {m: views_of[m][0] if self.options.teacher_view == "local" else arrays[m] for m in arrays}
        taught = [self.teach({m: seen[m][b] for m in seen}) for b in clips]
        for m in arrays:
            weights[m] = np.array([w[m] for w, _ in taught])
            teacher[m] = np.array([logits[m] for _, logits in taught])

        def distil(source, target, temperature):
            terms = []
            for t, one in enumerate(teacher[source]):
                p = softmax((one - self.state[f"{source}_centre"][0]) / temperature)
                terms += [-(p * log_softmax(view[t] / 0.1)).sum() for view in student[target]]
            return np.mean(terms)

        v2a, a2v = distil("video", "audio", 0.1), distil("audio", "video", 0.07)
        flat = {m: student[m].reshape(-1, student[m].shape[-1]) for m in student}
        students, teachers = plain_mmd(flat["video"], flat["audio"]), plain_mmd(teacher["video"], teacher["audio"])
        terms = [(recon["video"] + recon["audio"]) / 2, (v2a + a2v) / 2, (students + teachers) / 2]
        return SimpleNamespace(
            total=(5 * terms[0] + terms[1] + terms[2]) / 7,
            reconstruction=terms[0],
            distillation=terms[1],
            alignment=terms[2],
            video_reconstruction=recon["video"],
            audio_reconstruction=recon["audio"],
            video_to_audio_distillation=v2a,
            audio_to_video_distillation=a2v,
            student_alignment=students,
            teacher_alignment=teachers,
            weights=weights,
            student=flat,
            teacher=teacher,
        )


def plain_mmd(x, y):
    def mean_kernel(a, b):
        return np.mean([[sum(math.exp(-g * ((p - q) ** 2).sum()) for g in GAMMAS) for q in b] for p in a])

    return mean_kernel(x, x) + mean_kernel(y, y) - 2 * mean_kernel(x, y)


@pytest.mark.parametrize("variant", ["xkd", "mats"])
@pytest.mark.parametrize("cls_token", [True, False], ids=["cls", "no_cls"])
@pytest.mark.parametrize("refinement", ["mean", "softmax"])
def test_every_loss_equals_the_text_in_plain_numpy(variant, cls_token, refinement):
    """Softmax refinement or a model without CLS that differs from the text (no golden file covers either)."""
    options = tiny_options(variant=variant, cls_token=cls_token, refinement=refinement)
    model, batch = make_model(options), random_batch(options, clips=2)
    with torch.no_grad():
        losses = model(*batch)
    plain = Plain(model).losses(*batch)
    for name, value in losses.terms().items():
        assert value.item() == pytest.approx(getattr(plain, name), rel=1e-10), name
    for m in ("video", "audio"):
        np.testing.assert_allclose(losses.outputs.refinement_weights[m], plain.weights[m], rtol=1e-10)
        np.testing.assert_allclose(losses.outputs.teacher_logits[m], plain.teacher[m], rtol=1e-8, atol=1e-10)
        np.testing.assert_allclose(losses.outputs.student_logits[m], plain.student[m], rtol=1e-8, atol=1e-10)


def test_local_teacher_view_without_cls_equals_the_text():
    """The first local view must go through the interpolated table of a model without a CLS row."""
    options = tiny_options(teacher_view="local", cls_token=False)
    model, batch = make_model(options), random_batch(options, clips=2)
    with torch.no_grad():
        losses = model(*batch)
    plain = Plain(model).losses(*batch)
    assert losses.total.item() == pytest.approx(plain.total, rel=1e-10)
    assert losses.outputs.refinement_weights["video"].shape == (2, 8)


@pytest.mark.parametrize("cls_token", [True, False], ids=["cls", "no_cls"])
def test_gradients_reach_every_trainable_parameter_and_no_teacher(cls_token):
    """A detached branch, or a parameter made but never used (a CLS row in a model without CLS)."""
    options = tiny_options(cls_token=cls_token)
    model = make_model(options)
    names = dict(model.named_parameters())
    rows = int(cls_token)
    assert any("cls_token" in name for name in names) is cls_token
    assert names["video_student.encoder.position"].shape == (1, 36 + rows, 24)
    assert names["audio_decoder.position"].shape == (1, 16 + rows, 16)
    model(*random_batch(options, clips=2)).total.backward()
    for name, parameter in names.items():
        if "_teacher." in name or name.endswith("prototype_scale"):
            assert not parameter.requires_grad and parameter.grad is None, name
        else:
            assert parameter.grad.isfinite().all() and parameter.grad.abs().sum() > 0, name


# --------------------------------------------------------------------------------------------------------------- patches


def test_patches_run_time_height_width_channel_and_mel_time():
    """Transposed patch numbers or tokens, which no loss would notice but released weights would."""
    video, audio = torch.arange(2 * 3 * 4 * 6 * 4).reshape(2, 3, 4, 6, 4), torch.arange(2 * 8 * 6).reshape(2, 1, 8, 6)
    for clip, patch in ((video, (2, 3, 2)), (audio, (4, 2))):
        ours = reference.patchify(clip, patch).numpy()
        np.testing.assert_array_equal(ours, [plain_patches(one, patch) for one in clip.numpy()])
    # the second token of an audio clip is the next in time: mel 0, frames 2 and 3, then mel 1
    assert reference.patchify(audio, (4, 2))[0, 1, :4].tolist() == [2, 3, 8, 9]


@pytest.mark.parametrize(
    "grid, target",
    [((8, 7, 7), (2, 6, 6)), ((20, 28), (20, 7)), ((4, 3, 3), (2, 2, 2)), ((4, 4), (4, 2))],
    ids=str,
)
def test_positions_are_sampled_on_the_released_grid(grid, target):
    """Exact ratios instead of n + 0.1, aligned corners, a cubic with a = −0.5, or edges not clamped."""
    table = torch.randn(1, math.prod(grid), 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    ours = reference.interpolate_position(table, grid, target)
    np.testing.assert_allclose(ours[0], plain_positions(table[0].numpy(), grid, target), rtol=0, atol=1e-12)
    exact = [axis_weights(n, m, len(grid) == 2) for n, m in zip(grid, target, strict=True)]
    assert all(np.allclose(rows.sum(1), 1) for rows in exact)


def test_positions_of_the_global_grid_are_the_table_itself():
    """A table blurred by resampling to its own size."""
    table = torch.randn(1, 36, 5)
    assert reference.interpolate_position(table, (4, 3, 3), [4, 3, 3]) is table


# --------------------------------------------------------------------------------------------------------------- masking


def test_base_model_keeps_59_video_and_112_audio_tokens():
    """A keep count truncated instead of rounded."""
    options = ModelOptions()
    assert (options.video.tokens, options.video.keep, options.audio.tokens, options.audio.keep) == (392, 59, 560, 112)


def test_smallest_noise_is_visible_in_ascending_order_and_the_rest_is_masked(monkeypatch):
    """Visible tokens in grid order or from the wrong end: exact replay would be lost."""
    options = tiny_options()
    model, (views, masks) = make_model(options), random_batch(options, clips=3)
    seen = {}
    encoder = model.student("audio").encoder
    forward = encoder.forward

    def record(clip, visible=None):
        seen.setdefault("visible", visible)
        return forward(clip, visible)

    monkeypatch.setattr(encoder, "forward", record)
    model(views, masks)
    expected = np.argsort(masks.audio.numpy(), axis=1)[:, : round(16 * 0.4)]
    np.testing.assert_array_equal(seen["visible"], expected)


def test_without_masks_the_noise_is_drawn_anew_from_torch_generator():
    """The same tokens masked at every step, or draws that a seed does not fix."""
    options = tiny_options()
    model, (views, _) = make_model(options), random_batch(options, clips=2)
    losses = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        losses.append(model(views).reconstruction.item())
    assert losses[0] == losses[1] != losses[2]


# ------------------------------------------------------------------------------------------------------------ objectives


def test_mmd_kernel_of_a_row_with_itself_is_exactly_7():
    """A diagonal lost to rounding: x·x computed two ways, times γ = 1000."""
    x = torch.randn(1, 8192, generator=torch.Generator().manual_seed(0))
    far = torch.full((1, 8192), 100.0)
    assert reference.mmd_loss(x, far, GAMMAS).item() == 14.0
    assert reference.mmd_loss(x, x.clone(), GAMMAS).item() == 0.0


def near_duplicates(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Float32 rows of 8192 normalised numbers at squared distances from 0 over 1e-6 … 1e-1 to full size."""
    generator = torch.Generator().manual_seed(1)
    x = torch.nn.functional.layer_norm(torch.randn(rows, 8192, generator=generator), (8192,))
    y = x.clone()
    for row, size in zip(range(1, rows), np.logspace(-6, 4, rows - 1), strict=True):
        y[row] += torch.randn(8192, generator=generator) * math.sqrt(size / 8192)
    x[-1] = x[-2]  # an exact duplicate within X
    return x, y


def test_mmd_in_float32_keeps_near_duplicates_at_8192_numbers():
    """Distances from the expanded square: at 8192 numbers float32 then misses the small ones altogether."""
    x, y = near_duplicates(12)
    results = {}
    for dtype in (torch.float32, torch.float64):
        a, b = (rows.to(dtype, copy=True).requires_grad_() for rows in (x, y))
        loss = reference.mmd_loss(a, b, GAMMAS)
        loss.backward()
        results[dtype] = loss.item(), a.grad.double(), b.grad.double()
    single, double = results[torch.float32], results[torch.float64]
    assert double[0] == pytest.approx(plain_mmd(x.double().numpy(), y.double().numpy()), rel=1e-12)
    assert single[0] == pytest.approx(double[0], rel=2e-6)
    for ours, exact in zip(single[1:], double[1:], strict=True):
        assert (ours - exact).abs().max() <= 1e-5 * exact.abs().max()


def test_half_precision_rows_are_compared_in_float32():
    """Sums in bfloat16, where the distances are lost."""
    x, y = (rows.bfloat16() for rows in near_duplicates(6))
    loss = reference.mmd_loss(x, y, GAMMAS)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(reference.mmd_loss(x.double(), y.double(), GAMMAS).item(), rel=1e-5)


@pytest.mark.parametrize("mode", ["mean", "softmax"])
def test_refinement_weights_form_the_outer_product(mode):
    """Averages over the wrong modality's patches, or heads averaged before the product."""
    generator = torch.Generator().manual_seed(2)
    own, other = (torch.rand(2, 3, n, generator=generator, dtype=torch.float64) / n for n in (5, 4))
    expected = np.zeros((2, 5))
    for clip in range(2):
        for head in range(3):
            p, q = own[clip, head].numpy(), other[clip, head].numpy()
            averaged = np.array([sum(p[i] * q[j] for j in range(4)) / 4 for i in range(5)])
            row = np.exp(averaged) / np.exp(averaged).sum() if mode == "softmax" else averaged / p.mean()
            expected[clip] += row / 3
    np.testing.assert_allclose(reference.refinement_weights(own, other, mode), expected, rtol=1e-12)


def test_losses_use_the_centres_of_before_and_do_not_move_them():
    """A centre updated inside the forward pass, so that the loss depends on how often it is called."""
    options = tiny_options()
    model, batch = make_model(options), random_batch(options, clips=2)
    before = {m: model.get_buffer(f"{m}_centre").clone() for m in ("video", "audio")}
    first, second = model(*batch), model(*batch)
    assert first.total.item() == second.total.item()
    reference.update_centres(model, first.outputs.teacher_means)
    for m in ("video", "audio"):
        mean = first.outputs.teacher_logits[m].numpy().mean(0)
        np.testing.assert_allclose(model.get_buffer(f"{m}_centre"), 0.9 * before[m].numpy() + 0.1 * mean, rtol=1e-12)
    third = model(*batch)
    assert third.distillation.item() != first.distillation.item()
    assert third.reconstruction.item() == first.reconstruction.item()


def test_weights_of_the_objectives_are_divided_by_their_sum():
    """A total that grows with the weights instead of being their mean."""
    options = tiny_options(objective=ObjectiveOptions(reconstruction_weight=2.0, distillation_weight=0.0, alignment_weight=6.0))
    losses = make_model(options)(*random_batch(options, clips=2))
    assert losses.total.item() == pytest.approx((2 * losses.reconstruction + 6 * losses.alignment).item() / 8, rel=1e-12)


# ---------------------------------------------------------------------------------------------------- around the optimiser


@pytest.mark.parametrize("variant", ["xkd", "mas", "mats"])
def test_shared_teacher_stack_moves_once_with_both_momenta(variant):
    """A shared stack moved twice by the students' new values, or by one momentum; or a product where nothing is shared."""
    model = make_model(tiny_options(variant=variant))
    with torch.no_grad():
        for parameter in (*model.video_student.parameters(), *model.audio_student.parameters()):
            parameter.add_(0.1)
    before = {name: parameter.clone() for name, parameter in model.state_dict().items()}
    reference.update_teachers(model, 0.9, 0.8)
    after = model.state_dict()
    for name in (name for name in before if "_teacher.encoder" in name or "_teacher.head" in name):
        own = 0.9 if name.startswith("video") else 0.8
        momentum = 0.9 * 0.8 if variant == "mats" and ".blocks." in name else own
        student = before[name.replace("_teacher", "_student")]
        torch.testing.assert_close(after[name], momentum * before[name] + (1 - momentum) * student, rtol=1e-12, atol=1e-14)


def test_clipping_is_per_tensor_and_leaves_the_decoders_alone():
    """Clipping by the global norm, clipping of decoders, or small gradients scaled up."""
    model = make_model(tiny_options(variant="mas"))
    generator = torch.Generator().manual_seed(4)
    before = {}
    for number, (name, parameter) in enumerate(model.named_parameters()):
        if parameter.requires_grad:
            gradient = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.grad = gradient * (0.01, 1.0, 100.0)[number % 3] / gradient.norm()
            before[name] = parameter.grad.clone()
    reference.clip_gradients(model, 0.3)
    for name, parameter in model.named_parameters():
        if name in before:
            norm = before[name].norm().item()
            scale = 1.0 if "_decoder." in name else min(1.0, 0.3 / (norm + 1e-6))
            torch.testing.assert_close(parameter.grad, before[name] * scale, rtol=1e-12, atol=0, msg=name)
    assert {"_student." in name for name in before} == {True, False}


def test_decay_acts_on_matrices_and_tables_but_not_on_vectors():
    """Decay on biases, or none on CLS, mask token and position tables."""
    model = make_model(tiny_options())
    groups = reference.parameter_groups(model, 0.3)
    decay = {id(parameter): group["weight_decay"] for group in groups for parameter in group["params"]}
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(decay) == len(trainable) == sum(len(group["params"]) for group in groups)
    for name, parameter in trainable.items():
        is_vector = name.endswith("bias") or ".norm" in name
        assert decay[id(parameter)] == (0.0 if is_vector else 0.3), name


# --------------------------------------------------------------------------------------------- initialisation and sizes


def test_initial_weights_follow_the_text():
    """An initialisation left at PyTorch's default, or of the wrong kind for one sort of tensor."""
    torch.manual_seed(0)
    model = reference.XKD(tiny_options(head=HeadOptions(64, 48, 256)))
    normal = {name: p for name, p in model.named_parameters() if name.endswith(("cls_token", "mask_token", "position"))}
    normal |= {n: p for n, p in model.named_parameters() if ".head." in n and p.ndim == 2 and not n.endswith("prototype_scale")}
    for name, parameter in model.named_parameters():
        if "_teacher." in name:
            torch.testing.assert_close(parameter, model.get_parameter(name.replace("_teacher", "_student")), rtol=0, atol=0)
            assert not parameter.requires_grad
        elif name in normal:
            count = parameter.numel()
            assert abs(parameter.std().item() - 0.02) < 4 * 0.02 / math.sqrt(2 * count), name
            assert abs(parameter.mean().item()) < 4 * 0.02 / math.sqrt(count), name
            assert parameter.abs().max() > 0.02 * (1.0 if count < 100 else 1.8), name  # not a uniform
        elif parameter.ndim == 2 and not name.endswith("prototype_scale"):
            bound = math.sqrt(6 / sum(parameter.shape))
            assert 0.97 * bound < parameter.abs().max() <= bound, name
            assert parameter.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1), name
        elif name.endswith("bias"):
            assert (parameter == 0).all(), name
        else:  # norms' weights and the prototypes' magnitudes
            assert (parameter == 1).all(), name
    first, other = model.video_student.encoder.blocks[0].fc1.weight, model.audio_student.encoder.blocks[0].fc1.weight
    assert not torch.equal(first, other)
    assert not model.video_student.head.prototype_scale.requires_grad
    assert (model.video_centre == 0).all()


@pytest.mark.parametrize("variant, stacks, trainable_stacks", [("xkd", 4, 2), ("mas", 3, 1), ("mats", 2, 1)])
def test_base_model_has_the_released_number_of_parameters(variant, stacks, trainable_stacks):
    """A module missing, doubled or of the wrong width; a stack that is not shared."""
    with torch.device("meta"):
        model = reference.XKD(ModelOptions(variant=variant))
    stack = 12 * (3 * 768**2 + 768**2 + 768 + 2 * 768 * 3072 + 3072 + 768 + 4 * 768)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert round((sum(sizes.values()) + (4 - stacks) * stack) / 1e6, 3) == 396.374
    assert round((trainable + (2 - trainable_stacks) * stack) / 1e6, 3) == 206.347


@pytest.mark.parametrize("teacher_view, expected", [("global", 440.16), pytest.param("local", 296.53, marks=pytest.mark.slow)])
def test_base_model_does_the_released_work_per_clip(teacher_view, expected, monkeypatch):
    """Work left out or done twice: 440.16 and 296.53 GFLOP, forward and backward, of one clip."""
    monkeypatch.setattr(reference.XKD, "initialise", lambda model: None)  # fake tensors hold no numbers to draw
    with FakeTensorMode(), FlopCounterMode(display=False) as counter:
        options = ModelOptions(teacher_view=teacher_view)
        video, audio = options.video, options.audio
        views = Views(
            torch.empty(1, 3, 32, 112, 112),
            torch.empty(1, 1, 80, 448),
            [torch.empty(1, 3, 8, 96, 96)],
            [torch.empty(1, 1, 80, 112)],
        )
        noise = MaskNoise(torch.empty(1, video.tokens), torch.empty(1, audio.tokens))
        reference.XKD(options)(views, noise).total.backward()
    # The text counts the refinement's two outer products per head as matrix products; here they are elementwise products.
    tokens = [math.prod(part.grid if teacher_view == "global" else part.local_grid) for part in (video, audio)]
    outer_products = 2 * 12 * 2 * math.prod(tokens)
    assert (counter.get_total_flops() + outer_products) / 1e9 == pytest.approx(expected, abs=0.005)


# ---------------------------------------------------------------------------------------------------------- two processes


def global_mmd_rank(rank, port, results):
    """One of two ranks: half of the batch; averages the loss and every gradient over the ranks."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    for scope in ("global", "rank"):
        options = tiny_options(objective=ObjectiveOptions(mmd_scope=scope))
        model = make_model(options)
        losses = model(*part_of(*random_batch(options, clips=4), slice(2 * rank, 2 * rank + 2)))
        losses.total.backward()
        averaged = [losses.total.detach(), losses.student_alignment.detach()]
        averaged += [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        for tensor in averaged:
            dist.all_reduce(tensor)
            tensor /= 2
        if rank == 0:
            torch.save(averaged, f"{results}/{scope}.pt")
    dist.destroy_process_group()


def test_global_mmd_on_two_ranks_equals_one_process(tmp_path):
    """Rows gathered without gradient, a gradient off by the number of ranks, or a rank's own rows counted twice."""
    mp.spawn(global_mmd_rank, args=(free_port(), str(tmp_path)), nprocs=2)
    options = tiny_options()
    model = make_model(options)
    losses = model(*random_batch(options, clips=4))
    losses.total.backward()
    single = [losses.total, losses.student_alignment]
    single += [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    of_two = torch.load(tmp_path / "global.pt")
    for ours, theirs in zip(of_two, single, strict=True):
        assert (ours - theirs).abs().max() <= 1e-10 * theirs.abs().max()
    per_rank = torch.load(tmp_path / "rank.pt")
    assert abs(per_rank[1] - single[1]) > 1e-3  # rank scope is another number: the test can tell them apart
