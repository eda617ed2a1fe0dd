import logging
from pathlib import Path

import pytest
from breakhis.data import CLASSES, BreakHisImage, parse_name
from breakhis.report import log_split
from breakhis.splits import LEAK_WARNING, Split, absent_classes, image_split, patient_split, patients
from hypothesis import given, settings
from hypothesis import strategies as st


def make(subtype: str, slide: str, count: int) -> list[BreakHisImage]:
    letter = "B" if subtype in ("A", "F", "PT", "TA") else "M"
    return [parse_name(Path(f"SOB_{letter}_{subtype}-14-{slide}-100-{i + 1:03d}.png")) for i in range(count)]


def collections(min_slides: int) -> st.SearchStrategy[list[BreakHisImage]]:
    """Images of a few slides; a slide may be filed under two subtypes, as 14-13412 is."""
    slide = st.tuples(
        st.sampled_from(CLASSES["subtype"]), st.sampled_from(["13412", "2523", "22549AB", "22549CD", "7", "8", "9"])
    )
    counts = st.dictionaries(slide, st.integers(1, 9), min_size=min_slides, max_size=14)
    return counts.map(lambda table: [image for (kind, name), n in table.items() for image in make(kind, name, n)])


# 3 patients of each subtype with 4 images each.
TYPICAL = [
    image
    for kind, subtype in enumerate(CLASSES["subtype"])
    for patient in range(3)
    for image in make(subtype, f"{kind}{patient}", 4)
]


def rows(split: Split) -> list[tuple[str, str]]:
    return [(image.patient_id, name) for name, images in split.parts().items() for image in images]


def assert_partition(split: Split, images: list[BreakHisImage]) -> None:
    placed = [image for part in split.parts().values() for image in part]
    assert sorted(placed, key=str) == sorted(images, key=str)


@settings(deadline=None, max_examples=200)
@given(
    images=collections(2).filter(lambda images: len(patients(images)) > 1),
    task=st.sampled_from(sorted(CLASSES)),
    folds=st.integers(2, 6),
    any_fold=st.integers(0, 5),
    seed=st.integers(0, 99),
)
def test_no_patient_is_on_two_sides(leak_checker, images, task, folds, any_fold, seed):
    many = len(patients(images))
    fold = any_fold % min(folds, many)
    split = patient_split(images, task, folds, fold, seed)
    assert_partition(split, images)
    assert leak_checker(rows(split)) == set()
    assert split.folds == min(folds, many)
    assert split.train
    assert split.test
    # Validation takes no class away from training.
    assert absent_classes(split.train, task) == absent_classes(split.train + split.val, task)
    assert split == patient_split(images, task, folds, fold, seed)


@settings(deadline=None)
@given(images=collections(3), task=st.sampled_from(sorted(CLASSES)), seed=st.integers(0, 99))
def test_each_patient_is_tested_in_exactly_one_fold(images, task, seed):
    folds = min(3, len(patients(images)))
    if folds < 2:
        return
    tested = [image for fold in range(folds) for image in patient_split(images, task, folds, fold, seed).test]
    assert sorted(tested, key=str) == sorted(images, key=str)


@settings(deadline=None)
@given(images=collections(1), task=st.sampled_from(sorted(CLASSES)), seed=st.integers(0, 99))
def test_the_image_protocol_places_each_image_once(images, task, seed):
    if len(images) < 2:
        with pytest.raises(ValueError, match="protocol 'image' needs at least 2 images, got 1"):
            image_split(images, task, seed)
        return
    split = image_split(images, task, seed)
    assert_partition(split, images)
    assert split.train
    assert split.test
    assert split == image_split(images, task, seed)


def test_the_checker_sees_a_planted_leak(leak_checker):
    split = patient_split(TYPICAL, "binary", folds=3, fold=0, seed=0)
    assert leak_checker(rows(split)) == set()
    moved = split.test[0]
    planted = Split([*split.train, moved], split.val, split.test[1:], split.folds)
    assert leak_checker(rows(planted)) == {moved.patient_id}


