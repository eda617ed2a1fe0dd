from functools import partial
from statistics import NormalDist

import numpy as np
import pytest
from breakhis.results.intervals import MIN_CASES, Interval, Predictions, bootstrap, verdict
from breakhis.results.metrics import auc, balanced_accuracy, image_accuracy, patient_recognition_rate
from scipy.stats import norm, t
from sklearn.metrics import accuracy_score, balanced_accuracy_score, roc_auc_score

# Nine cases with different numbers of images; "a" and "c" have the second class, and one of three images of "b".
CASES = [*"bbb", *"a", *"cc", *"a", *"dd", *"eeee", *"f", *"gg", *"hhh", *"i"]
TARGETS = [1, *(int(case in "ac") for case in CASES[1:])]


def predictions(targets, case_ids, seeds: int, classes: int, draw: int) -> Predictions:
    """Draw the predictions of a model that is mostly right; each `draw` gives different ones."""
    logits = np.random.default_rng(draw).normal(size=(seeds, len(targets), classes)) + 0.5 * np.eye(classes)[targets]
    rows = np.exp(logits) / np.exp(logits).sum(2, keepdims=True)
    return Predictions(np.array(targets), np.array(case_ids), rows, np.ones(len(targets)))


def right_or_wrong(right, case_ids, targets=None, weights=None) -> Predictions:
    """Make the predictions of one seed, sure of the right class where `right` says so, and of the other elsewhere."""
    right, targets = np.asarray(right, bool), np.zeros(len(right), int) if targets is None else np.asarray(targets)
    weights = np.ones(len(right)) if weights is None else np.asarray(weights)
    return Predictions(targets, np.asarray(case_ids), np.eye(2)[np.where(right, targets, 1 - targets)][None], weights)


def tail(cases: int) -> float:
    """Return the share below a 95 % interval: Hesterberg (2015), "expanded percentile interval"."""
    return norm.cdf(t.ppf(0.025, cases - 1) * (cases / (cases - 1)) ** 0.5)


# The scores by scikit-learn, on a list in which an image may occur several times.
SCORES = {
    image_accuracy: lambda targets, rows: accuracy_score(targets, np.argmax(rows, axis=1)),
    balanced_accuracy: lambda targets, rows: balanced_accuracy_score(targets, np.argmax(rows, axis=1)),
    auc: lambda targets, rows: roc_auc_score(targets, np.array(rows)[:, 1]) if len(set(targets)) == 2 else None,
}


def resample(case_ids, seeds: int, seed: int, resamples: int):
    """Yield each resample: each image as often as it is drawn, the copies of their cases, and the seeds."""
    rng, names = np.random.default_rng(seed), sorted(set(case_ids))
    for _ in range(resamples):
        chosen = [names[index] for index in rng.integers(len(names), size=len(names))]
        pairs = [(i, copy) for copy, name in enumerate(chosen) for i, case in enumerate(case_ids) if case == name]
        yield [i for i, _ in pairs], [copy for _, copy in pairs], rng.integers(seeds, size=seeds)


def resample_by_hand(arms, score, resamples, seed):
    """Score resamples image by image; return those that have a score, and the share of all that lack a class."""
    table, lacking = [], 0
    for images, _, chosen_seeds in resample(arms[0].case_ids.tolist(), len(arms[0].probabilities), seed, resamples):
        targets = arms[0].targets[images].tolist()
        lacking += set(targets) != {0, 1}
        scores = [[score(targets, arm.probabilities[s][images]) for s in chosen_seeds] for arm in arms]
        if scores[0][0] is not None:
            table.append(np.mean(scores, axis=1))
    return np.array(table), lacking / resamples


@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true", "ignore:A single label was found")
@pytest.mark.parametrize("function", SCORES, ids=lambda function: function.__name__)
@pytest.mark.parametrize("seeds", [1, 3])
def test_each_resample_is_the_same_as_by_hand(function, seeds):
    arms = [predictions(TARGETS, CASES, seeds, 2, draw) for draw in range(3)]
    result = bootstrap(arms, function, resamples=200, seed=5)
    table, lacking = resample_by_hand(arms, SCORES[function], 200, seed=5)
    assert result.lacking == lacking > 0
    assert len(table) == 200 * (1 - lacking if function is auc else 1)  # only an area needs two classes
    values = [np.mean([SCORES[function](TARGETS, rows) for rows in arm.probabilities]) for arm in arms]
    ends = [tail(9), 1 - tail(9)]
    for value, column, score, difference in zip(values, table.T, *result[:2], strict=True):
        assert score == pytest.approx((value, *np.quantile(column, ends)))
        if value != values[0]:
            assert difference == pytest.approx((value - values[0], *np.quantile(column - table[:, 0], ends)))


