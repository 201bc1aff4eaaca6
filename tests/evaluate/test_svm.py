"""The SVM protocol: splits by sample, scores averaged over clips, C chosen without the test set; and the whole command."""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.svm import LinearSVC

from tests.data.http_server import serving
from tests.evaluate.tiny_run import CLIPS_PER_CLASS
from xkd_fast.cli import main
from xkd_fast.data.plain_clips import clips
from xkd_fast.data.shards import ShardSet
from xkd_fast.errors import UserError
from xkd_fast.evaluate.features import ClipFeatures, load_model
from xkd_fast.evaluate.options import DEFAULT_C, MODALITIES, SvmOptions, add_arguments, parse_c
from xkd_fast.evaluate.protocol import features_of, progress_bar
from xkd_fast.evaluate.samples import Rows, Samples, present_modalities
from xkd_fast.evaluate.svm import (
    FILE,
    evaluate_rows,
    evaluate_svm,
    fit_svm,
    notes_on,
    run,
    sample_scores,
    stratified_split,
    top_k,
    train_and_test,
)

OPTIONS = SvmOptions(Path("checkpoint"), Path("shards"))


def clustered(samples, clips, classes, noise, seed=0):
    """Clips around their sample, samples around their class, labels in no order; clips of the samples interleaved."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, classes, samples)
    centres = np.eye(classes, 12) * 3
    middle = centres[labels] + noise * generator.normal(size=(samples, 12))
    of_sample = np.tile(np.arange(samples), clips)
    values = middle[of_sample] + 0.1 * generator.normal(size=(samples * clips, 12))
    return Rows(values.astype(np.float32), of_sample, labels)


# -------------------------------------------------------------------------------------------------------------- the splits


@given(st.lists(st.integers(0, 4), min_size=1, max_size=40), st.floats(0.05, 0.95), st.integers(0, 5))
def test_a_split_takes_its_share_of_every_class_and_loses_none(labels, fraction, seed):
    """A class that is all training or all test, a sample in both parts or in neither."""
    labels = np.array(labels)
    kept, held_out = stratified_split(labels, fraction, seed)
    assert sorted([*kept, *held_out]) == list(range(len(labels)))
    for label in set(labels.tolist()):
        total, out = (labels == label).sum(), (labels[held_out] == label).sum()
        assert out == (0 if total == 1 else min(max(round(total * fraction), 1), total - 1))


def test_a_split_depends_on_the_seed_alone():
    """Another test set at every call."""
    labels = np.arange(100) % 5
    first, again, other = (stratified_split(labels, 0.25, seed)[1] for seed in (1, 1, 2))
    assert first.tolist() == again.tolist() != other.tolist()
    assert len(first) == 25


def test_rows_of_some_samples_hold_all_their_clips_and_no_others():
    """Clips of one sample on both sides of a split."""
    rows = clustered(samples=10, clips=3, classes=2, noise=1.0)
    kept, held_out = stratified_split(rows.labels, 0.3, 0)
    parts = [rows.only(kept), rows.only(held_out)]
    assert set(parts[0].samples.tolist()).isdisjoint(parts[1].samples.tolist())
    assert sum(len(part.values) for part in parts) == 30
    for part in parts:
        np.testing.assert_array_equal(np.bincount(part.samples)[np.unique(part.samples)], 3)


def test_samples_that_are_recognised_but_not_understood_score_at_chance():
    """A leak: random labels with clips that give their sample away are learnt by heart if clips are split, not samples."""
    generator = np.random.default_rng(0)
    labels = generator.permutation(np.arange(120) % 4)
    of_sample = np.tile(np.arange(120), 5)
    values = generator.normal(size=(120, 200))[of_sample] + 0.01 * generator.normal(size=(600, 200))
    everything = Rows(values.astype(np.float32), of_sample, labels)
    kept, held_out = stratified_split(labels, 0.25, 0)
    result = evaluate_rows(everything.only(kept), everything.only(held_out), 4, OPTIONS, "video")
    assert result.top1 < 0.5 and max(row.validation_top1 for row in result.sweep) < 0.5
    classifier, _ = fit_svm(everything.only(kept), 1.0, 0)
    assert classifier.score(everything.only(kept).values, labels[everything.only(kept).samples]) == 1.0  # they can be learnt


# -------------------------------------------------------------------------------------------------------------- the scores


def test_scores_are_averaged_over_the_clips_of_each_sample():
    """A majority vote, an average over all samples, or clips attributed by their order."""
    classifier = LinearSVC(random_state=0).fit(np.eye(3), [0, 1, 2])
    classifier.coef_, classifier.intercept_ = np.eye(3), np.zeros(3)
    # sample 4: two clips lean to class 0 by little, one to class 1 by much; sample 2 lies between them
    values = np.array([[1.0, 0.9, 0], [0, 0, 7], [1.0, 0.9, 0], [0, 0, 5], [0, 8, 0]], np.float32)
    rows = Rows(values, np.array([4, 2, 4, 2, 4]), np.array([0, 0, 2, 0, 1]))
    found, scores = sample_scores(classifier, rows)
    assert found.tolist() == [2, 4]
    np.testing.assert_allclose(scores, [[0, 0, 6], [2 / 3, 9.8 / 3, 0]], rtol=1e-6)


def test_two_classes_have_two_scores():
    """scikit-learn's single score of a two-class SVM taken for the score of the first class."""
    rows = clustered(samples=20, clips=2, classes=2, noise=0.1)
    classifier, converged = fit_svm(rows, 1.0, 0)
    found, scores = sample_scores(classifier, rows)
    assert scores.shape == (20, 2) and converged
    np.testing.assert_array_equal(classifier.classes_[scores.argmax(axis=1)], rows.labels[found])


