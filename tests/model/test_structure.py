"""What the fast model promises beyond its numbers: what it never forms, how often it runs what, and how little that costs."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks import contestants
from benchmarks.measure import launches, saved_bytes
from tests.tiny import random_batch, tiny_options
from xkd_fast.analysis.flops import flop_counter, step_flops, total
from xkd_fast.analysis.kept import Kept
from xkd_fast.engine.ema import Teachers
from xkd_fast.model import autoencoder, products, tokens, vit, xkd
from xkd_fast.model.attention import patch_probabilities
from xkd_fast.model.build import build_model
from xkd_fast.model.components import listening
from xkd_fast.model.options import AudioOptions, DecoderOptions, EncoderOptions, ModelOptions, VideoOptions
from xkd_fast.reference import MODALITIES

CPU = torch.device("cpu")
CLIPS = 3
VARIANTS = ("xkd", "mas", "mats")
DTYPES = (torch.float32, torch.bfloat16)
MANY_VIEWS = {
    "video": VideoOptions(8, 24, 3, 4, 16, 2, 8, mask_ratio=0.7),
    "audio": AudioOptions(16, 64, 2, 32, 4, 16, mask_ratio=0.6),
    "encoder": EncoderOptions(24, 3, 3),
    "decoder": DecoderOptions(16, 2, 2),
}


class Watch(TorchDispatchMode):
    """Addresses that operators take, with how often, and shapes that they give; views left out."""

    def __init__(self) -> None:
        super().__init__()
        self.taken, self.given = Counter[int](), list[torch.Size]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            taken, given = ([x for x in tree_leaves(part) if isinstance(x, Tensor)] for part in ((args, kwargs), result))
            self.taken.update({x.data_ptr() for x in taken})
            self.given += [x.shape for x in given]
        return result


def watched(work: Callable[[], object]) -> Watch:
    """What operators did in ``work``."""
    with Watch() as watch:
        work()
    return watch


def spy(patch: pytest.MonkeyPatch, owner: object, name: str, before: Callable, after: Callable = lambda: None) -> None:
    """Let ``before`` see the arguments of every call of ``owner.name``; ``after`` is told when it is done."""
    original = getattr(owner, name)

    def seen(*args: Any, **named: Any) -> Any:
        before(*args)
        result = original(*args, **named)
        after()
        return result

    patch.setattr(owner, name, seen)


@pytest.mark.parametrize(("dtype", "error"), [(torch.float64, 1e-13), (torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_mean_attention_in_tiles_is_the_whole_matrix_mean(dtype: torch.dtype, error: float) -> None:
    """Catches a tile that overwrites, is left out or counted as a full one, and the N × N matrix coming into being."""
    n, generator = 150, torch.Generator().manual_seed(0)
    q, k = (2 * torch.randn(2, 3, n, 8, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
    expected = (q.double() @ k.double().mT / 8**0.5).softmax(dim=-1).mean(dim=2)
    got = patch_probabilities(q, k, has_cls=False)
    assert got.dtype == torch.promote_types(dtype, torch.float32)
    assert (got - expected).abs().max() < error * expected.max()
    shapes = watched(lambda: patch_probabilities(q, k, has_cls=False)).given
    assert shapes and all(shape[-2:] != (n, n) and shape.numel() < n * n * 2 * 3 for shape in shapes)


@pytest.mark.parametrize("cls_token", (True, False))
def test_teachers_form_no_attention_matrix(cls_token: bool) -> None:
    """Catches a teacher whose blocks, the last one included, attend by way of the N × N matrix."""
    video = VideoOptions(8, 48, 1, 4, 16, 2, 8, mask_ratio=0.7)  # 144 tokens
    audio = AudioOptions(32, 256, 1, 32, 4, 16, mask_ratio=0.6)  # 128 tokens
    options = tiny_options(video=video, audio=audio, cls_token=cls_token)
    model, (views, _) = build_model(options, seed=0), random_batch(options, CLIPS, dtype=torch.float32)
    shapes = watched(lambda: model.teach({"video": views.video_global, "audio": views.audio_global})).given
    assert shapes and not {2 * (clip.tokens + cls_token,) for clip in (video, audio)} & {shape[-2:] for shape in shapes}


@pytest.mark.parametrize("is_local", (True, False))
@pytest.mark.parametrize("bytes_in", (False, True))
def test_the_students_never_see_all_patches(is_local: bool, bytes_in: bool) -> None:
    """Catches a global view patchified, normalised, embedded, predicted or taken as target whole: only teachers do so."""
    options = tiny_options(
        video=VideoOptions(8, 24, 1, 4, 16, 2, 8, mask_ratio=0.7),  # 36 patches of 384 numbers, 11 visible, 8 in a local view
        audio=AudioOptions(48, 288, 1, 96, 8, 48, mask_ratio=0.6),  # 36 of 384, 14 visible, 12 in a local view
        encoder=EncoderOptions(8, 2, 1),
        decoder=DecoderOptions(8, 2, 1),
        teacher_view="local" if is_local else "global",
    )
    model, (views, masks) = build_model(options, seed=0), random_batch(options, CLIPS, dtype=torch.float32)
    if bytes_in:
        pixels = [torch.randint(256, x.shape, dtype=torch.uint8) for x in (views.video_global, *views.video_locals)]
        views = replace(views, video_global=pixels[0], video_locals=pixels[1:])
    video, audio = (views.video_locals[0], views.audio_locals[0]) if is_local else (views.video_global, views.audio_global)
    works = (lambda: model.teach({"video": video, "audio": audio}), lambda: model(views, masks).total.backward())
    teachers, step = (sum(shape.numel() >= CLIPS * 36 * 384 for shape in watched(work).given) for work in works)
    assert step == teachers and (teachers == 0) == is_local


@pytest.mark.parametrize("variant", VARIANTS)
def test_all_tokens_that_share_weights_pass_them_together(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches one pass per view or per modality in place of one packed pass, and a head that runs view by view."""
    calls: Counter[tuple[object, ...]] = Counter()
    for name in ("run_block", "run_last_block"):
        spy(monkeypatch, vit, name, lambda block, x, groups, *rest, name=name: calls.update([(id(block), name, len(x))]))
    options = tiny_options(variant=variant, **MANY_VIEWS)
    model, clips = build_model(options, seed=0), {"video": options.video, "audio": options.audio}
    spy(monkeypatch, xkd, "project", lambda head, pooled, kernels: calls.update([(id(head), "head", len(pooled))]))
    model(*random_batch(options, CLIPS, dtype=torch.float32))

    expected: Counter[tuple[object, ...]] = Counter()
    visible = {m: 1 + clip.keep + clip.local_views * (1 + math.prod(clip.local_grid)) for m, clip in clips.items()}
    whole = {m: 1 + clip.tokens for m, clip in clips.items()}
    for role, lengths, shared in (("student", visible, ("mas", "mats")), ("teacher", whole, ("mats",))):
        passes = {"video": sum(lengths.values())} if variant in shared else lengths
        for m, length in passes.items():
            for block in (blocks := getattr(model, role)(m).encoder.blocks):
                last = role == "teacher" and block is blocks[-1]
                expected[id(block), "run_last_block" if last else "run_block", CLIPS * length] += 1
    for m, clip in clips.items():
        expected[id(model.decoder(m).blocks[0]), "run_block", CLIPS * whole[m]] += 1
        expected[id(model.student(m).head), "head", CLIPS * (1 + clip.local_views)] += 1
        expected[id(model.teacher(m).head), "head", CLIPS] += 1
    assert calls == expected


