"""Bugs planted one at a time, as they would be typed: each must turn a check red.

Those of the method turn the golden replay red, far above its tolerance; those of the fast model take it away from the
reference; those around them turn a test of their module red.
"""

import importlib
import inspect
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
import torch

import tests.replay_golden
import xkd_fast.reference
from tests.tiny import random_batch, tiny_options

REFERENCE, REPLAY = Path(xkd_fast.reference.__file__), Path(tests.replay_golden.__file__)


class Bug(NamedTuple):
    """What is typed instead of what, and what must come out wrong."""

    wrong: str  # a kind of number of the replay, or "shapes"
    edits: dict[str, str]  # of reference.py; each key stands there once
    order: dict[str, str] = {}  # noqa: RUF012 (never written): edits of the replay's order of calls
    file: str = "xkd_global"


TEACHERS = '        reference.update_teachers(model, settings["ema_video"][step], settings["ema_audio"][step])\n'
CENTRES = "        reference.update_centres(model, losses.outputs.teacher_means)\n"
CENTRES_IN_LOSS = "        update_centres(self, {m: teacher[m].mean(0) for m in MODALITIES})\n"
STEP = "        optimizer.step()\n"
LOCAL_TEACHER = 'local_teacher = self.options.teacher_view == "local"'
OTHER = """f"{'audio' if source == 'video' else 'video'}"""
ALL_NORMS = "torch.stack([p.grad.norm() for p in clipped_parameters(model) if p.grad is not None]).norm()"

BUGS = {
    # the objectives
    "sign in MMD": Bug("losses", {"- 2 * kernel_mean(x, y)": "+ 2 * kernel_mean(x, y)"}),
    "MMD's diagonal below 7": Bug("losses", {".square().clamp_min(1e-30)": ".square().add(1e-3)"}),
    "biased variance of a patch": Bug("losses", {"unbiased=True": "unbiased=False"}),
    "loss on the visible patches": Bug("losses", {"order[m][:, self.keep(m) :]": "order[m][:, : self.keep(m)]"}),
    "swapped teacher temperatures": Bug("losses", {'f"{source}_teacher_temp': f"{OTHER}_teacher_temp"}),
    "the other direction's centre": Bug("losses", {'f"{source}_centre"': f'{OTHER}_centre"'}),
    "centre moved before the loss": Bug(
        "losses", {"        recon = {\n": f"{CENTRES_IN_LOSS}        recon = {{\n"}, {CENTRES: ""}
    ),
    "distillation within the modality": Bug("losses", {"student[target])": "student[source])"}),
    "local views not distilled": Bug("losses", {"log_softmax(dim=-1).reshape": "log_softmax(dim=-1)[: len(teacher)].reshape"}),
    "teacher's clips paired with other clips": Bug(
        "losses",
        {"reshape(-1, *teacher.shape)": "reshape(len(teacher), -1, teacher.shape[1]).transpose(0, 1)"},
        file="mas_global",
    ),
    # masking, teachers and refinement
    "largest noise visible": Bug("losses", {"argsort(dim=1, stable=True)": "argsort(dim=1, descending=True)"}),
    "decoder keeps the shuffled order": Bug("losses", {"order.argsort(dim=1).unsqueeze": "order.unsqueeze"}),
    "teacher on local views": Bug("shapes", {LOCAL_TEACHER: "local_teacher = True"}),
    "teacher on global views where local is asked": Bug("shapes", {LOCAL_TEACHER: "local_teacher = False"}, file="xkd_local"),
    "no refinement": Bug("logits", {"refine(tokens[own], weights[own]).mean": "tokens[own].mean"}),
    "refinement loses the pooled energy": Bug("logits", {"(energy / weighted_energy).sqrt()": "(0 * energy + 1)"}),
    "refinement not divided by the own mean": Bug("refinement_weights", {" / own.mean(dim=-1, keepdim=True)": ""}),
    "attention of the first patch, not of CLS": Bug("refinement_weights", {"attention[:, :, 0, 1:]": "attention[:, :, 1, 1:]"}),
    # the networks
    "tanh GELU in the head": Bug(
        "gradients", {"F.gelu(self.norm(self.linear1(pooled)))": "F.gelu(self.norm(self.linear1(pooled)), approximate='tanh')"}
    ),
    "LayerNorm eps 1e-6": Bug("gradients", {"LAYER_NORM_EPS = 1e-5": "LAYER_NORM_EPS = 1e-6"}),
    "interpolation without the 0.1": Bug("logits", {"(n + 0.1) / size": "n / size"}),
    "audio positions interpolated linearly": Bug("logits", {'"bicubic"': '"bilinear"'}),
    "prototypes not normalised": Bug("logits", {"F.normalize(self.prototypes, dim=-1)": "self.prototypes"}),
    "local views before the global one": Bug("logits", {"torch.cat(pooled)": "torch.cat(pooled[::-1])"}),
    # around the optimiser
    "clipping decoders too": Bug("weights", {'if p.requires_grad and "_student." in name': "if p.requires_grad"}),
    "clipping by the global norm": Bug("weights", {"parameter.grad.norm()": ALL_NORMS}),
    "decay on biases": Bug("weights", {'"weight_decay": 0.0': '"weight_decay": weight_decay'}),
    "no decay on CLS and positions": Bug(
        "weights", {"if p.ndim > 1]": "if p.ndim == 2]", "if p.ndim == 1]": "if p.ndim != 2]"}
    ),
    "teachers moved before the optimiser": Bug("teachers", {}, {STEP + TEACHERS: TEACHERS + STEP}),
    "MATS stack moved with one momentum": Bug(
        "teachers", {"video_momentum * audio_momentum": "video_momentum"}, file="mats_global"
    ),
}