def test_top_k_counts_the_k_best():
    """An off-by-one in k, or the worst in place of the best."""
    ranked = np.array([[2, 0, 1], [1, 2, 0], [0, 1, 2]])
    truth = np.array([2, 2, 2])
    assert [top_k(truth, ranked, k) for k in (1, 2, 3)] == [1 / 3, 2 / 3, 1.0]


def test_clips_find_their_samples_whatever_order_they_come_in():
    """Labels paired with clips by position, where a pipeline hands them out of order or samples are a subset."""
    samples = Samples(shards=None, numbers=np.array([30, 10, 20]), labels=np.array([3, 1, 2]))
    features = ClipFeatures(np.array([10, 20, 30, 20]), {"audio": np.zeros((4, 2), np.float32)})
    rows = Rows.of(features, "audio", samples)
    assert rows.labels[rows.samples].tolist() == [1, 2, 3, 2]


# --------------------------------------------------------------------------------------------------------------- the sweep


def test_separable_classes_are_told_apart_and_counted():
    """Accuracies and confusion that disagree, or columns and rows of the confusion swapped."""
    result = evaluate_rows(clustered(80, 3, 7, noise=0.7), clustered(60, 2, 7, noise=0.7, seed=1), 7, OPTIONS, "video")
    confusion = np.array(result.confusion)
    truth = clustered(60, 2, 7, noise=0.7, seed=1).labels
    np.testing.assert_array_equal(confusion.sum(axis=1), np.bincount(truth, minlength=7))
    assert confusion.trace() / 60 == pytest.approx(result.top1)
    assert 1 / 7 < 0.6 < result.top1 <= result.top5 <= 1
    assert [row.c for row in result.sweep] == list(DEFAULT_C["video"])


def test_c_is_chosen_without_a_look_at_the_test_set():
    """The best C on the test set reported as the result."""
    train, test = clustered(60, 2, 4, noise=2.0), clustered(40, 2, 4, noise=2.0, seed=1)
    honest = evaluate_rows(train, test, 4, OPTIONS, "both")
    best = max(row.validation_top1 for row in honest.sweep)
    assert honest.c == min(row.c for row in honest.sweep if row.validation_top1 == best)
    assert honest.top1 == next(row.test_top1 for row in honest.sweep if row.c == honest.c)
    assert honest.best_on_test == max(row.test_top1 for row in honest.sweep) >= honest.top1
    for seed in range(5):
        shuffled = replace(test, labels=np.random.default_rng(seed).permutation(test.labels))
        again = evaluate_rows(train, shuffled, 4, OPTIONS, "both")
        assert again.c == honest.c
        assert [row.validation_top1 for row in again.sweep] == [row.validation_top1 for row in honest.sweep]


