import logging
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from breakhis.data.naming import find_breakhis, parse_name
from breakhis.data.records import Record, patients
from breakhis.data.sources import BREAKHIS
from breakhis.data.splits import LEAK_WARNING, Split, absent_classes, fold_split, leaks, official_split, shared_cases
from breakhis.results.report import log_split
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.model_selection import StratifiedKFold

CLASSES = BREAKHIS.classes


def make_records(subtype: str, slide: str, count: int) -> list[Record]:
    letter = "B" if subtype in ("A", "F", "PT", "TA") else "M"
    return [parse_name(Path(f"SOB_{letter}_{subtype}-14-{slide}-100-{i + 1:03d}.png")) for i in range(count)]


def make_slides(*slides: tuple[str, str, int]) -> list[Record]:
    return [record for slide in slides for record in make_records(*slide)]


def collections(min_slides: int) -> st.SearchStrategy[list[Record]]:
    """Draw images of a few slides; a slide may be filed under two subtypes, as 14-13412 is."""
    slide = st.tuples(
        st.sampled_from(CLASSES["subtype"]), st.sampled_from(["13412", "2523", "22549AB", "22549CD", "7", "8", "9"])
    )
    counts = st.dictionaries(slide, st.integers(1, 9), min_size=min_slides, max_size=14)
    return counts.map(
        lambda table: [record for (kind, name), n in table.items() for record in make_records(kind, name, n)]
    )


# 3 patients of each subtype with 4 images each.
TYPICAL = [
    record
    for kind, subtype in enumerate(CLASSES["subtype"])
    for patient in range(3)
    for record in make_records(subtype, f"{kind}{patient}", 4)
]
KEYS = {  # the groups in the names, read without the code under test
    "patient": lambda name: "-".join(name.split("-")[1:3]),
    "case": lambda name: "-".join(name.split("-")[1:3]).rstrip("ABCDEFGHIJKLMNOPQRSTUVWXYZ"),
    "image": lambda name: name,
}


def rows(split: Split, group_by: str = "patient") -> list[tuple[str, str]]:
    return [(KEYS[group_by](record.path.stem), name) for name, part in split.parts().items() for record in part]


def assert_partition(split: Split, records: list[Record]) -> None:
    placed = [record for part in split.parts().values() for record in part]
    assert sorted(placed, key=str) == sorted(records, key=str)


@pytest.mark.slow
@settings(deadline=None, max_examples=200)
@given(
    records=collections(2),
    task=st.sampled_from(sorted(CLASSES)),
    group_by=st.sampled_from(sorted(KEYS)),
    num_folds=st.integers(2, 6),
    any_fold=st.integers(0, 5),
    seed=st.integers(0, 99),
)
def test_no_group_is_on_two_sides(leak_checker, records, task, group_by, num_folds, any_fold, seed):
    num_groups = len({KEYS[group_by](record.path.stem) for record in records})
    if num_groups < num_folds:
        with pytest.raises(ValueError, match=f"at most the number of {group_by}s, {num_groups}, got {num_folds}"):
            fold_split(records, task, group_by, num_folds, 0, seed)
        return
    fold = any_fold % num_folds
    split = fold_split(records, task, group_by, num_folds, fold, seed)
    assert_partition(split, records)
    assert leak_checker(rows(split, group_by)) == set()
    assert leaks(split, group_by) == []
    assert split.protocol == f"{group_by} protocol{' (patients leak)' * (group_by == 'image')}"
    assert split.fold == f"fold {fold} of {num_folds}"
    assert split.train
    assert split.test
    # Validation takes no class away from training.
    assert absent_classes(split.train, task, CLASSES[task]) == absent_classes(
        split.train + split.val, task, CLASSES[task]
    )
    assert split == fold_split(records, task, group_by, num_folds, fold, seed)


@settings(deadline=None)
@given(
    records=collections(3),
    task=st.sampled_from(sorted(CLASSES)),
    group_by=st.sampled_from(sorted(KEYS)),
    seed=st.integers(0, 99),
)
def test_each_image_is_tested_in_exactly_one_fold(records, task, group_by, seed):
    num_folds = min(3, len({KEYS[group_by](record.path.stem) for record in records}))
    if num_folds < 2:
        return
    splits = [fold_split(records, task, group_by, num_folds, fold, seed) for fold in range(num_folds)]
    assert sorted((record for split in splits for record in split.test), key=str) == sorted(records, key=str)


image_names = st.tuples(
    st.sampled_from(CLASSES["subtype"]),
    st.sampled_from(["13412", "2523", "22549AB", "22549CD", "7"]),
    st.sampled_from([40, 100, 200, 400]),
    st.integers(1, 9),
)
folders = st.sampled_from([".", "400X/benign", "train/malignant", "test/malignant", "BreaKHis_v1/histology_slides"])


