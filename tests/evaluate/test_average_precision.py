"""Mean average precision: the measure itself, an SVM for each class, C chosen without the test set; and the whole command."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.svm import LinearSVC

from xkd_fast.cli import main
from xkd_fast.data.shards import ShardSet
from xkd_fast.errors import UserError
from xkd_fast.evaluate.average_precision import (
    average_precisions,
    evaluate_map,
    evaluate_rows,
    fit_each,
    mean_average_precision,
    notes_on,
    open_samples,
    random_split,
    told_apart,
    train_and_test,
)
from xkd_fast.evaluate.features import load_model
from xkd_fast.evaluate.options import SvmOptions
from xkd_fast.evaluate.protocol import features_of, progress_bar
from xkd_fast.evaluate.samples import Rows, Samples

OPTIONS = SvmOptions(Path("checkpoint"), Path("shards"))


def by_hand(truth: np.ndarray, scores: np.ndarray) -> float:
    """Average precision as it is defined: precision at every score that finds a positive, weighted by the recall it adds."""
    total, positives, found = 0.0, int(truth.sum()), 0
    for threshold in sorted(set(scores.tolist()), reverse=True):
        chosen = scores >= threshold
        hits = int(truth[chosen].sum())
        total += (hits - found) / positives * (hits / int(chosen.sum()))
        found = hits
    return total


def overlapping(samples: int, clips: int, classes: int, noise: float, seed: int = 0) -> Rows:
    """Clips of samples that have any number of classes, each of which moves its own feature."""
    generator = np.random.default_rng(seed)
    labels = generator.random((samples, classes)) < 0.35
    middle = np.pad(labels * 2.0, ((0, 0), (0, 4))) + noise * generator.normal(size=(samples, classes + 4))
    of_sample = np.tile(np.arange(samples), clips)
    values = middle[of_sample] + 0.3 * generator.normal(size=(samples * clips, classes + 4))
    return Rows(values.astype(np.float32), of_sample, labels)


# ------------------------------------------------------------------------------------------------------------- the measure


def test_average_precision_of_a_known_case() -> None:
    """Red if precision is interpolated, ties are broken by order, or scores rank from the wrong end."""
    truth = np.array([[1, 0, 0], [0, 1, 0], [1, 1, 0], [0, 0, 0]], dtype=bool)
    scores = np.array([[0.9, 0.5, 1.0], [0.8, 0.5, 2.0], [0.7, 0.5, 3.0], [0.1, 0.5, 4.0]])
    # first class: found at ranks 1 and 3; second: all tied, so half of everything; third: nobody has it
    assert average_precisions(truth, scores) == [pytest.approx((1 + 2 / 3) / 2), pytest.approx(0.5), None]
    assert mean_average_precision(truth, scores) == pytest.approx((5 / 6 + 1 / 2) / 2)


@given(st.integers(0, 2**32 - 1))
def test_average_precision_is_its_definition(seed: int) -> None:
    """Red if the measure is another one (area by trapezoids, micro average) wherever the known case does not show it."""
    generator = np.random.default_rng(seed)
    truth = generator.random((12, 3)) < 0.4
    scores = generator.integers(0, 6, (12, 3)) / 2.0  # many ties
    for number, value in enumerate(average_precisions(truth, scores)):
        expected = by_hand(truth[:, number], scores[:, number]) if truth[:, number].any() else None
        assert value == (None if expected is None else pytest.approx(expected))


@given(st.integers(2, 60), st.floats(0.05, 0.95), st.integers(0, 5))
def test_a_split_loses_no_sample(count: int, fraction: float, seed: int) -> None:
    """Red if a sample is on both sides or on none, or a side is empty."""
    kept, held_out = random_split(count, fraction, seed)
    assert sorted([*kept.tolist(), *held_out.tolist()]) == list(range(count)) and len(kept) > 0
    assert len(held_out) == min(max(round(count * fraction), 1), count - 1)


# ---------------------------------------------------------------------------------------------------------------- the SVMs


def test_every_class_has_its_own_svm() -> None:
    """Red if classes share one SVM, samples of several classes count for one, or clips are not averaged."""
    train, test = overlapping(40, 3, 4, 0.8), overlapping(30, 2, 4, 0.8, seed=1)
    scores, converged = fit_each(train, 0.1, 0)
    truth, found = scores.of(test)
    assert converged and np.array_equal(truth, test.labels)
    for number in range(4):
        direct = LinearSVC(C=0.1, dual=False, max_iter=5000).fit(train.values, train.labels[train.samples, number])
        decisions = direct.decision_function(test.values)
        means = [decisions[test.samples == sample].mean() for sample in range(30)]
        np.testing.assert_allclose(found[:, number], means, rtol=1e-3, atol=1e-4)


def test_the_same_rows_give_the_same_scores() -> None:
    """Red if the threads that train the SVMs draw from one generator: numbers would differ from run to run."""
    train = overlapping(12, 1, 6, 0.5)
    wide = Rows(np.tile(train.values, (1, 8)), train.samples, train.labels)  # more features than clips
    first, second = (fit_each(wide, 1.0, 0)[0] for _ in range(2))
    assert np.array_equal(first.weights, second.weights) and np.array_equal(first.biases, second.biases)


def test_a_class_that_training_does_not_show_counts_as_a_guess() -> None:
    """Red if such a class stops everything, is left out of the mean, or gets a score that looks like knowledge."""
    train, test = overlapping(40, 2, 3, 0.2), overlapping(40, 2, 3, 0.2, seed=1)
    train.labels[:, 2] = False
    train.labels[:, 1] = True
    result = evaluate_rows(train, test, 3, replace(OPTIONS, svm_c=(0.1,)), "video")
    shares = test.labels.mean(axis=0)
    assert result.average_precision[1:] == [pytest.approx(shares[1]), pytest.approx(shares[2])]
    assert result.average_precision[0] > 0.95
    assert result.map == pytest.approx(np.mean(result.average_precision))
    assert told_apart(train.labels).tolist() == [True, False, False]


def test_c_is_chosen_without_the_test_set() -> None:
    """Red if test labels have a say in C, or in the numbers of the validation."""
    train, test = overlapping(60, 2, 4, 1.5), overlapping(60, 2, 4, 1.5, seed=1)
    honest = evaluate_rows(train, test, 4, OPTIONS, "both")
    best = max(trial.validation_map for trial in honest.sweep)
    assert [trial.c for trial in honest.sweep] == [1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0]
    assert honest.c == min(trial.c for trial in honest.sweep if trial.validation_map == best)
    assert honest.map == next(trial.test_map for trial in honest.sweep if trial.c == honest.c)
    assert honest.best_on_test == max(trial.test_map for trial in honest.sweep)
    for seed in range(3):
        shuffled = replace(test, labels=np.random.default_rng(seed).permutation(test.labels))
        again = evaluate_rows(train, shuffled, 4, OPTIONS, "both")
        assert again.c == honest.c
        assert [trial.validation_map for trial in again.sweep] == [trial.validation_map for trial in honest.sweep]


def test_nothing_to_choose_c_on_is_an_error() -> None:
    """Red if C is picked on classes that the held-out samples do not have."""
    rows = Rows(np.eye(4, dtype=np.float32), np.arange(4), np.eye(4, dtype=bool))
    with pytest.raises(UserError, match=r"C cannot be chosen: no class of shards has training samples on both sides .*--svm-c"):
        evaluate_rows(rows, rows, 4, OPTIONS, "video")


def test_notes_name_the_classes_that_do_not_count() -> None:
    """Red if a reader cannot tell over which classes the mean goes."""
    train, test = np.zeros((4, 12), dtype=bool), np.zeros((4, 12), dtype=bool)
    train[0, :2] = test[0, 1:3] = True
    names = [f"c{number}" for number in range(12)]
    found = notes_on({}, Samples(None, np.arange(4), train), Samples(None, np.arange(4), test), names)
    assert found == [
        "10 of 12 classes have no test sample and are not counted: c0, c3, c4, c5, c6, c7, c8, c9 and 2 more",
        "1 of 12 classes are not told from others by the training samples, and count as a guess does: c2",
    ]


# ---------------------------------------------------------------------------------------------------------- shards to report


def options_for(world: SimpleNamespace, **changes: object) -> SvmOptions:
    return replace(SvmOptions(world.run, world.several, world.others, train_clips=2, test_clips=2, svm_c=(1.0,)), **changes)


def test_labels_of_samples_with_several_classes(world: SimpleNamespace) -> None:
    """Red if a class is lost, or classes of the test shards count into the wrong columns."""
    train, test, classes = train_and_test(options_for(world))
    assert classes == ["ball", "bounce", "collide", "flash", "late"]
    for samples in (train, test):
        for number, row in zip(samples.numbers, samples.labels, strict=True):
            names = samples.shards.details(int(number))["classes"]
            assert {name for name, has in zip(classes, row, strict=True) if has} == set(names)
    assert train.labels.sum(axis=0).tolist() == [4, 2, 2, 2, 3]
    fewer = open_samples(world.two, [*classes, "unused"])[0]  # bounce and flash, numbered otherwise there
    assert fewer.labels.sum(axis=0).tolist() == [0, 4, 0, 4, 0, 0]


def test_the_whole_evaluation_against_another_way_to_the_same_number(world: SimpleNamespace) -> None:
    """Red if features meet the labels of other samples, or the report is of something else than what was asked."""
    options = options_for(world, modalities=("audio",), network="student")
    report = evaluate_map(options)
    trained, (train, test, _) = load_model(world.run), train_and_test(options)
    features = [
        features_of(trained, samples, options, progress_bar(None), "clips", random=samples is train)
        for samples in (train, test)
    ]
    values, found = features[0].of("audio"), features[1].of("audio")
    precisions = []
    for number in range(5):
        classifier = LinearSVC(C=1.0, dual=False, max_iter=5000).fit(values, train.labels[features[0].samples, number])
        decisions = classifier.decision_function(found)
        scores = np.array([decisions[features[1].samples == sample].mean() for sample in test.numbers])
        precisions.append(by_hand(test.labels[:, number], scores))
    np.testing.assert_allclose(report.results["audio"].average_precision, precisions, atol=1e-9)
    assert report.map == {"audio": pytest.approx(np.mean(precisions))}
    assert report.chance == pytest.approx(np.mean([4, 2, 2, 2, 3]) / 6)


def test_command_prints_a_table_and_writes_the_report(
    world: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Red if arguments do not arrive, or the report lacks what is needed to repeat it, or disagrees with the table."""
    arguments = [
        "evaluate",
        "map",
        "--checkpoint",
        str(world.run),
        "--data",
        str(world.several),
        "--test-data",
        str(world.others),
    ]
    arguments += ["--train-clips", "2", "--test-clips", "1", "--svm-c", "0.01,1", "--output", str(tmp_path / "out")]
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    written = json.loads((tmp_path / "out" / "map.json").read_text(encoding="utf-8"))
    assert list(written["map"]) == ["video", "audio", "both"] and str(tmp_path / "out" / "map.json") in shown.replace("\n", "")
    for modality, value in written["map"].items():
        assert f"{100 * value:.1f}" in next(line for line in shown.splitlines() if f"│ {modality} " in line)
        result = written["results"][modality]
        assert result["map"] == value == pytest.approx(np.mean(result["average_precision"]))
        assert [trial["c"] for trial in result["sweep"]] == [0.01, 1.0]
    assert written["samples"] == {"train": 6, "test": 6} and written["settings"]["train_clips"] == 2
    assert written["model"]["step"] == 120 and written["versions"]["scikit-learn"]