def test_the_svm_that_is_tested_has_seen_all_training_samples():
    """The SVM of the validation split tested: a fifth of the data thrown away."""
    train, test = clustered(60, 2, 4, noise=1.5), clustered(40, 2, 4, noise=1.5, seed=1)
    result = evaluate_rows(train, test, 4, OPTIONS, "video")
    for row in result.sweep:
        direct = LinearSVC(C=row.c, dual="auto", max_iter=5000, random_state=0).fit(train.values, train.labels[train.samples])
        scores = direct.decision_function(test.values)
        averaged = np.array([scores[test.samples == sample].mean(axis=0) for sample in range(40)])
        assert row.test_top1 == (averaged.argmax(axis=1) == test.labels).mean()


def test_one_c_needs_no_validation():
    """Samples held out for a choice that there is not; top-5 of four classes, which is always 1."""
    rows = clustered(20, 2, 4, noise=0.5)
    result = evaluate_rows(rows, rows, 4, replace(OPTIONS, svm_c=(0.1,)), "audio")
    assert (result.c, result.sweep[0].validation_top1, result.top5) == (0.1, None, None)


def test_classes_of_one_sample_are_trained_on_and_noted():
    """A class of one sample that vanishes or stops everything."""
    rows = clustered(30, 2, 3, noise=0.2)
    labels = np.append(rows.labels, 3)
    alone = np.full((2, 12), -5, np.float32)
    rows = Rows(np.concatenate([rows.values, alone]), np.append(rows.samples, [30, 30]), labels)
    result = evaluate_rows(rows, rows, 4, OPTIONS, "video")
    assert result.confusion[3] == [0, 0, 0, 1]
    samples = Samples(shards=None, numbers=np.arange(31), labels=labels)
    assert notes_on({}, samples, ["a", "b", "c", "d"]) == ["classes with one training sample, so with none to choose C on: d"]


def test_nothing_to_choose_c_on_is_an_error():
    """A C picked on no samples at all."""
    rows = Rows(np.eye(3, dtype=np.float32), np.arange(3), np.arange(3))
    with pytest.raises(UserError, match=r"C cannot be chosen: no class of shards has a second training sample .*--svm-c"):
        evaluate_rows(rows, rows, 3, OPTIONS, "video")


def test_the_default_sweeps_are_those_of_the_text():
    """XKD.md section 10: video 1e-3 … 1, audio from 1e-5, both their union."""
    assert OPTIONS.c_values("video") == (1e-3, 1e-2, 1e-1, 1.0)
    assert OPTIONS.c_values("audio") == OPTIONS.c_values("both") == (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
    assert replace(OPTIONS, svm_c=(1.0, 0.1, 1.0)).c_values("video") == (0.1, 1.0)


# ------------------------------------------------------------------------------------------------------------- wrong input


@pytest.mark.parametrize("text", ["", "1,,2", "big", "1e-3;1", "0.1, x"])
def test_a_malformed_list_of_c_is_named(text):
    """A traceback of float() for a typing error."""
    with pytest.raises(UserError, match=r"--svm-c .*must be numbers separated by commas"):
        parse_c(text)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"svm_c": (0.0, 1.0)}, r"--svm-c 0,1 must be finite numbers above 0, such as"),
        ({"svm_c": (float("nan"),)}, r"--svm-c nan must be finite numbers above 0"),
        ({"network": "both"}, r"--network both must be one of teacher, student"),
        ({"modalities": ("video", "sound")}, r"--modalities video,sound must name some of video, audio, both"),
        ({"modalities": ("",)}, r"--modalities '' must name some of video, audio, both"),
        ({"train_clips": 0}, r"--train-clips 0 must be 1 or more"),
        ({"test_fraction": 1.0}, r"--test-fraction 1\.0 must lie between 0 and 1"),
        ({"seed": -1}, r"--seed -1 must lie in 0-"),
        ({"test_data": Path("somewhere/../shards")}, r"--test-data .* is the same folder as --data"),
    ],
)
def test_wrong_options_are_named(changes, message):
    """A wrong value that surfaces as a traceback, or as a number that means nothing."""
    with pytest.raises(UserError, match=message):
        replace(OPTIONS, **changes)


