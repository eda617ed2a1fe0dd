import numpy as np
import pytest
from breakhis.results.intervals import Predictions, bootstrap
from breakhis.results.metrics import auc, balanced_accuracy, image_accuracy
from sklearn.metrics import accuracy_score, balanced_accuracy_score, roc_auc_score


def predictions(targets, patient_ids, seeds: int, classes: int, draw: int) -> Predictions:
    """Draw the predictions of a model that is mostly right; each `draw` gives different ones."""
    logits = np.random.default_rng(draw).normal(size=(seeds, len(targets), classes)) + 0.5 * np.eye(classes)[targets]
    return Predictions(np.array(targets), np.array(patient_ids), np.exp(logits) / np.exp(logits).sum(2, keepdims=True))


# Five patients with different numbers of images; two patients have the second class.
PATIENTS = ["b", "b", "b", "a", "c", "c", "a", "d", "d", "e", "e", "e", "e"]
TARGETS = [1 if patient in "ac" else 0 for patient in PATIENTS]

# The scores by scikit-learn, on a list in which an image may occur several times.
SCORES = {
    image_accuracy: lambda targets, rows: accuracy_score(targets, np.argmax(rows, axis=1)),
    balanced_accuracy: lambda targets, rows: balanced_accuracy_score(targets, np.argmax(rows, axis=1)),
    auc: lambda targets, rows: roc_auc_score(targets, [row[1] for row in rows]),
}


def resample_by_hand(arms, score, resamples, seed):
    """Build the same worlds image by image; return them and the number of worlds that were drawn again."""
    rng, worlds, redrawn = np.random.default_rng(seed), [], 0
    names, seeds = sorted(set(arms[0].patient_ids.tolist())), len(arms[0].probabilities)
    while len(worlds) < resamples:
        chosen = [names[index] for index in rng.integers(len(names), size=len(names))]
        chosen_seeds = rng.integers(seeds, size=seeds)
        if not {"a", "c"} & set(chosen) or not {"b", "d", "e"} & set(chosen):
            redrawn += 1  # it lacks a class
            continue
        world = []
        for arm in arms:
            scores = []
            for s in chosen_seeds:
                images = [i for name in chosen for i, patient in enumerate(arm.patient_ids) if patient == name]
                targets = [int(arm.targets[i]) for i in images]
                scores.append(score(targets, [arm.probabilities[s][i] for i in images]))
            world.append(sum(scores) / seeds)
        worlds.append(world)
    return np.array(worlds), redrawn


@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true", "ignore:A single label was found")
@pytest.mark.parametrize("function", SCORES, ids=lambda function: function.__name__)
@pytest.mark.parametrize("seeds", [1, 3])
def test_each_world_is_the_same_as_by_hand(function, seeds):
    arms = [predictions(TARGETS, PATIENTS, seeds, 2, draw) for draw in range(3)]
    scores, differences = bootstrap(arms, function, resamples=60, seed=5)
    worlds, redrawn = resample_by_hand(arms, SCORES[function], 60, seed=5)
    assert redrawn > 0
    for index, arm in enumerate(arms):
        value = np.mean([SCORES[function](TARGETS, rows) for rows in arm.probabilities])
        quantiles = np.quantile(worlds[:, index], [0.025, 0.975])
        assert scores[index] == pytest.approx((value, *quantiles))
        first = np.mean([SCORES[function](TARGETS, rows) for rows in arms[0].probabilities])
        quantiles = np.quantile(worlds[:, index] - worlds[:, 0], [0.025, 0.975])
        assert differences[index] == pytest.approx((value - first, *quantiles))
    assert scores[1].low < scores[1].value < scores[1].high


def test_an_interval_worked_by_hand():
    """Two patients of one image, one right and one wrong: a quarter of the worlds are right, a quarter wrong."""
    arm = Predictions(np.array([0, 0]), np.array(["a", "b"]), np.array([[[0.9, 0.1], [0.2, 0.8]]]))
    ((value, low, high),), _ = bootstrap([arm], image_accuracy, resamples=400)
    assert (value, low, high) == (0.5, 0, 1)
    # With one patient there is nothing to resample.
    arm = Predictions(np.array([0, 0]), np.array(["a", "a"]), arm.probabilities)
    assert bootstrap([arm], image_accuracy, resamples=50)[0] == [(0.5, 0.5, 0.5)]


def test_an_arm_does_not_differ_from_itself():
    arm, better = (predictions(TARGETS, PATIENTS, 2, 2, draw) for draw in (0, 1))
    scores, differences = bootstrap([arm, arm, better], image_accuracy, resamples=100)
    assert differences[:2] == [(0, 0, 0)] * 2
    assert scores[0] == scores[1]
    assert scores[0].high > scores[0].low  # without pairing, this would become a difference
    assert differences[2].high > differences[2].low