def test_the_image_protocol_leaks_and_says_so(leak_checker, caplog):
    with caplog.at_level(logging.WARNING, logger="breakhis"):
        split = image_split(TYPICAL, "binary", seed=0)
    assert leak_checker(rows(split))
    assert LEAK_WARNING in caplog.messages
    assert "leaks patients" in LEAK_WARNING


def test_the_slide_filed_twice_stays_on_one_side():
    twice = make("DC", "13412", 5) + make("LC", "13412", 5)
    others = make("A", "1", 6) + make("F", "2", 6) + make("DC", "3", 6) + make("LC", "4", 6)
    for fold in range(5):
        split = patient_split(twice + others, "subtype", folds=5, fold=fold, seed=1)
        sides = [name for name, part in split.parts().items() if any(i.patient_id == "14-13412" for i in part)]
        assert len(sides) == 1


def test_classes_and_shares_are_balanced_where_the_data_allow():
    split = patient_split(TYPICAL, "binary", folds=3, fold=1, seed=0)
    assert [len(patients(part)) for part in split.parts().values()] == [13, 3, 8]
    assert sum(image.label("binary") == "benign" for image in split.test) == 16
    by_image = image_split(TYPICAL, "subtype", seed=0)
    assert [len(part) for part in by_image.parts().values()] == [56, 11, 29]
    assert not any(absent_classes(part, "subtype") for part in by_image.parts().values())


def test_the_seed_moves_patients():
    tests = {frozenset(patients(patient_split(TYPICAL, "binary", 3, 0, seed).test)) for seed in range(4)}
    assert len(tests) > 1


def test_folds_shrink_with_a_warning(caplog):
    images = make("A", "1", 3) + make("DC", "2", 3) + make("DC", "3", 3)
    with caplog.at_level(logging.WARNING, logger="breakhis"):
        split = patient_split(images, "binary", folds=5, fold=2, seed=0)
    assert split.folds == 3
    assert "WARNING: --folds shrinks from 5 to 3, the number of patients" in caplog.messages
    with pytest.raises(ValueError, match="fold must be below the number of folds, 3, got 4"):
        patient_split(images, "binary", folds=5, fold=4, seed=0)


def test_no_fold_is_empty_where_stratifying_would_leave_one_so(caplog):
    # Found by search: scikit-learn's StratifiedGroupKFold(5) puts no image at all into its first fold here.
    counts = {("A", "2523"): 5, ("A", "22549CD"): 1, ("F", "7"): 1, ("PT", "13412"): 1, ("TA", "2523"): 1}
    counts |= {("DC", "2523"): 1, ("LC", "22549AB"): 1}
    images = [image for (subtype, slide), count in counts.items() for image in make(subtype, slide, count)]
    with caplog.at_level(logging.WARNING, logger="breakhis"):
        splits = [patient_split(images, "subtype", folds=5, fold=fold, seed=0) for fold in range(5)]
    assert all(split.test for split in splits)
    assert any("too few images to balance the classes over 5 folds" in message for message in caplog.messages)


def test_one_patient_is_refused_by_name():
    with pytest.raises(ValueError, match=r"needs at least 2 patients, .* got 1: 14-13412"):
        patient_split(make("DC", "13412", 5) + make("LC", "13412", 5), "subtype", 5, 0, 0)


def test_absence_is_said_in_words(caplog):
    images = make("A", "1", 2) + make("DC", "2", 2)
    with caplog.at_level(logging.INFO, logger="breakhis"):
        split = patient_split(images, "binary", folds=2, fold=0, seed=0)
        log_split(split, "binary")
    assert split.val == []
    text = "\n".join(caplog.messages)
    for words in (
        "train: 2 images of 1 patients",
        "WARNING: train has no image of",
        "WARNING: train has one class only: no model can learn to tell classes apart",
        "WARNING: test has one class only: balanced accuracy is its recall",
        "too few patients or images for a validation set, so best = last epoch",
    ):
        assert words in text
