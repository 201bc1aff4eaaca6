"""State names: released XKD files ↔ ours, and files that are whole or the old ones."""

import pytest
import torch
from safetensors import safe_open

import xkd_fast.weights
from tests.replay_golden import FILES, GOLDEN, Golden
from tests.tiny import tiny_options
from xkd_fast import reference
from xkd_fast.errors import UserError
from xkd_fast.weights import (
    ENCODER_FILES,
    from_released,
    our_name,
    read_released_encoder,
    read_safetensors,
    released_names,
    to_released,
    write_released_encoder,
    write_safetensors,
)


@pytest.fixture(scope="module", params=FILES)
def golden(request):
    return Golden.read(GOLDEN / f"{request.param}.safetensors")


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


@pytest.fixture()
def model():
    torch.manual_seed(0)
    return reference.XKD(tiny_options())


@pytest.mark.parametrize("moment", ["init.", "final."])
def test_released_states_survive_the_way_to_ours_and_back(golden, moment):
    """A tensor dropped, renamed onto another, or the second copy of a shared norm not written."""
    released = golden.group(moment)
    ours = from_released(released)
    assert_same(to_released(ours), released)
    assert ours.keys() == reference.XKD(golden.options()).state_dict().keys()


@pytest.mark.parametrize("variant", ["xkd", "mas", "mats"])
@pytest.mark.parametrize("cls_token", [True, False], ids=["cls", "no_cls"])
def test_our_states_survive_the_way_to_released_and_back(variant, cls_token):
    """A name of ours without a released one, for any variant and number of blocks beyond 9."""
    options = tiny_options(variant=variant, cls_token=cls_token, encoder=type(tiny_options().encoder)(24, 11, 3))
    state = reference.XKD(options).state_dict()
    assert_same(from_released(to_released(state)), state)


def test_names_follow_the_text(model):
    """Video and audio, students and teachers, or the two directions' centres swapped."""
    expected = {
        "video_student.encoder.patch_embedding.weight": ("vid_student.backbone.cuboid_embed.proj.weight",),
        "audio_teacher.encoder.patch_embedding.bias": ("aud_teacher.backbone.patch_embed.proj.bias",),
        "audio_student.encoder.blocks.1.qkv.weight": ("aud_student.backbone.encoder.blocks.1.attn.qkv.weight",),
        "video_teacher.encoder.blocks.0.fc2.bias": ("vid_teacher.backbone.encoder.blocks.0.mlp.fc2.bias",),
        "video_student.encoder.norm.bias": ("vid_student.backbone.encoder_norm.bias",),
        "video_student.encoder.position": ("vid_student.backbone.enc_pos_embed",),
        "audio_student.head.norm.weight": ("aud_student.head.mlp.1.weight", "aud_student.head.mlp.4.weight"),
        "audio_student.head.linear3.bias": ("aud_student.head.mlp.6.bias",),
        "video_teacher.head.prototypes": ("vid_teacher.head.last_layer.weight_v",),
        "video_decoder.project_in.weight": ("vid_ae.mid_proj.weight",),
        "audio_decoder.position": ("aud_ae.dec_pos_embed",),
        "audio_decoder.blocks.0.norm2.weight": ("aud_ae.decoder.blocks.0.norm2.weight",),
        "video_centre": ("vt2as_ce_loss.center",),
        "audio_centre": ("at2vs_ce_loss.center",),
    }
    for ours, released in expected.items():
        assert ours in model.state_dict()
        assert released_names(ours) == released
        assert [our_name(name) for name in released] == [ours] * len(released)


@pytest.mark.parametrize(
    "name",
    [
        "video_student",
        "vid_student.encoder.position",
        "video_student.encoder.positions",
        "video_student.encoder.blocks.x.fc1.bias",
        "video_decoder.norm.weight",
        "picture_student.encoder.norm.bias",
        "video_student.head.linear4.bias",
        "",
    ],
)
def test_unknown_names_of_ours_are_refused(name):
    """A name that only begins like a known one, mapped all the same."""
    with pytest.raises(KeyError, match="is not a state name"):
        released_names(name)


@pytest.mark.parametrize(
    "name",
    [
        "vid_student.backbone.enc_pos_embeds",
        "vid_student.backbone.patch_embed.proj.weight",
        "vid_student.head.mlp.2.weight",
        "video_student.backbone.cls_token",
        "vid_ae.encoder.cls_token",
        "center",
        "vid_student.backbone.encoder.blocks.one.norm1.bias",
    ],
)
def test_unknown_released_names_are_refused(name):
    """A file of another model loaded in part, with the rest left at its initial values."""
    with pytest.raises(KeyError, match="is not a name of a released XKD state"):
        our_name(name)
    with pytest.raises(UserError, match=r"(?s).*" + name.replace(".", r"\.")):
        from_released({name: torch.zeros(1)})


def test_two_values_for_a_shared_tensor_are_refused(golden):
    """A file whose two copies of the head's norm differ: taking either would be a guess."""
    released = dict(golden.group("init."))
    released["vid_student.head.mlp.4.weight"] = released["vid_student.head.mlp.4.weight"] + 1
    with pytest.raises(UserError, match=r"vid_student\.head\.mlp\.\d\.weight"):
        from_released(released)