def test_a_set_with_one_class_a_sample_can_be_measured_too(world: SimpleNamespace) -> None:
    """Red if only sets with several classes are taken, or a split of one folder leaks samples."""
    train, test, classes = train_and_test(options_for(world, data=world.shards, test_data=None, test_fraction=0.5))
    assert set(train.numbers.tolist()).isdisjoint(test.numbers.tolist()) and classes == world.classes
    assert len(train.numbers) == len(test.numbers) == 6
    shards = ShardSet.open(world.shards)
    for samples in (train, test):
        assert samples.labels.argmax(axis=1).tolist() == shards.labels[samples.numbers].tolist()
    report = evaluate_map(options_for(world, data=world.shards, test_data=None, test_fraction=0.5, modalities=("video",)))
    assert 0 < report.map["video"] <= 1 and report.samples == {"train": 6, "test": 6}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": "nowhere"}, r"nowhere is no shard set"),
        ({"data": "unlabelled"}, r"4 of 4 samples in .* have no label \(the first is .*\)"),
        ({"data": "shards"}, r"holds classes that the training data lacks: ball, late"),
        ({"test_data": "slow"}, r"the shards hold 4 frames/s, but .* was trained on 8"),
        ({"output": __file__}, r"--output .* cannot be made a folder \(File exists\); name another one for map\.json"),
    ],
)
def test_unfit_data_are_named(world: SimpleNamespace, changes: dict[str, str], message: str) -> None:
    """Red if data that cannot answer the question give a traceback, or a number."""
    paths = {name: getattr(world, value, Path(value)) for name, value in changes.items()}
    with pytest.raises(UserError, match=message):
        evaluate_map(options_for(world, **paths))


def test_svm_points_to_map(world: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    """Red if a user of `svm` is not told what measures a set with several classes a sample."""
    assert main(["evaluate", "svm", "--checkpoint", str(world.run), "--data", str(world.several)]) == 2
    assert (
        "several classes, and an SVM tells one from another; measure such a set with `xkd-fast evaluate map`"
        in capsys.readouterr().err
    )
