"""Per-tensor clipping and AdamW, on whole tensors and on flat shards, against the reference's plain statement."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given
from hypothesis import strategies as st

from tests.tiny import tiny_options
from xkd_fast import reference
from xkd_fast.engine.groups import group_parameters, shares_of, slice_of
from xkd_fast.engine.launch import free_port
from xkd_fast.engine.optimizer import ClippedAdamW
from xkd_fast.engine.updates import UPDATES, Xkd, choose_update, obstacle
from xkd_fast.errors import UserError

BETAS, EPS, DECAY, CLIP = (0.9, 0.95), 1e-8, 0.3, 0.3
RATES = (1e-3, 2e-3, 5e-4)


def make_model(variant="xkd"):
    torch.manual_seed(0)
    return reference.XKD(tiny_options(variant=variant)).double()


def make_optimizer(model, clip_norm=CLIP, update=Xkd):
    groups = group_parameters(model.named_parameters(), DECAY)
    return ClippedAdamW(groups, lr=0.0, clip_norm=clip_norm, update=update(BETAS, EPS))


def gradients(model, step):
    """Gradients of one step by name; every third tensor's norm is far below the clip, every third far above."""
    generator = torch.Generator().manual_seed(step)
    found = {}
    for number, (name, parameter) in enumerate(model.named_parameters()):
        if parameter.requires_grad:
            gradient = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            found[name] = gradient * (0.01, 1.0, 100.0)[number % 3] / gradient.norm()
    return found


def plain_training(variant):
    """Weights by name after three steps of the reference's clipping and torch's AdamW."""
    model = make_model(variant)
    optimizer = torch.optim.AdamW(reference.parameter_groups(model, DECAY), betas=BETAS, eps=EPS)
    for step, rate in enumerate(RATES):
        for name, gradient in gradients(model, step).items():
            model.get_parameter(name).grad = gradient
        reference.clip_gradients(model, CLIP)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
    return dict(model.named_parameters())


def total_norm(found):
    return torch.stack([gradient.norm() for gradient in found.values()]).norm()


def clipped_norm(found):
    kept = {n: g if "_decoder." in n else g * min(1.0, CLIP / (g.norm().item() + 1e-6)) for n, g in found.items()}
    return total_norm(kept)


@pytest.mark.parametrize("variant", ["xkd", "mas"])
def test_whole_tensors_follow_the_reference(variant):
    """Decoders clipped, students not, biases decayed, a shared stack left out; a norm taken after clipping."""
    model = make_model(variant)
    optimizer = make_optimizer(model)
    for step, rate in enumerate(RATES):
        found = gradients(model, step)
        for name, gradient in found.items():
            model.get_parameter(name).grad = gradient.clone()
        optimizer.set_learning_rate(rate)
        optimizer.step()
        torch.testing.assert_close(optimizer.gradient_norm(), total_norm(found), rtol=1e-12, atol=0)
        torch.testing.assert_close(optimizer.clipped_gradient_norm(), clipped_norm(found), rtol=1e-12, atol=0)
    expected = plain_training(variant)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, expected[name], rtol=1e-12, atol=1e-14, msg=name)


def test_every_trainable_tensor_is_in_one_group():
    """A tensor trained twice or never; prototypes decayed differently or not set apart."""
    model = make_model("mats")
    groups = group_parameters(model.named_parameters(), DECAY)
    names = [name for group in groups for name in group.names]
    assert sorted(names) == sorted(name for name, p in model.named_parameters() if p.requires_grad)
    for group in groups:
        for name, parameter in zip(group.names, group.parameters, strict=True):
            assert parameter is model.get_parameter(name)
            assert group.weight_decay == (DECAY if parameter.ndim > 1 else 0.0)
            assert group.clipped is ("_decoder." not in name)
            assert group.last_layer is name.endswith("prototypes")


def test_no_clipping_leaves_gradients_alone():
    """``clip_norm: null`` taken for 0, or a norm not reported."""
    model = make_model()
    optimizer = make_optimizer(model, clip_norm=None)
    found = gradients(model, 0)
    for name, gradient in found.items():
        model.get_parameter(name).grad = gradient.clone()
    optimizer.step()
    for name, gradient in found.items():
        assert torch.equal(model.get_parameter(name).grad, gradient), name
    assert torch.equal(optimizer.clipped_gradient_norm(), optimizer.gradient_norm())
    torch.testing.assert_close(optimizer.gradient_norm(), total_norm(found), rtol=1e-12, atol=0)