@pytest.mark.parametrize("owner", ENCODER_FILES)
def test_released_encoder_file_is_written_and_read(owner, model, tmp_path):
    """An encoder file with prefixes, without its position table, or read as another network's."""
    path = tmp_path / f"xkd_{owner}.pth.tar"
    write_released_encoder(model.state_dict(), path, owner)
    stored = torch.load(path, weights_only=True)
    blocks = ("norm1.weight", "attn.qkv.weight", "attn.proj.bias", "norm2.bias", "mlp.fc1.weight", "mlp.fc2.bias")
    assert {"cls_token", "enc_pos_embed", "encoder_norm.weight"} | {
        f"encoder.blocks.1.{name}" for name in blocks
    } <= stored.keys()
    assert not any("backbone" in name or "head" in name for name in stored)
    network = f"{owner.replace('vid', 'video').replace('aud', 'audio')}.encoder."
    ours = {name: tensor for name, tensor in model.state_dict().items() if name.startswith(network)}
    assert_same(read_released_encoder(path, owner), ours)
    assert ours.keys() == {f"{network}{name}" for name in model.student("video").encoder.state_dict()}


def test_golden_encoder_read_from_a_released_file_gives_its_features(golden, tmp_path):
    """An encoder that loads without complaint but computes something else."""
    released = golden.group("init.vid_teacher.backbone.")
    torch.save(dict(released), tmp_path / "vid_teacher.pth.tar")
    model = reference.XKD(golden.options())
    model.load_state_dict(from_released(golden.group("init.")))
    clip = golden.inputs(0, torch.float32)[0].video_global
    expected = model.teacher("video").features(clip)
    with torch.no_grad():
        for parameter in model.teacher("video").parameters():
            parameter.zero_()
    missing, unexpected = model.load_state_dict(
        read_released_encoder(tmp_path / "vid_teacher.pth.tar", "vid_teacher"), strict=False
    )
    assert not unexpected and not any(name.startswith("video_teacher.encoder.") for name in missing)
    assert torch.equal(model.teacher("video").features(clip), expected)


@pytest.mark.parametrize(
    "content", [b"not a file of torch", None, [1, 2], {"cls_token": 3}], ids=["garbage", "missing", "list", "numbers"]
)
def test_unreadable_encoder_files_are_named(content, tmp_path):
    """A traceback of torch's in place of one sentence."""
    path = tmp_path / "file.pth.tar"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(UserError, match=r"file\.pth\.tar"):
        read_released_encoder(path, "vid_student")


def test_an_encoder_that_the_state_lacks_is_refused(tmp_path):
    """An empty file written for a network that is not there."""
    with pytest.raises(UserError, match=r"video_teacher\.encoder\."):
        write_released_encoder({"video_student.encoder.norm.bias": torch.zeros(1)}, tmp_path / "file", "vid_teacher")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("variant", ["xkd", "mats"])
def test_safetensors_hold_state_and_metadata(variant, tmp_path):
    """Shared or transposed tensors, which safetensors refuse or scramble; metadata lost."""
    model = reference.XKD(tiny_options(variant=variant))
    state = dict(model.state_dict()) | {"transposed": torch.arange(6.0).reshape(2, 3).T}
    path = tmp_path / "deep" / "model.safetensors"
    write_safetensors(state, path, {"step": "7"})
    assert_same(read_safetensors(path), state)
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"step": "7"}
    reference.XKD(tiny_options(variant=variant)).load_state_dict(
        {n: t for n, t in read_safetensors(path).items() if n != "transposed"}
    )


@pytest.mark.parametrize("failure", [OSError("no space left"), KeyboardInterrupt()], ids=["disk full", "interrupted"])
def test_a_write_cut_short_leaves_the_old_file_and_nothing_else(failure, tmp_path, monkeypatch):
    """The last good checkpoint lost to a full disk or Ctrl-C."""
    path = tmp_path / "model.safetensors"
    write_safetensors({"weight": torch.ones(3)}, path)

    def cut_short(tensors, filename, metadata):
        with open(filename, "wb") as file:
            file.write(b"half")
        raise failure

    monkeypatch.setattr(xkd_fast.weights, "save_file", cut_short)
    with pytest.raises(type(failure)):
        write_safetensors({"weight": torch.zeros(3)}, path)
    assert torch.equal(read_safetensors(path)["weight"], torch.ones(3))
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_is_replaced_never_written_over(tmp_path):
    """A reader of the old file that sees the new one half written; aside files left behind."""
    path, reader = tmp_path / "model.safetensors", tmp_path / "reader"
    write_safetensors({"weight": torch.ones(3)}, path)
    reader.hardlink_to(path)
    write_safetensors({"weight": torch.zeros(3)}, path)
    assert torch.equal(read_safetensors(reader)["weight"], torch.ones(3))
    assert torch.equal(read_safetensors(path)["weight"], torch.zeros(3))
    assert sorted(tmp_path.iterdir()) == [path, reader]


def test_a_new_file_has_the_usual_permissions(tmp_path):
    """A checkpoint that only its writer may read: the temporary file's mode."""
    write_safetensors({"weight": torch.ones(1)}, tmp_path / "model.safetensors")
    (tmp_path / "plain").touch()
    assert (tmp_path / "model.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("content", [b"garbage", None], ids=["garbage", "missing"])
def test_unreadable_safetensors_are_named(content, tmp_path):
    """A traceback of the library's in place of one sentence."""
    path = tmp_path / "model.safetensors"
    if content:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"model\.safetensors cannot be read as safetensors"):
        read_safetensors(path)