def test_pairing_narrows_the_interval_of_a_small_but_certain_difference():
    """Arms that fail on the same patients, one of them on one image of each patient more."""
    patients = np.repeat(np.arange(20), 5)
    hard = patients % 2 == 0
    right = np.array([~hard, ~hard & (np.arange(100) % 5 > 0)])
    rows = np.where(right[:, :, None], [1.0, 0.0], [0.0, 1.0])
    arms = [Predictions(np.zeros(100, int), patients, rows[arm][None]) for arm in range(2)]
    scores, (_, difference) = bootstrap(arms, image_accuracy, resamples=400)
    assert difference.value == pytest.approx(-0.1)
    assert difference.high < 0
    assert difference.high - difference.low < 0.5 * (scores[0].high - scores[0].low)


def test_seeds_are_resampled():
    """One patient, who is always drawn, and two seeds, one always right and one always wrong."""
    rows = np.array([[[1.0, 0.0]] * 4, [[0.0, 1.0]] * 4])
    arm = Predictions(np.zeros(4, int), np.array(["a"] * 4), rows)
    assert bootstrap([arm], image_accuracy, resamples=100)[0] == [(0.5, 0, 1)]
    for seed, share in enumerate((1, 0)):
        alone = arm._replace(probabilities=rows[seed : seed + 1])
        assert bootstrap([alone], image_accuracy, resamples=100)[0] == [(share, share, share)]


def test_the_same_seed_gives_the_same_interval():
    arms = [predictions(TARGETS, PATIENTS, 2, 2, draw) for draw in range(2)]
    once, again, third = (bootstrap(arms, auc, resamples=50, seed=seed) for seed in (1, 1, 2))
    assert once == again
    assert [score.value for score in once[0]] == [score.value for score in third[0]]
    assert once != third


WORLDS, TRUTH = 200, 0.7


def covered(images_as_patients: bool) -> float:
    """Return the share of simulated studies whose interval contains the truth.

    40 patients have 5 images each. Each patient's images are right with a probability of its own, from a beta
    distribution with mean 0.7, so that they tend to be right or wrong together.
    """
    rng, hits = np.random.default_rng(0), 0
    for world in range(WORLDS):
        share = rng.beta(1.4, 0.6, size=40).repeat(5)
        right = rng.random(200) < share
        patients = np.arange(200) if images_as_patients else np.arange(40).repeat(5)
        rows = np.where(right[:, None], [1.0, 0.0], [0.0, 1.0])
        arm = Predictions(np.zeros(200, int), patients, rows[None])
        ((_, low, high),), _ = bootstrap([arm], image_accuracy, resamples=200, seed=world)
        hits += low <= TRUTH <= high
    return hits / WORLDS


@pytest.mark.slow
def test_intervals_over_patients_contain_the_truth_as_often_as_promised():
    assert 0.86 < covered(images_as_patients=False) < 0.99


@pytest.mark.slow
def test_intervals_over_images_would_not():
    assert covered(images_as_patients=True) < 0.86


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"targets": np.array([1, *TARGETS[1:]][::-1])}, "the same images of the same patients in the same order"),
        ({"patient_ids": np.array(PATIENTS[::-1])}, "the same images of the same patients in the same order"),
        ({"probabilities": np.ones((3, 13, 2))}, "as many seeds as the first, 2, got 3"),
    ],
)
def test_arms_that_cannot_be_compared_are_refused(change, message):
    arm = predictions(TARGETS, PATIENTS, 2, 2, 0)
    with pytest.raises(ValueError, match=message):
        bootstrap([arm, arm._replace(**change)], image_accuracy)


def test_an_area_of_one_class_is_refused_before_it_is_resampled():
    arm = predictions([1] * 13, PATIENTS, 2, 2, 0)
    with pytest.raises(ValueError, match="more than one class"):
        bootstrap([arm, arm], auc)


def test_many_classes_and_absent_ones():
    """The score, and not the resampling, handles classes without images."""
    targets = [0, 0, 3, 3, 3, 5, 5, 0, 0, 3, 3, 5, 5]
    arms = [predictions(targets, PATIENTS, 2, 8, draw) for draw in range(2)]
    for function in (image_accuracy, balanced_accuracy, auc):
        scores, _ = bootstrap(arms, function, resamples=50)
        for arm, score in zip(arms, scores, strict=True):
            assert score.value == pytest.approx(np.mean([function(arm.targets, rows) for rows in arm.probabilities]))
            assert 0 <= score.low <= score.value <= score.high <= 1