@settings(deadline=None, max_examples=50)
@given(files=st.sets(st.tuples(folders, image_names), min_size=4, max_size=30), seed=st.integers(0, 9))
def test_no_patient_of_any_tree_is_on_two_sides(leak_checker, files, seed):
    """The folders may contradict the names, and several folders may hold copies."""
    with TemporaryDirectory() as root:
        for folder, (kind, slide, magnification, sequence) in files:
            letter = "B" if kind in ("A", "F", "PT", "TA") else "M"
            path = Path(root, folder, f"SOB_{letter}_{kind}-14-{slide}-{magnification}-{sequence:03d}.png")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        records = find_breakhis(Path(root)).records
    assert len(records) == len({name for _, name in files})
    if len({KEYS["patient"](record.path.stem) for record in records}) > 1:
        split = fold_split(records, "binary", "patient", num_folds=2, fold=0, seed=seed)
        assert_partition(split, records)
        assert leak_checker(rows(split)) == set()


def test_cases_are_stricter_than_patients():
    records = (
        make_records("A", "22549AB", 4)
        + make_records("A", "22549CD", 4)
        + make_records("DC", "1", 4)
        + make_records("DC", "2", 4)
    )
    apart = [fold_split(records, "binary", "patient", 2, 0, seed) for seed in range(20)]
    assert any(leaks(split, "case") == ["14-22549"] for split in apart)
    together = [fold_split(records, "binary", "case", 2, 0, seed) for seed in range(20)]
    assert all(leaks(split, "case") == [] for split in together)


def test_a_planted_leak_is_noticed_by_the_program_and_by_the_checker(leak_checker):
    split = fold_split(TYPICAL, "binary", "patient", num_folds=3, fold=0, seed=0)
    assert leak_checker(rows(split)) == set()
    moved = split.test[0]
    planted = Split([*split.train, moved], split.val, split.test[1:], split.protocol, split.fold)
    assert leak_checker(rows(planted)) == set(leaks(planted, "patient")) == {moved.patient_id}


def test_a_split_with_a_leak_is_refused(monkeypatch):
    class Careless(StratifiedKFold):
        """A split that ignores patients."""

        def split(self, records, labels, groups):
            return super().split(records, labels)

    monkeypatch.setattr("breakhis.data.splits.StratifiedGroupKFold", Careless)
    with pytest.raises(RuntimeError, match="the split puts patients on two sides: 14-"):
        fold_split(TYPICAL, "binary", "patient", num_folds=3, fold=0, seed=0)


def test_the_image_protocol_leaks_and_says_so(leak_checker, caplog):
    with caplog.at_level(logging.WARNING, logger="breakhis"):
        split = fold_split(TYPICAL, "binary", "image", num_folds=5, fold=0, seed=0)
    assert leak_checker(rows(split))
    assert LEAK_WARNING in caplog.messages
    assert (split.protocol, split.fold) == ("image protocol (patients leak)", "fold 0 of 5")


def test_the_slide_filed_twice_stays_on_one_side():
    twice = make_records("DC", "13412", 5) + make_records("LC", "13412", 5)
    rest = (
        make_records("A", "1", 6) + make_records("F", "2", 6) + make_records("DC", "3", 6) + make_records("LC", "4", 6)
    )
    for fold in range(5):
        split = fold_split(twice + rest, "subtype", "patient", num_folds=5, fold=fold, seed=1)
        sides = [name for name, part in split.parts().items() if any(r.patient_id == "14-13412" for r in part)]
        assert len(sides) == 1


def test_classes_and_shares_are_balanced_if_the_data_allow_it():
    split = fold_split(TYPICAL, "binary", "patient", num_folds=3, fold=1, seed=0)
    assert [len(patients(part)) for part in split.parts().values()] == [13, 3, 8]
    assert sum(record.labels["binary"] == "benign" for record in split.test) == 16
    by_image = fold_split(TYPICAL, "subtype", "image", num_folds=4, fold=0, seed=0)
    assert [len(part) for part in by_image.parts().values()] == [57, 15, 24]
    assert [sum(r.labels["subtype"] == k for r in by_image.test) for k in CLASSES["subtype"]] == [3] * 8


def test_the_seed_moves_patients():
    splits = [fold_split(TYPICAL, "binary", "patient", 3, 0, seed) for seed in range(4)]
    assert len({frozenset(patients(split.test)) for split in splits}) > 1


