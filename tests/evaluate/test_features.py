"""Features are those of the asked network; checkpoints are found, rebuilt and refused by name."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.evaluate.tiny_run import tiny_config, trained_model, write_checkpoint
from tests.tiny import part_of, random_batch, tiny_options
from xkd_fast.data.plain_clips import ClipBatch
from xkd_fast.errors import UserError
from xkd_fast.evaluate.features import ClipFeatures, extract_features, find_model_file, load_model, normalise
from xkd_fast.model.build import build_model
from xkd_fast.weights import write_safetensors


def batches(clips, size):
    """Random views of a tiny model as the extraction takes them, ``size`` clips at a time."""
    views, masks = random_batch(tiny_options(), clips, dtype=torch.float32)
    numbers = np.arange(clips) // 2
    for start in range(0, clips, size):
        rows = slice(start, start + size)
        yield ClipBatch(part_of(views, masks, rows)[0], numbers[rows], numbers[rows] % 2)


@pytest.mark.parametrize("role", ["teacher", "student"])
def test_features_are_the_mean_of_the_networks_patch_tokens(role):
    """Student for teacher, video for audio, CLS counted in, a masked or local view, or rows out of order."""
    model = trained_model(tiny_config())
    found = extract_features(model, role, ("video", "audio"), batches(5, size=2))
    views, _ = random_batch(tiny_options(), 5, dtype=torch.float32)
    assert found.samples.tolist() == [0, 0, 1, 1, 2]
    for modality, clips in (("video", views.video_global), ("audio", views.audio_global)):
        encoder = getattr(model, f"{modality}_{role}").encoder
        with torch.no_grad():
            tokens, _ = encoder(clips)
        expected = tokens[:, 1:].sum(dim=1) / (tokens.shape[1] - 1)
        assert tokens.shape[1] == 1 + getattr(model.options, modality).tokens
        np.testing.assert_allclose(found.values[modality], expected, rtol=1e-4, atol=1e-5)
        assert found.values[modality].dtype == np.float32


def test_only_the_asked_modality_is_encoded():
    """Audio encoded for a video evaluation: twice the time."""
    model = trained_model(tiny_config())
    model.audio_teacher.encoder = None  # calling it would fail
    assert set(extract_features(model, "teacher", ["video"], batches(2, size=2)).values) == {"video"}


def test_progress_counts_every_clip():
    """A bar that ends early where the last batch is smaller."""
    counts = []
    extract_features(trained_model(tiny_config()), "teacher", ["audio"], batches(5, size=2), progress=counts.append)
    assert counts == [2, 2, 1]


def test_no_clips_are_an_error():
    """Empty arrays that fail far away in the SVM."""
    with pytest.raises(ValueError, match="no clips"):
        extract_features(trained_model(tiny_config()), "teacher", ["video"], iter(()))


def test_both_is_each_modality_normalised_side_by_side():
    """Modalities concatenated at their own scales, or normalised together."""
    video, audio = np.array([[3.0, 4.0], [0.0, 0.0]], np.float32), np.array([[0.0, 200.0], [1.0, 0.0]], np.float32)
    features = ClipFeatures(np.arange(2), {"video": video, "audio": audio})
    np.testing.assert_allclose(features.of("both"), [[0.6, 0.8, 0, 1], [0, 0, 1, 0]], rtol=1e-6)
    assert features.of("video") is video
    assert np.isfinite(normalise(np.zeros((1, 3), np.float32))).all()


def test_a_checkpoint_is_rebuilt_with_its_own_configuration_and_weights(tmp_path):
    """Default options or initial weights in place of the run's."""
    config = tiny_config()
    model = trained_model(config)
    folder = write_checkpoint(tmp_path / "step-00000120", config, model)
    loaded = load_model(folder)
    assert (loaded.step, loaded.config, loaded.model.training) == (120, config, False)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], tensor), name


def test_untrained_is_the_model_its_run_began_with(tmp_path):
    """A baseline of other weights than the run's first, or of the trained ones."""
    config = tiny_config()
    folder = write_checkpoint(tmp_path / "step-00000120", config, trained_model(config))
    loaded = load_model(folder, untrained=True)
    assert loaded.step == 0
    for name, tensor in build_model(config.model, seed=config.seed).state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], tensor), name


def test_file_checkpoint_and_run_all_name_the_newest_model(tmp_path):
    """The oldest of a run's checkpoints, or a half-written one."""
    config = tiny_config()
    model = build_model(config.model, seed=0)
    first = write_checkpoint(tmp_path / "checkpoints" / "step-00000009", config, model)
    newest = write_checkpoint(tmp_path / "checkpoints" / "step-00000120", config, model) / "model.safetensors"
    write_checkpoint(tmp_path / "checkpoints" / "step-00000130.partial", config, model)
    for name in (newest, newest.parent, tmp_path / "checkpoints", tmp_path):
        assert find_model_file(name) == newest
    assert find_model_file(first) == first / "model.safetensors"


def test_unusable_checkpoints_are_named(tmp_path):
    """A traceback, or a model of default options, for a wrong path."""
    with pytest.raises(UserError, match=r"nowhere does not exist; name a whole checkpoint"):
        load_model(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"holds no model\.safetensors; name a whole checkpoint"):
        load_model(tmp_path)
    (tmp_path / "checkpoints" / "step-00000007").mkdir(parents=True)
    with pytest.raises(UserError, match=r"step-00000007 holds no model\.safetensors; .*, or a RUN whose newest one is whole"):
        load_model(tmp_path)
    garbage = tmp_path / "garbage.safetensors"
    garbage.write_bytes(b"garbage")
    with pytest.raises(UserError, match=r"garbage\.safetensors cannot be read as safetensors: .*; name a whole checkpoint"):
        load_model(garbage)
    foreign = tmp_path / "foreign.safetensors"
    write_safetensors({"weight": torch.ones(1)}, foreign)
    with pytest.raises(UserError, match=r"foreign\.safetensors holds no configuration"):
        load_model(foreign)


def test_a_configuration_with_an_option_unknown_now_is_named(tmp_path):
    """A checkpoint of another version, reported under the name of a temporary file."""
    path = tmp_path / "old.safetensors"
    write_safetensors({"weight": torch.ones(1)}, path, {"config": "model:\n  colour: red\n"})
    with pytest.raises(
        UserError, match=r"old\.safetensors was written with other options: configuration: model\.colour"
    ) as caught:
        load_model(path)
    assert "config.yaml" not in str(caught.value)


def test_weights_of_another_geometry_than_the_configuration_are_refused(tmp_path):
    """Weights loaded in part: features of a half-initialised model."""
    config = tiny_config()
    other = build_model(replace(config.model, encoder=replace(config.model.encoder, depth=3)), seed=0)
    folder = write_checkpoint(tmp_path / "step-00000001", config, other)
    with pytest.raises(UserError, match=r"(?s)does not fit the model of its own configuration: .*blocks\.2"):
        load_model(folder)