def edited(path: Path, edits: dict[str, str], name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module at ``path`` with each edit made at the one place where its text stands."""
    source = path.read_text()
    for old, new in edits.items():
        assert source.count(old) == 1, f"{path.name} holds {old!r} {source.count(old)} times; bring this bug up to date"
        source = source.replace(old, new)
    module = ModuleType(name)
    module.__file__ = str(path)
    monkeypatch.setitem(sys.modules, name, module)  # dataclasses look their module up there
    exec(compile(source, name, "exec"), module.__dict__)
    return module


def replay_with(bug: Bug, monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[float, str]]:
    """The worst errors by kind, and the tensors they belong to."""
    module = edited(REPLAY, bug.order, "replay_with_bug", monkeypatch)
    module.reference = edited(REFERENCE, bug.edits, "reference_with_bug", monkeypatch)
    return module.replay(module.Golden.read(module.GOLDEN / f"{bug.file}.safetensors")).worst


@pytest.mark.parametrize("name", BUGS)
def test_planted_bug_turns_the_replay_red(name, monkeypatch):
    """A replay too blind or too tolerant to see the bug."""
    bug = BUGS[name]
    if bug.wrong == "shapes":
        with pytest.raises(ValueError, match=r"shape \(3, \d+\), expected \(3, \d+\)"):
            replay_with(bug, monkeypatch)
    else:
        error, tensor = replay_with(bug, monkeypatch)[bug.wrong]
        assert error > 500 * 1e-6, f"{bug.wrong} are off by {error:.1e} only, at {tensor}"


def test_replay_without_a_bug_stays_green(monkeypatch):
    """An editing that is itself a bug, so that everything above is red for no reason."""
    assert max(error for error, _ in replay_with(Bug("nothing", {}), monkeypatch).values()) < 1e-6


# ------------------------------------------------------------------------------------------------------------ the fast model


class FastBug(NamedTuple):
    """What is typed instead of what in a module of ``xkd_fast/model``, and the options that show it."""

    module: str
    edits: dict[str, str]  # of the module; each key stands there once
    options: dict[str, object] = {}  # noqa: RUF012 (never written)


FAST_MODULES = (
    "kernels",
    "packing",
    "attention",
    "layers",
    "vit",
    "tokens",
    "half",
    "autoencoder",
    "graphs",
    "xkd",
)  # as imported
SOFTMAX: dict[str, object] = {"refinement": "softmax"}
FAST_BUGS = {
    "clips that take each other's patches": FastBug("tokens", {"kernel_gather(clip, ids,": "kernel_gather(clip, ids.flip(0),"}),
    "positions of the first patches for the visible ones": FastBug(
        "tokens", {"F.embedding(visible, table[0])": "table[:, : visible.shape[1]]"}
    ),
    "CLS without its position": FastBug("tokens", {"(encoder.cls_token + encoder.position[:, :1])": "encoder.cls_token"}),
    "heads and q, k, v confused": FastBug(
        "packing",
        {"view(batch, length, 3, heads, -1).permute(2, 0": "view(batch, length, heads, 3, -1).transpose(2, 3).permute(2, 0"},
    ),
    "MLP without its residual": FastBug("packing", {"x if branch is None else x + branch": "x if branch is None else branch"}),
    "recomputed norm not shifted": FastBug("layers", {"gain, shift, ctx.eps)": "gain, None, ctx.eps)"}),
    "GELU's derivative left out": FastBug(
        "layers", {"torch.ops.aten.gelu_backward(input_gradient(gradient, weight), h)": "input_gradient(gradient, weight)"}
    ),
    "scores' scale lost in the backward pass": FastBug(
        "attention", {"_scaled(to_scores @ k)": "to_scores @ k"}, {"attention": "recompute"}
    ),
    "CLS among the patches": FastBug("attention", {"dtype=dtype)[:, :, 0, 1:]": "dtype=dtype)[:, :, 0, :-1]"}),
    "a tile of queries left out": FastBug(
        "attention", {"in q.split(QUERY_TILE, dim=2)": "in q.split(8, dim=2)[1:]"}, {"cls_token": False}
    ),
    "masked queries, visible residual": FastBug(
        "autoencoder", {"own = tokens[:, tokens.shape[1] - masked :]": "own = tokens[:, :masked]"}
    ),
    "decoder's positions in grid order": FastBug(
        "autoencoder", {"F.embedding(order, decoder.position[0, first:])": "decoder.position[:, first:]"}
    ),
    "local views before the global one, packed": FastBug("xkd", {"torch.cat(pooled)": "torch.cat(pooled[::-1])"}),
    "targets of other patches": FastBug(
        "xkd", {"masked = {m: order[m][:, self.keep(m) :]": "masked = {m: order[m][:, : -self.keep(m)]"}
    ),
    "teacher on the global view": FastBug(
        "xkd", {'teacher_view == "local"': 'teacher_view == "none"'}, {"teacher_view": "local"}
    ),
    "teachers share as students do": FastBug("xkd", {'else ("mats",)': 'else ("mas", "mats")'}, {"variant": "mas"}),
    "refined by its own attention alone": FastBug(
        "xkd", {"attention[own], attention[other]": "attention[own], attention[own]"}, SOFTMAX
    ),
    "weights of tokens in another order": FastBug("xkd", {"refine(tokens[own]": "refine(tokens[own].flip(1)"}),
    "always the mean mode": FastBug("xkd", {", self.options.refinement": ', "mean"'}, SOFTMAX),
}


def fast_model_with(bug: FastBug, monkeypatch: pytest.MonkeyPatch) -> float:
    """How far the fast model with a bug is from the reference: the largest relative error of loss, logits and gradients.

    Modules are read anew in the order in which they import each other.
    """
    for name in FAST_MODULES:
        path = Path(xkd_fast.reference.__file__).parent / "model" / f"{name}.py"
        module = edited(path, bug.edits if name == bug.module else {}, f"xkd_fast.model.{name}", monkeypatch)
        monkeypatch.setattr(sys.modules["xkd_fast.model"], name, module, raising=False)
    options = tiny_options(**bug.options)
    batch = random_batch(options, 3, seed=5, dtype=torch.float64)
    models = []
    for kind in (xkd_fast.reference.XKD, sys.modules["xkd_fast.model.xkd"].XKD):
        torch.manual_seed(3)
        model = kind(options).double()
        with torch.no_grad():
            for parameter in model.parameters():  # none is zero or one, as fresh ones are
                parameter.add_(0.1 * torch.randn(parameter.shape, dtype=torch.float64))
        losses = model(*batch)
        losses.total.backward()
        models.append((losses, model))
    (expected, plain), (got, fast) = models
    errors = [abs(got.total.item() / expected.total.item() - 1)]
    for modality, logits in expected.outputs.student_logits.items():
        errors.append((got.outputs.student_logits[modality] - logits).norm() / logits.norm())
    for parameter, other in zip(fast.parameters(), plain.parameters(), strict=True):
        if other.grad is not None:
            errors.append((parameter.grad - other.grad).norm() / other.grad.norm().clamp_min(1e-12))
    return max(float(error) for error in errors)


@pytest.mark.parametrize("name", FAST_BUGS)
def test_planted_bug_takes_the_fast_model_from_the_reference(name, monkeypatch):
    """A comparison of both models too blind to see the bug."""
    assert fast_model_with(FAST_BUGS[name], monkeypatch) > 1e-4


@pytest.mark.parametrize("options", [dict(t) for t in sorted({tuple(bug.options.items()) for bug in FAST_BUGS.values()})])
def test_the_fast_model_without_a_bug_is_the_reference(options, monkeypatch):
    """Modules read anew that are themselves wrong, so that everything above is red for no reason."""
    assert fast_model_with(FastBug("none", {}, options), monkeypatch) < 1e-9


# ---------------------------------------------------------------------------------------------------------- around the method


class Slip(NamedTuple):
    """What is typed instead of what in which module, and the test that must see it."""

    module: str
    edits: dict[str, str]  # of the module; each key stands there once
    test: str  # MODULE:FUNCTION


THREADS = "tests.engine.test_launch:test_processes_share_the_cores"
PROCESSES = "tests.engine.test_launch:test_local_world_size_of_each_launcher"
SIGTERM = "tests.engine.test_launch:test_sigterm_is_agreed_on_not_acted_on"
FIRST_RANK = "tests.engine.test_launch:test_error_of_the_first_rank_reaches_all"
TOOLS = "tests.engine.test_launch:test_missing_build_tools_are_named"
LAUNCHERS = '("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "WORLD_SIZE")'

SHARDS = "tests.test_cli:test_doctor_reads_shards_through"
DAMAGED = '            damaged[f"{folder}/{sets[folder].keys[index]}"] = found\n'

DIRTY = "tests.analysis.test_provenance:test_only_changed_code_makes_a_figure_dirty"
NO_GIT = "tests.analysis.test_provenance:test_without_git_there_is_no_commit"
MACHINE = "tests.analysis.test_provenance:test_device_and_versions_are_those_of_this_machine"

SLIPS = {
    # starting and stopping a run
    "every rank takes all cores": Slip("xkd_fast.engine.launch", {" // local_world_size())": ")"}, THREADS),
    "asked threads ignored": Slip("xkd_fast.engine.launch", {"threads or max(1,": "max(1,"}, THREADS),
    "processes of deepspeed not known": Slip(
        "xkd_fast.engine.launch", {LAUNCHERS: '("LOCAL_WORLD_SIZE", "WORLD_SIZE")'}, PROCESSES
    ),
    "processes of all machines": Slip(
        "xkd_fast.engine.launch", {LAUNCHERS: '("WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE")'}, PROCESSES
    ),
    "SIGTERM forgotten": Slip("xkd_fast.engine.launch", {"self._received = True": "pass"}, SIGTERM),
    "SIGTERM acted on in mid-step": Slip(
        "xkd_fast.engine.launch", {"self._received = True": "self._received = self.agreed = True"}, SIGTERM
    ),
    "first rank's error swallowed": Slip(
        "xkd_fast.engine.launch", {"        raise failure[0]\n": "        return\n"}, FIRST_RANK
    ),
    "no look for a compiler": Slip("xkd_fast.engine.launch", {"(shutil.which(compiler),": "(True,"}, TOOLS),
    "ninja beside this Python not found": Slip(
        "xkd_fast.engine.launch", {"str(Path(sys.executable).parent)": "str(Path(sys.executable))"}, TOOLS
    ),
    # doctor --shards
    "damage is no failure": Slip("xkd_fast.doctor", {"return 1 if damaged or broken else 0": "return 0"}, SHARDS),
    "stops at the first damaged sample": Slip("xkd_fast.doctor", {DAMAGED: f"{DAMAGED}            break\n"}, SHARDS),
    "first folder alone": Slip("xkd_fast.doctor", {"for folder in folders}": "for folder in folders[:1]}"}, SHARDS),
    "samples of one key count as one": Slip(
        "xkd_fast.doctor", {'f"{folder}/{sets[folder].keys[index]}"': "sets[folder].keys[index]"}, SHARDS
    ),
    "first part of a sample alone": Slip(
        "xkd_fast.doctor", {"in sets[folder].damage(index)]": "in sets[folder].damage(index) if 'audio' in str(error)]"}, SHARDS
    ),
    # what a figure says of itself
    "never dirty": Slip("xkd_fast.analysis.provenance", {'"dirty": not named and bool(': '"dirty": False and bool('}, DIRTY),
    "the README decides": Slip("xkd_fast.analysis.provenance", {', ":(top,exclude)README.md"': ""}, DIRTY),
    "results decide": Slip("xkd_fast.analysis.provenance", {'":(top,exclude)benchmarks/results", ': ""}, DIRTY),
    "untracked files decide": Slip("xkd_fast.analysis.provenance", {'"--untracked-files=no", ': ""}, DIRTY),
    "commit of the folder one stands in": Slip(
        "xkd_fast.analysis.provenance", {"cwd=Path(__file__).parent": "cwd=Path.cwd()"}, DIRTY
    ),
    "an empty commit": Slip("xkd_fast.analysis.provenance", {' or None,\n        "dirty"': ',\n        "dirty"'}, NO_GIT),
    "device not asked": Slip("xkd_fast.analysis.provenance", {"if torch.cuda.is_available():": "if False:"}, MACHINE),
    "threads left out": Slip(
        "xkd_fast.analysis.provenance", {"({instructions}), {torch.get_num_threads()} threads": "({instructions})"}, MACHINE
    ),
}


@pytest.fixture
def signals() -> Iterator[None]:
    """Puts the handlers of signals back."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def run_test(name: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a test MODULE:FUNCTION, with its module read anew, so that it imports what stands in ``sys.modules`` now."""
    module, _, function = name.partition(":")
    path = importlib.import_module(module).__file__
    assert path is not None
    test = getattr(edited(Path(path), {}, f"{module}_anew", monkeypatch), function)
    test(**{fixture: request.getfixturevalue(fixture) for fixture in inspect.signature(test).parameters})


@pytest.mark.usefixtures("signals")
@pytest.mark.parametrize("name", SLIPS)
def test_planted_slip_turns_its_test_red(name: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A test too blind to see the slip."""
    slip = SLIPS[name]
    package, _, leaf = slip.module.rpartition(".")
    path = importlib.import_module(slip.module).__file__
    assert path is not None
    monkeypatch.setattr(sys.modules[package], leaf, edited(Path(path), slip.edits, slip.module, monkeypatch))
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        run_test(slip.test, request, monkeypatch)


@pytest.mark.usefixtures("signals")
@pytest.mark.parametrize("name", sorted({slip.test for slip in SLIPS.values()}))
def test_a_test_without_a_slip_stays_green(name: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A way of running tests that is itself a fault, so that everything above is red for no reason."""
    run_test(name, request, monkeypatch)