def test_too_few_patients_and_a_fold_that_does_not_exist_are_refused():
    records = make_records("A", "1", 3) + make_records("DC", "2", 3) + make_records("DC", "3", 3)
    with pytest.raises(ValueError, match="num_folds must be at most the number of patients, 3, got 5; they are 14-1, "):
        fold_split(records, "binary", "patient", num_folds=5, fold=2, seed=0)
    with pytest.raises(ValueError, match="fold must be from 0 to 2, got 4"):
        fold_split(records, "binary", "patient", num_folds=3, fold=4, seed=0)


def test_no_fold_is_empty_even_if_stratifying_would_leave_one_empty(caplog):
    # Found by search: scikit-learn's StratifiedGroupKFold(5) puts no image at all into its first fold here.
    counts = {("A", "2523"): 5, ("A", "22549CD"): 1, ("F", "7"): 1, ("PT", "13412"): 1, ("TA", "2523"): 1}
    counts |= {("DC", "2523"): 1, ("LC", "22549AB"): 1}
    records = [record for (subtype, slide), count in counts.items() for record in make_records(subtype, slide, count)]
    with caplog.at_level(logging.WARNING, logger="breakhis"):
        splits = [fold_split(records, "subtype", "patient", 5, fold, seed=0) for fold in range(5)]
    assert all(split.test for split in splits)
    assert any("too few images to balance the classes over 5 folds" in message for message in caplog.messages)


def write_fold_file(path: Path, sides: dict[str, list[Record]]) -> Path:
    lines = [f"{record.path.name}|100|1|{side}" for side, records in sides.items() for record in records]
    path.write_text("\n".join(lines) + "\n")
    return path


def test_the_official_protocol_follows_the_authors_lists_and_reports_their_leak(tmp_path, caplog, leak_checker):
    ductal, lobular = make_records("DC", "13412", 2), make_records("LC", "13412", 3)
    train = (
        ductal
        + make_records("DC", "1", 4)
        + make_records("A", "2", 4)
        + make_records("A", "3", 4)
        + make_records("DC", "4", 4)
    )
    test, unlisted = lobular + make_records("A", "5", 3), make_records("F", "6", 2)
    lists = write_fold_file(tmp_path / "dsfold1.txt", {"train": train, "test": [*test, *make_records("F", "7", 9)]})
    with caplog.at_level(logging.WARNING, logger="breakhis"):
        split = official_split(train + test + unlisted, "binary", "patient", lists, seed=0)
    assert split.test == test
    assert sorted(split.train + split.val, key=str) == sorted(train, key=str)
    assert split.val
    assert (split.protocol, split.fold) == ("official protocol", "dsfold1")
    assert leak_checker(rows(split)) == {"14-13412"}
    assert "WARNING: dsfold1.txt puts patient 14-13412 into both training and test" in caplog.messages
    assert "WARNING: left out 2 images that dsfold1.txt does not list" in caplog.messages


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("SOB_B_A-14-1-100-001.png|100|1", r"line 1 must be file\|magnification\|fold\|train or test, got 'SOB"),
        ("SOB_B_A-14-1-100-001.png|100|1|val", "line 1 must be"),
        ("a.png|100|1|train\na.png|100|1|test", "line 2 must not put a on both sides"),
        ("a.png|100|1|train", "must list images of the data set for train, got none"),
        ("SOB_B_A-14-1-100-001.png|100|1|train", "must list images of the data set for test, got none"),
    ],
)
def test_a_malformed_list_is_refused(tmp_path, text, message):
    (tmp_path / "dsfold1.txt").write_text(text)
    with pytest.raises(ValueError, match=message):
        official_split(make_records("A", "1", 2), "binary", "patient", tmp_path / "dsfold1.txt", seed=0)


def sisters() -> list[Record]:
    """Make four slides of two cases, and two of others, with an image each of either class."""
    slides = ("22549AB", "22549CD", "1AB", "1CD", "2", "3")
    return [
        parse_name(Path(f"SOB_{kind}-14-{slide}-100-00{number}.png"))
        for number, slide in enumerate(slides, start=1)
        for kind in ("B_A", "M_DC")
    ]


@pytest.mark.parametrize("group_by", ["patient", "case", "image"])
def test_test_images_of_cases_in_training_are_counted(group_by, caplog):
    shared = 0
    for fold in range(3):
        split = fold_split(sisters(), "binary", group_by, num_folds=3, fold=fold, seed=0)
        seen = {record.case_id for record in [*split.train, *split.val]}
        expected = [record for record in split.test if record.case_id in seen]
        assert shared_cases(split) == expected
        shared += len(expected)
        caplog.clear()
        log_split(split, "binary", BREAKHIS.classes["binary"])
        warned = [message for message in caplog.messages if "that training or validation has too" in message]
        count = f"WARNING: {len(expected)} of {len(split.test)} test images"
        assert [message.startswith(count) for message in warned] == [True] * bool(expected)
    assert (shared > 0) == (group_by != "case")