def test_the_weights_of_patients_make_the_rate_per_patient():
    """Each copy of a case brings its patients anew: case "d" has two, the others have one."""
    patients = ["d1" if index == 7 else case for index, case in enumerate(CASES)]
    arm = predictions(TARGETS, CASES, 1, 2, draw=3)
    arm = arm._replace(weights=np.array([1 / patients.count(patient) for patient in patients]))
    guesses = arm.probabilities[0].argmax(axis=1)
    rates = []
    for images, copies, _ in resample(CASES, 1, seed=0, resamples=200):
        people = [f"{copy} {patients[i]}" for copy, i in zip(copies, images, strict=True)]
        rates.append(patient_recognition_rate(arm.targets[images], guesses[images], people))
    value = patient_recognition_rate(TARGETS, guesses, patients)
    assert value != pytest.approx(image_accuracy(TARGETS, arm.probabilities[0]))
    (interval,) = bootstrap([arm], image_accuracy, resamples=200).scores
    assert interval == pytest.approx((value, *np.quantile(rates, [tail(9), 1 - tail(9)])))


def test_quantiles_of_few_cases_are_moved_out():
    """By a table of t: 2.3646 at 7 degrees of freedom, times the root of 8/7, is 2.528 standard deviations: 0.57 %."""
    assert tail(8) == pytest.approx(0.00574, abs=1e-5)
    assert tail(10_000) == pytest.approx(0.025, abs=1e-4)
    arm = right_or_wrong(np.arange(40) % 5 < np.arange(40) // 5 % 4, np.arange(40) // 5)
    table, _ = resample_by_hand([arm], SCORES[image_accuracy], 2000, seed=0)
    (interval,) = bootstrap([arm], image_accuracy).scores
    assert interval[1:] == pytest.approx(np.quantile(table[:, 0], [0.00574, 0.99426]), abs=1e-3)
    assert interval.low < np.quantile(table, 0.025) < np.quantile(table, 0.975) < interval.high


@pytest.mark.parametrize("function", SCORES, ids=lambda function: function.__name__)
@pytest.mark.parametrize("cases", [1, 2, 5, 7, 8, 9])
def test_fewer_than_eight_cases_have_no_interval(function, cases):
    """Five patients once had a difference of areas of +0.006 [+0.006, +0.006]."""
    targets = np.arange(4 * cases) % 2
    arms = [predictions(targets, np.arange(cases).repeat(4), 3, 2, draw) for draw in (0, 3)]
    scores, differences, lacking, _ = bootstrap(arms, function, resamples=100)
    assert lacking == 0
    for interval in (*scores, differences[1]):
        assert interval[1:] == (None, None) if cases < 8 else interval.low < interval.high
    assert MIN_CASES == 8
    assert differences[1].value == scores[1].value - scores[0].value != 0


@pytest.mark.parametrize("weight", [1, 0.1, 1 / 7])
def test_an_interval_of_no_width_is_none(weight):
    """An arm is right on one image of ten more in each case: all resamples differ by 0.1, but for rounding."""
    cases, place, weights = np.arange(20).repeat(10), np.arange(200) % 10, np.full(200, weight)
    arms = [right_or_wrong(place < 3 + cases % 5 + more, cases, weights=weights) for more in (0, 1)]
    (score, _), (_, difference), *_ = bootstrap(arms, image_accuracy, resamples=100)
    assert score.low < score.high
    assert difference == (pytest.approx(0.1), None, None)
    assert verdict(difference, 0.01) == "undecided"
    same = right_or_wrong(place < 7, cases, weights=weights)
    assert bootstrap([same], image_accuracy, resamples=100).scores == [(pytest.approx(0.7), None, None)]


@pytest.mark.parametrize("cases", [8, 20])
def test_the_share_of_resamples_that_lack_a_class(cases):
    """One case has the second class: a resample lacks it with a chance of (1 - 1/n)^n, and the first hardly ever."""
    arm = right_or_wrong(np.arange(cases) % 2 == 0, np.arange(cases), [1] + [0] * (cases - 1))
    scores, _, lacking, _ = bootstrap([arm], balanced_accuracy, resamples=2000)
    assert lacking == pytest.approx((1 - 1 / cases) ** cases, abs=0.03)  # three standard errors
    # The class present counts alone: all ends are scores of resamples, none was drawn again or given up.
    table, share = resample_by_hand([arm], balanced_accuracy, 2000, seed=0)
    assert (len(table), share) == (2000, lacking)
    assert scores[0][1:] == pytest.approx(np.quantile(table, [tail(cases), 1 - tail(cases)]))


def test_a_class_without_images_is_not_lacking():
    targets = [(0, 3, 5)[index % 3] for index in range(len(CASES))]
    arms = [predictions(targets, CASES, 2, 8, draw) for draw in range(2)]
    for function in (image_accuracy, balanced_accuracy, auc):
        scores, _, lacking, _ = bootstrap(arms, function, resamples=50)
        assert lacking < 0.1
        for arm, score in zip(arms, scores, strict=True):
            assert score.value == pytest.approx(np.mean([function(arm.targets, rows) for rows in arm.probabilities]))
            assert 0 <= score.low <= score.value <= score.high <= 1


def test_an_arm_does_not_differ_from_itself():
    arm, better = (predictions(TARGETS, CASES, 2, 2, draw) for draw in (0, 1))
    scores, differences, *_ = bootstrap([arm, arm, better], image_accuracy, resamples=100)
    assert differences[:2] == [(0, None, None)] * 2
    assert scores[0] == scores[1]
    assert scores[0].high > scores[0].low  # without pairing, this would become a difference
    assert differences[2].high > differences[2].low


def test_pairing_narrows_the_interval_of_a_small_but_certain_difference():
    """Arms that fail on the same cases; one of them also fails on one or two images of each other case."""
    cases, place = np.arange(20).repeat(5), np.arange(100) % 5
    easy = cases % 2 == 1
    arms = [right_or_wrong(right, cases) for right in (easy, easy & (place > cases % 4 // 2))]
    scores, (_, difference), *_ = bootstrap(arms, image_accuracy, resamples=400)
    assert difference.high < 0
    assert difference.high - difference.low < 0.6 * (scores[0].high - scores[0].low)
    assert verdict(difference, 0.01) == "worse"


def test_seeds_are_resampled():
    """All cases are alike, and one of two seeds is always right, the other always wrong."""
    alone = [right_or_wrong(np.full(8, right), np.arange(8)) for right in (True, False)]
    both = alone[0]._replace(probabilities=np.concatenate([arm.probabilities for arm in alone]))
    assert bootstrap([both], image_accuracy, resamples=100).scores == [(0.5, 0, 1)]
    for arm, share in zip(alone, (1, 0), strict=True):
        assert bootstrap([arm], image_accuracy, resamples=100).scores == [(share, None, None)]


def test_the_same_seed_gives_the_same_interval():
    arms = [predictions(TARGETS, CASES, 2, 2, draw) for draw in range(2)]
    once, again, third = (bootstrap(arms, auc, resamples=50, seed=seed) for seed in (1, 1, 2))
    assert once == again != third
    assert [score.value for score in once.scores] == [score.value for score in third.scores]


CHANGES = [
    ({"targets": np.array(TARGETS[::-1])}, "the same images of the same cases in the same order"),
    ({"case_ids": np.array(CASES[::-1])}, "the same images of the same cases in the same order"),
    ({"probabilities": np.ones((3, len(CASES), 2))}, "as many seeds as the first, 2, got 3"),
]


@pytest.mark.parametrize(("change", "message"), CHANGES)
def test_arms_that_cannot_be_compared_are_refused(change, message):
    arm = predictions(TARGETS, CASES, 2, 2, 0)
    with pytest.raises(ValueError, match=message):
        bootstrap([arm, arm._replace(**change)], image_accuracy)


def test_an_area_of_one_class_is_refused():
    arm = predictions([1] * len(CASES), CASES, 2, 2, 0)
    with pytest.raises(ValueError, match="more than one class"):
        bootstrap([arm, arm], auc)


VERDICTS = [
    (-0.01, 0.01, "equal within 0.01"),  # the margin itself still does not matter
    (0.002, 0.009, "equal within 0.01"),  # certain, but too small to matter
    (0.002, 0.011, "better"),
    (-0.011, -0.002, "worse"),
    (0.0, 0.011, "undecided"),  # zero is inside
    (-0.011, 0.0, "undecided"),
    (-0.01, 0.011, "undecided"),
    (None, None, "undecided"),
]


@pytest.mark.parametrize(("low", "high", "words"), VERDICTS)
def test_verdicts(low, high, words):
    assert verdict(Interval(0.004, low, high), 0.01) == words
    assert verdict(Interval(0.0, -0.02, 0.02), 0.025) == "equal within 0.025"


STUDIES = 300
"""Simulated studies. Coverage of 95 % then has a standard error of sqrt(0.95 * 0.05 / 300) = 1.3 %."""


def coverage(draw, score, truth: float, **options) -> float:
    """Return the share of simulated studies whose interval contains the truth; one without an interval does not."""
    rng, hits = np.random.default_rng(0), 0
    for study in range(STUDIES):
        (interval,) = bootstrap([draw(rng)], score, resamples=300, seed=study, **options).scores
        hits += interval.low is not None and interval.low <= truth <= interval.high
    return hits / STUDIES


def draw_hits(rng, cases: int, rare: int = 0, clustered: bool = True) -> Predictions:
    """Draw cases of five images, of which the first `rare` have the second class.

    The images of a case are right with a probability of its own, from a beta distribution with mean 0.7, or 0.6 for the
    second class, so that they tend to be right or wrong together: their correlation is 1 / (1.4 + 0.6 + 1) = 1 / 3.
    """
    ids, a = np.arange(cases).repeat(5), np.where(np.arange(cases) < rare, 1.2, 1.4)
    right = rng.random(5 * cases) < rng.beta(a, 2 - a)[ids]
    return right_or_wrong(right, ids if clustered else np.arange(5 * cases), (ids < rare).astype(int))


def draw_logits(rng, cases: int, rare: int) -> Predictions:
    """Draw cases of five images whose logits have a part that the case shares and one of the image, both normal."""
    ids = np.arange(cases).repeat(5)
    targets = (ids < rare).astype(int)
    logits = 1.5 * targets + rng.normal(size=cases)[ids] + rng.normal(size=5 * cases)
    rows = 1 / (1 + np.exp(np.stack([logits, -logits], axis=1)))
    return Predictions(targets, ids, rows[None], np.ones(5 * cases))


# Three standard errors around 95 % are 91.2 to 98.8 %. Eight cases may miss by 3 % more: shares are skewed, t is not.
@pytest.mark.slow
@pytest.mark.parametrize(("cases", "floor"), [(8, 0.88), (20, 0.912), (80, 0.912)])
def test_intervals_contain_the_truth_as_often_as_promised(cases, floor):
    assert floor < coverage(partial(draw_hits, cases=cases), image_accuracy, 0.7) < 0.988


@pytest.mark.slow
def test_intervals_over_images_would_not():
    """Five images with correlation 1/3 have 2.33 times the variance: 1.96 / 2.33^0.5 standard deviations are 80 %."""
    measured = coverage(partial(draw_hits, cases=80, clustered=False), image_accuracy, 0.7)
    assert measured == pytest.approx(0.80, abs=0.07)  # three standard errors


@pytest.mark.slow
@pytest.mark.parametrize("score", [balanced_accuracy, auc], ids=lambda score: score.__name__)
def test_intervals_with_a_rare_class_contain_the_truth_as_often_as_promised(score):
    """Logits of images of the two classes differ by 1.5 on average, with a variance of 2 for each image."""
    draw, truth = (draw_logits, NormalDist().cdf(1.5 / 2)) if score is auc else (draw_hits, 0.65)
    assert coverage(partial(draw, cases=40, rare=8), score, truth, by_class=True) > 0.912


@pytest.mark.slow
def test_intervals_with_fewer_cases_of_a_class_would_not():
    measured = coverage(partial(draw_logits, cases=20, rare=2), auc, NormalDist().cdf(1.5 / 2))
    assert measured < 0.85


@pytest.mark.parametrize(("rare", "too_few"), [(7, "cases of a class"), (8, None)])
def test_a_score_over_classes_needs_eight_cases_of_each(rare, too_few):
    arm = draw_hits(np.random.default_rng(0), 20, rare)
    comparison = bootstrap([arm], balanced_accuracy, by_class=True, resamples=100)
    assert comparison.too_few == too_few
    assert (comparison.scores[0].low is None) == (too_few is not None)
    assert bootstrap([arm], image_accuracy, resamples=100).too_few is None