def parse(*arguments):
    parser = argparse.ArgumentParser()
    add_arguments(parser, FILE)
    return parser.parse_args(arguments)


def test_every_option_has_an_argument_with_its_default():
    """An option that the command line cannot set, or sets to another default."""
    args = parse("--checkpoint", "checkpoint", "--data", "shards")
    assert vars(args).keys() == OPTIONS.__dataclass_fields__.keys()
    for name in OPTIONS.__dataclass_fields__:
        if name != "modalities":
            assert getattr(args, name) == getattr(OPTIONS, name), name
    assert tuple(args.modalities.split(",")) == OPTIONS.modalities


# ---------------------------------------------------------------------------------------------------------- shards to report


def options_for(world, **changes):
    return replace(SvmOptions(world.run, world.shards, train_clips=2, test_clips=2, svm_c=(0.01, 1.0)), **changes)


@pytest.mark.parametrize("role", ["teacher", "student"])
def test_every_sample_is_described_by_its_own_clips(world, role):
    """Features paired with the neighbour's label, clips left out, random clips for uniform ones, or another network's."""
    options, trained = options_for(world, network=role, test_clips=3, batch=5), load_model(world.run)
    train, test, _ = train_and_test(options)
    assert sorted([*train.numbers, *test.numbers]) == list(range(3 * CLIPS_PER_CLASS))
    found = features_of(trained, test, options, progress_bar(None), "test clips", random=False)
    config, shards = trained.config, ShardSet.open(world.shards)
    sizes = (config.model, config.mel, config.data)
    for sample, label in zip(test.numbers, test.labels, strict=True):
        own = next(clips(shards, *sizes, per_sample=3, batch_size=3, samples=[sample]))
        direct = getattr(trained.model, f"audio_{role}").features(own.views.audio_global).detach()
        np.testing.assert_allclose(found.of("audio")[found.samples == sample], direct, rtol=1e-4, atol=1e-5)
        assert label == shards.labels[sample]
    assert len(found.samples) == 3 * len(test.numbers)


def test_a_split_folder_tests_samples_it_was_not_trained_on(world):
    """A sample on both sides; a class without a test sample."""
    train, test, classes = train_and_test(options_for(world, test_fraction=0.5))
    assert set(train.numbers.tolist()).isdisjoint(test.numbers.tolist())
    assert np.bincount(train.labels).tolist() == np.bincount(test.labels).tolist() == [2, 2, 2]
    assert classes == world.classes


def test_labels_of_test_shards_are_matched_by_class_name(world):
    """Class 1 of one folder taken for class 1 of another that holds fewer classes."""
    report = evaluate_svm(options_for(world, test_data=world.two, modalities=("audio",)))
    assert np.array(report.results["audio"].confusion).sum(axis=1).tolist() == [CLIPS_PER_CLASS, 0, CLIPS_PER_CLASS]
    assert report.classes == world.classes
    assert report.samples == {"train": 3 * CLIPS_PER_CLASS, "test": 2 * CLIPS_PER_CLASS}
    assert report.chance == pytest.approx(1 / 3)


def test_the_same_evaluation_gives_the_same_numbers(world):
    """Clips, splits or solver that draw anew each time."""
    first, second = (evaluate_svm(options_for(world)) for _ in range(2))
    assert first.results == second.results


def test_command_prints_a_table_and_writes_the_report(world, tmp_path, capsys):
    """A report that lacks what is needed to repeat it, or disagrees with the table; arguments that do not arrive."""
    arguments = ["--checkpoint", str(world.run), "--data", str(world.shards), "--network", "student", "--svm-c", "0.01,1"]
    arguments += ["--train-clips", "2", "--test-clips", "1", "--modalities", "both,video", "--output", str(tmp_path / "out")]
    assert run(parse(*arguments)) == 0
    shown = capsys.readouterr().out
    written = json.loads((tmp_path / "out" / "svm.json").read_text(encoding="utf-8"))
    assert list(written["top1"]) == ["both", "video"]
    for modality, top1 in written["top1"].items():
        assert f"{100 * top1:.1f}" in next(line for line in shown.splitlines() if f"│ {modality} " in line)
        assert written["results"][modality]["top1"] == top1
        assert [row["c"] for row in written["results"][modality]["sweep"]] == [0.01, 1.0]
    assert written["settings"]["network"] == "student" and written["settings"]["train_clips"] == 2
    assert written["model"]["step"] == 120 and written["model"]["file"].endswith("step-00000120/model.safetensors")
    assert written["versions"]["scikit-learn"] and written["classes"] == world.classes
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["svm.json"]