def test_views_of_one_shape_share_a_position_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a table that is resampled once per view."""
    calls: list[tuple[int, tuple[int, ...]]] = []
    spy(monkeypatch, tokens, "resampled_position", lambda table, grid, target: calls.append((table.data_ptr(), target)))
    options = tiny_options(**MANY_VIEWS)
    model = build_model(options, seed=0)
    model(*random_batch(options, CLIPS, dtype=torch.float32))
    expected = [
        (getattr(model, role)(m).encoder.position[:, 1:].data_ptr(), getattr(getattr(options, m), grid))
        for role, grid in (("student", "local_grid"), ("teacher", "grid"))
        for m in MODALITIES
    ]
    assert sorted(calls) == sorted(expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_teachers_have_no_graph(dtype: torch.dtype) -> None:
    """Catches teachers that keep anything for a backward pass, or get gradients, where their weights happen to want them."""
    model, batch = build_model(tiny_options(), seed=0), random_batch(tiny_options(), CLIPS, dtype=torch.float32)
    model.requires_grad_(True)
    kept = Kept()
    with listening(kept), contestants.autocast(CPU, dtype):
        kept.count(lambda: model(*batch).total)
        total_loss = model(*batch).total
    assert kept.bytes["students"] > 0 and kept.bytes["teachers"] == 0
    total_loss.backward()
    assert all(p.grad is None for m in MODALITIES for p in model.teacher(m).parameters())


@pytest.mark.parametrize("variant", VARIANTS)
def test_teachers_are_cast_once_per_update(variant: str) -> None:
    """Catches teacher weights that are cast at every use or at every step, or not anew when they have changed in place."""
    options = tiny_options(variant=variant)
    model, batch = build_model(options, seed=0), random_batch(options, CLIPS, dtype=torch.float32)
    layers = [x for m in MODALITIES for x in model.teacher(m).modules() if isinstance(x, nn.Linear)]
    weights = {p.data_ptr() for layer in layers for p in layer.parameters()}

    def read() -> dict[int, int]:
        with contestants.autocast(CPU, torch.bfloat16):
            taken = watched(lambda: model(*batch)).taken
        return {address: taken[address] for address in weights & taken.keys()}

    assert read().keys() == weights
    assert not read()
    video, audio = ((model.student(m), model.teacher(m)) for m in MODALITIES)
    for _ in range(2):
        Teachers(video, audio)(0.9, 0.9)
        assert read() == dict.fromkeys(weights, 1)
        assert not read()


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_stream_and_what_is_made_of_it_stay_in_float32(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a residual stream, pooled tokens, logits, refinement or losses in autocast's type, and products that are not."""
    seen: Counter[tuple[str, torch.dtype]] = Counter()
    for name in ("run_block", "run_last_block"):
        spy(monkeypatch, vit, name, lambda block, x, *rest, name=name: seen.update([(name, x.dtype)]))
    spy(monkeypatch, autoencoder, "predict_masked", lambda decoder, x, *rest: seen.update([("predict_masked", x.dtype)]))
    spy(monkeypatch, xkd, "project", lambda head, pooled, kernels: seen.update([("project", pooled.dtype)]))
    spy(monkeypatch, xkd, "reconstruction_loss", lambda predicted, *rest: seen.update([("predicted", predicted.dtype)]))
    options = tiny_options(variant=variant, cls_token=variant != "mas", **MANY_VIEWS)  # a CLS token would widen the rest
    model = build_model(options, seed=0)
    with contestants.autocast(CPU, torch.bfloat16):
        losses = model(*random_batch(options, CLIPS, dtype=torch.float32))
    assert seen.keys() == {
        *((name, torch.float32) for name in ("run_block", "run_last_block", "predict_masked", "project")),
        ("predicted", torch.bfloat16),
    }
    made = [*losses.terms().values(), *(x for f in fields(losses.outputs) for x in getattr(losses.outputs, f.name).values())]
    assert {x.dtype for x in made} == {torch.float32}


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_an_update_leaves_no_stale_casts(dtype: torch.dtype) -> None:
    """Catches casts that are told to be fresh by an update that has not written them, as in float16, or has written others."""
    options = tiny_options()
    (model, fresh), batch = (build_model(options, seed=0) for _ in range(2)), random_batch(options, CLIPS, dtype=torch.float32)
    pairs = [(model.student(m), model.teacher(m)) for m in MODALITIES]
    for _ in range(2):
        with contestants.autocast(CPU, dtype):
            model(*batch)
        with torch.no_grad():
            for student, _ in pairs:
                for number, parameter in enumerate(student.parameters()):
                    parameter.mul_(1.2 + 0.1 * (number % 7))
        Teachers(*pairs, model)(0.3, 0.4)
        fresh.load_state_dict(model.state_dict())
        with contestants.autocast(CPU, dtype):
            found, expected = (each(*batch).outputs.teacher_logits for each in (model, fresh))
        assert all(torch.equal(found[m], expected[m]) and found[m].isfinite().all() for m in MODALITIES)