def test_a_frozen_last_layer_neither_moves_nor_decays_and_starts_afresh_later():
    """Decay acting on frozen prototypes, moments gathered while frozen, or another layer frozen with them."""
    model = make_model()
    optimizer = make_optimizer(model)
    optimizer.set_learning_rate(1e-2)
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if name.endswith("prototypes")}
    other = model.video_student.head.linear3.weight.detach().clone()

    def step(number):
        for name, gradient in gradients(model, number).items():
            model.get_parameter(name).grad = gradient
        optimizer.step()

    optimizer.last_layer_frozen = True
    step(0)
    for name, before in frozen.items():
        assert torch.equal(model.get_parameter(name), before), name
        assert not optimizer.state[model.get_parameter(name)]
    assert not torch.equal(model.video_student.head.linear3.weight, other)
    optimizer.last_layer_frozen = False
    step(1)
    moved = model.video_student.head.prototypes
    assert not torch.equal(moved, frozen["video_student.head.prototypes"])
    assert optimizer.state[moved]["step"] == 1


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(1, 4), st.integers(0, 5))
def test_segments_tile_every_shard(sizes, world, padding):
    """A number of a shard attributed to no tensor, to the wrong one, or padding to any."""
    owners = [tensor for tensor, size in enumerate(sizes) for _ in range(size)]
    length = -(-(len(owners) + padding) // world)
    for rank in range(world):
        expected = owners[rank * length : (rank + 1) * length]
        found = []
        for piece in slice_of(sizes, rank * length, length):
            assert piece.start == len(found) and piece.count > 0
            found += [piece.tensor] * piece.count
        assert found == expected


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(1, 4))
def test_equal_shares_of_every_tensor_tile_it(sizes, world):
    """A number of a tensor in no rank's share, or in two; a share's padding taken for numbers."""
    shares, order = [-(-size // world) for size in sizes], list(reversed(range(len(sizes))))
    counted = [0] * len(sizes)
    for rank in range(world):
        position = {}
        for piece in shares_of(order, [sizes[i] for i in order], [shares[i] for i in order], rank):
            counted[piece.tensor] += piece.count
            position[piece.tensor] = piece.start
            assert piece.count == min(shares[piece.tensor], sizes[piece.tensor] - rank * shares[piece.tensor])
        for tensor, start in position.items():
            assert start == sum(shares[other] for other in order[: order.index(tensor)])
    assert counted == sizes


def flat_shards(optimizer, model, rank, world):
    """Replace every group's parameters by this rank's slice of them laid end to end and padded, as ZeRO does."""
    named, padded = {id(p): name for name, p in model.named_parameters()}, []
    for group in optimizer.param_groups:
        names = [named[id(p)] for p in group["params"]]
        flat = torch.cat([p.detach().flatten() for p in group["params"]])
        length = -(-len(flat) // world) + 3
        flat = torch.nn.functional.pad(flat, (0, length * world - len(flat)))
        group["params"] = [torch.nn.Parameter(flat[rank * length : (rank + 1) * length].clone())]
        padded.append(names)
    return padded


def train_on_shards(rank, world, one_group_at_a_time):
    """Three steps on flat shards; this rank's shards, and the names in each group."""
    model = make_model()
    optimizer = make_optimizer(model)
    names = flat_shards(optimizer, model, rank, world)
    groups = optimizer.param_groups
    if one_group_at_a_time:
        optimizer.expect(len(groups), {}, after=lambda: None)
    for step, rate in enumerate(RATES):
        found = gradients(model, step)
        optimizer.set_learning_rate(rate)
        for group, members in zip(groups, names, strict=True):
            (shard,) = group["params"]
            flat = torch.cat([found[name].flatten() for name in members])
            flat = torch.nn.functional.pad(flat, (0, len(shard) * world - len(flat)))
            shard.grad = flat[rank * len(shard) : (rank + 1) * len(shard)].clone()
        for present in [[group] for group in groups] if one_group_at_a_time else [groups]:
            optimizer.param_groups = present
            optimizer.step()
        optimizer.param_groups = groups
        torch.testing.assert_close(optimizer.gradient_norm(), total_norm(found), rtol=1e-12, atol=0)
    return [group["params"][0].detach() for group in groups], names


def assert_shards_equal_the_reference(shards_by_rank, names):
    expected, seen = plain_training("xkd"), 0
    for number, members in enumerate(names):
        flat, offset = torch.cat([shards[number] for shards in shards_by_rank]), 0
        for name in members:
            size = expected[name].numel()
            ours = flat[offset : offset + size].view(expected[name].shape)
            torch.testing.assert_close(ours, expected[name].detach(), rtol=1e-12, atol=1e-14, msg=name)
            offset, seen = offset + size, seen + 1
        assert (flat[offset:] == 0).all()  # padding stays padding
    assert seen == sum(parameter.requires_grad for parameter in expected.values())


def test_one_flat_shard_follows_the_reference():
    """Clipping by the norm of the whole shard in place of each tensor's own."""
    shards, names = train_on_shards(rank=0, world=1, one_group_at_a_time=False)
    assert_shards_equal_the_reference([shards], names)


def shard_rank(rank, port, results):
    """One of two ranks, each with half of every group."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    torch.save(train_on_shards(rank, 2, one_group_at_a_time=True), f"{results}/{rank}.pt")
    dist.destroy_process_group()


def test_shards_of_two_ranks_stepped_group_by_group_follow_the_reference(tmp_path):
    """The norm of a tensor that two ranks hold pieces of, taken from one piece alone."""
    mp.spawn(shard_rank, args=(free_port(), str(tmp_path)), nprocs=2)
    (first, names), (second, _) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert_shards_equal_the_reference([first, second], names)


def test_a_shard_too_small_for_its_group_is_an_error():
    """Another layout of the flat shards than the one assumed, clipped as if nothing were wrong."""
    model = make_model()
    optimizer = make_optimizer(model)
    (first, *_) = optimizer.param_groups
    first["params"] = [torch.nn.Parameter(torch.zeros(5, dtype=torch.float64))]
    first["params"][0].grad = torch.ones(5, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="a shard of 5 numbers on each of 1 ranks cannot hold"):
        optimizer.step()


@pytest.mark.parametrize("update", [UPDATES["xkd"], UPDATES["torch"]])
def test_an_overflow_moves_nothing_and_is_told(update):
    """A step taken on infinite gradients; moments spoiled; the next step's bias correction as if two had been taken."""
    model, plain = make_model(), make_model()
    optimizers = [make_optimizer(each, update=update) for each in (model, plain)]
    optimizers[0].watches_overflow = True
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for name, gradient in gradients(model, 0).items():
        model.get_parameter(name).grad = gradient.clone()
    model.audio_student.head.linear3.weight.grad[0, 0] = float("inf")
    optimizers[0].set_learning_rate(1e-2)
    optimizers[0].step()
    assert optimizers[0].skipped
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    for optimizer, each in zip(optimizers, (model, plain), strict=True):
        for name, gradient in gradients(each, 1).items():
            each.get_parameter(name).grad = gradient.clone()
        optimizer.set_learning_rate(1e-2)
        optimizer.step()
        assert not optimizer.skipped
    for (name, mine), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(mine, theirs), name


def test_gradients_of_a_scaled_loss_are_unscaled_before_they_are_clipped():
    """Clipping the scaled norm, unscaling twice, or a norm reported as scaled."""
    model, plain = make_model(), make_model()
    optimizers = [make_optimizer(each) for each in (model, plain)]
    optimizers[0].inverse_scale = 1 / 4096
    for optimizer, each, scale in zip(optimizers, (model, plain), (4096.0, 1.0), strict=True):
        for name, gradient in gradients(each, 1).items():
            each.get_parameter(name).grad = gradient * scale
        optimizer.set_learning_rate(1e-2)
        optimizer.step()
    for (name, mine), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-13, atol=0, msg=name)
    for norm in ("gradient_norm", "clipped_gradient_norm"):
        found, expected = (getattr(optimizer, norm)() for optimizer in optimizers)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def test_gradients_not_to_be_clipped_are_not_touched_by_the_operator():
    """``adamw_ema`` is told what to multiply by, not given scaled gradients: a pass over memory saved."""
    model = make_model().float()
    optimizer = make_optimizer(model)
    found = {name: gradient.float() for name, gradient in gradients(model, 2).items()}
    for name, gradient in found.items():
        model.get_parameter(name).grad = gradient.clone()
    optimizer.step()
    if choose_update("auto", torch.device("cpu"), BETAS, EPS)[1].startswith("native"):
        assert all(torch.equal(model.get_parameter(name).grad, gradient) for name, gradient in found.items())


def test_the_choice_of_an_update_is_told_and_what_cannot_run_is_refused():
    """A silent fallback, or a traceback for an implementation that is not there."""
    cpu = torch.device("cpu")
    update, reason = choose_update("auto", cpu, BETAS, EPS)
    assert update.name == "xkd" and reason.split()[0] in ("native", "torch")
    assert choose_update("torch", cpu, BETAS, EPS)[1] == "asked for"
    with pytest.raises(UserError, match=r"optimizer.implementation = apex cannot run here: .* runs on a GPU alone"):
        choose_update("apex", cpu, BETAS, EPS)
    with pytest.raises(UserError, match=r"moves parameters in host memory: set train.offload_optimizer=true"):
        choose_update("deepspeed_cpu", torch.device("cuda"), BETAS, EPS)
    assert "not installed" in obstacle("apex", torch.device("cuda"))


def test_the_compiled_operator_is_what_asking_for_it_gives(monkeypatch, tmp_path):
    """PyTorch's operators under the name of ours on a GPU where ours has not been measured; or a missing library in silence."""
    from xkd_kernels import backends

    monkeypatch.setattr(backends.native, "missing", lambda device_type: None)
    update, reason = choose_update("xkd", torch.device("cuda"), BETAS, EPS)
    assert (update.backend, reason) == ("native", "asked for")
    monkeypatch.undo()
    monkeypatch.setenv("XKD_NATIVE", str(tmp_path))
    with pytest.raises(
        UserError, match=r"implementation = xkd cannot run here: .*cpu.so has not been built; install .*=auto or"
    ):
        choose_update("xkd", torch.device("cpu"), BETAS, EPS)


def test_deepspeeds_fused_optimiser_is_refused_for_offloaded_states(monkeypatch):
    """Tensors of the host handed to a CUDA kernel."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    with pytest.raises(UserError, match=r"deepspeed_fused cannot run here: .* states are in host memory: take deepspeed_cpu"):
        choose_update("deepspeed_fused", torch.device("cpu"), BETAS, EPS)