def test_untrained_is_another_model_and_says_so(world):
    """A baseline that is the trained model after all."""
    options = options_for(world)
    test = train_and_test(options)[1]
    trained, untrained = (
        features_of(load_model(world.run, untrained=flag), test, options, progress_bar(None), "clips", random=False)
        for flag in (False, True)
    )
    assert not np.allclose(trained.of("video"), untrained.of("video"), atol=1e-2)
    report = evaluate_svm(options_for(world, untrained=True, modalities=("video",)))
    assert (report.model["step"], report.settings["untrained"]) == (0, True)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"data": "nowhere"}, r"nowhere is no shard set"),
        ({"data": "unlabelled"}, r"4 of 4 samples in .* have no label \(the first is .*\); .* folders named by class"),
        ({"data": "two", "test_data": "shards"}, r"holds classes that the training data lacks: collide"),
        ({"data": "slow"}, r"the shards hold 4 frames/s, but .* was trained on 8; prepare them again with --fps 8"),
        ({"output": __file__}, r"--output .*test_svm\.py cannot be made a folder \(File exists\); name another one"),
        ({"test_data": "slow"}, r"the shards hold 4 frames/s, but .* was trained on 8"),
    ],
)
def test_unfit_data_are_named(world, changes, message):
    """A traceback, or worse a number, from data that cannot answer the question."""
    paths = {name: getattr(world, value, Path(value)) for name, value in changes.items()}
    with pytest.raises(UserError, match=message):
        evaluate_svm(options_for(world, **paths))


def test_shards_behind_an_address(world: SimpleNamespace, tmp_path: Path) -> None:
    """Red if evaluation wants a folder, or gets other features over the network than from one."""
    given = ["evaluate", "svm", "--checkpoint", str(world.run), "--svm-c", "0.1", "--modalities", "video", "--output"]
    with serving(world.shards.parent) as server:
        remote = [*given, str(tmp_path / "remote"), "--data", f"{server.url}/{world.shards.name}"]
        assert main([*remote, "--test-data", f"{server.url}/{world.two.name}"]) == 0
        assert main([*remote, "--test-data", f"{server.url}/{world.shards.name}/"]) == 2
    local = [*given, str(tmp_path / "local"), "--data", str(world.shards), "--test-data", str(world.two)]
    assert main(local) == 0
    reports = [json.loads((tmp_path / name / "svm.json").read_text()) for name in ("remote", "local")]
    assert reports[0]["results"] == reports[1]["results"]


@pytest.mark.parametrize(
    ("audio", "video", "asked", "sentence"),
    [
        ([1, 0], [1, 1], MODALITIES, "audio and both together cannot be evaluated, because 1 of 4 samples has no sound"),
        ([0, 0], [1, 0], MODALITIES, "video, audio and both together cannot be evaluated, because 2 of 4 samples have no sound "
         "and 1 of 4 samples has no picture; ask for others with --modalities"),
        ([1, 1], [0, 0], ("video",), "video cannot be evaluated, because 2 of 4 samples have no picture; ask for others"),
    ],
)  # fmt: skip
def test_modalities_that_are_left_out_are_told_in_a_sentence(
    audio: list[int], video: list[int], asked: tuple[str, ...], sentence: str
) -> None:
    """Red if a reader has to guess what was left out, or why, from words that do not go together."""
    shards = SimpleNamespace(has_audio=np.array([*audio, 1, 1], bool), has_video=np.array([*video, 1, 1], bool))
    sides = [Samples(shards, np.array(numbers), np.zeros(2)) for numbers in ([0, 1], [2, 3])]
    if "; ask" in sentence:
        with pytest.raises(UserError, match=f"^{sentence}"):
            present_modalities(asked, *sides)
    else:
        assert present_modalities(asked, *sides) == (("video",), [sentence])