@pytest.mark.parametrize(
    ("backend", "dtype", "changes", "error"),
    [
        ("aot_eager", torch.float32, {"variant": "mats"}, 1e-5),
        ("aot_eager", torch.bfloat16, {"variant": "mats"}, 2e-3),  # float32 is as far from it
        ("eager", torch.float32, {"variant": "mas", "cls_token": False}, 1e-5),
        ("eager", torch.float32, {"checkpointing": True}, 1e-5),
    ],
)
def test_compiled_steps(backend: str, dtype: torch.dtype, changes: dict, error: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a graph break (that raises), a program that is compiled again at a later step, and one with other numbers."""
    torch._dynamo.reset()
    monkeypatch.setattr("xkd_fast.model.attention.QUERY_TILE", 10)  # several tiles without CLS
    counter = CompileCounterWithBackend(backend)
    for owner, name, value in ((vit, "BACKEND", counter), (contestants, "MOMENTUM", 0.5)):
        monkeypatch.setattr(owner, name, value)
    options = tiny_options(**changes)
    batch = random_batch(options, CLIPS, dtype=torch.float32)
    plain, compiled = (kind(options, CPU, dtype) for kind in (contestants.Fast, contestants.fast_with("compile")))
    programs, losses = [], []
    for _ in range(4):
        expected, got = plain.step(*batch).item(), compiled.step(*batch).item()
        assert got == pytest.approx(expected, rel=error)
        programs.append(counter.frame_count)
        losses.append(expected)
    assert programs[0] > 0 and programs[0] == programs[-1], programs
    assert max(losses) - min(losses) > 10 * error * losses[0], "too little is trained for a difference to be seen"


def test_the_base_models_arithmetic() -> None:
    """Catches work that comes back into the base model's step until it takes as much as the reference's."""
    assert total(step_flops(ModelOptions())).total < 440e9


@pytest.mark.parametrize(
    ("dtype", "bound", "lacks_bfloat16"),
    [(torch.float32, 0.34, False), (torch.bfloat16, 0.47, False), (torch.bfloat16, 0.6, True)],
)
@pytest.mark.parametrize("variant", VARIANTS)
def test_launches_and_kept_bytes(
    variant: str, dtype: torch.dtype, bound: float, lacks_bfloat16: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches loops over parameters, views or modalities in the step, and whatever else autograd keeps in a deep model."""
    monkeypatch.setattr(products, "LACKS_BFLOAT16", lacks_bfloat16)
    options = tiny_options(variant=variant, encoder=EncoderOptions(24, 4, 3))
    batch = random_batch(options, CLIPS, dtype=torch.float32)
    launched, kept = {}, {}
    for kind in (contestants.Released, contestants.Fast):
        contestant = kind(options, CPU, dtype)
        contestant.step(*batch)
        launched[kind.name] = launches(lambda contestant=contestant: contestant.step(*batch))
        with contestants.autocast(CPU, dtype):
            kept[kind.name] = saved_bytes(lambda contestant=contestant: contestant.model(*batch).total)
    assert launched["fast"] <= bound * launched["reference"], launched
    assert kept["fast"] <= 0.6 * kept["reference"], kept


class PartCount(TorchDispatchMode):
    """FLOPs by part and pass; the backward pass's by the part in whose forward pass the autograd node was made."""

    def __init__(self) -> None:
        super().__init__()
        self.counter, self.flops = flop_counter(), Counter[tuple[str, str]]()
        self.part, self.began, self.spans = "other", 0, list[tuple[int, int, str]]()

    def enter(self, name: str) -> None:
        self.part, self.began = name, torch._C._autograd._get_sequence_nr()

    def leave(self, name: str) -> None:
        self.spans.append((self.began, torch._C._autograd._get_sequence_nr(), name))
        self.part = "other"

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = self.counter.get_total_flops()
        result = func(*args, **(kwargs or {}))
        node = torch._C._current_autograd_node()
        way, part = "forward", self.part
        if node is not None:
            way, number = "backward", node._sequence_nr()
            part = next((name for began, ended, name in self.spans if began <= number < ended), "other")
        self.flops[part, way] += self.counter.get_total_flops() - before
        return result


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("implementation", ("fast", "reference"))
def test_flops_of_each_part_and_pass(implementation: str, variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches formulas whose errors cancel between parts or passes, and work that moved from one part to another."""
    options = tiny_options(variant=variant, implementation=implementation, **MANY_VIEWS)
    model, batch = build_model(options, seed=0), random_batch(options, CLIPS, dtype=torch.float32)
    count = PartCount()
    if implementation == "reference":
        owners = [(model, "teach", "teachers")]
        for m in MODALITIES:
            parts = {"students": model.student(m).encoder, "decoders": model.decoder(m), "heads": model.student(m).head}
            owners += [(owner, "forward", part) for part, owner in parts.items()]
        for owner, method, part in owners:
            spy(monkeypatch, owner, method, lambda *args, part=part: count.enter(part), lambda part=part: count.leave(part))
    with listening(count), count.counter, count:
        model(*batch).total.backward()
    for way in ("forward", "backward"):
        found = {part: flops / CLIPS for (part, when), flops in count.flops.items() if when == way and flops}
        expected = {part: getattr(flops, way) for part, flops in step_flops(options).items()}
        assert found == {part: flops for part, flops in expected.items() if flops}, way
