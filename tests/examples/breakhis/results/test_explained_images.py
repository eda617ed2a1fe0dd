"""Which images are shown, how they are counted, and the rows of `decisions.csv`."""

import numpy as np
from breakhis.results.explained_images import (
    choose_images,
    describe_rows,
    group_name,
    groups,
    label_classes,
    scored_images,
    table_rows,
)


def make_row(name: str, target: str, patient: str, case: str | None = None) -> dict[str, str]:
    return {"file": name, "target": target, "patient": patient} | ({} if case is None else {"case": case})


ROWS = [
    make_row("z/b.png", "DC", "14-1AB", "14-1"),
    make_row("y/c.png", "DC", "14-1CD", "14-1"),
    make_row("x/d.png", "DC", "14-2", "14-2"),
    make_row("w/a.png", "A", "14-3", "14-3"),
]
RUN = {"predictions": ROWS, "classes": ["A", "F", "DC"], "scored_on": "val"}
WITHOUT_CASES = [{key: value for key, value in row.items() if key != "case"} for row in ROWS]


def test_images_are_chosen_by_class_and_then_by_file_name():
    for rows in (ROWS, ROWS[::-1]):  # the order of the table does not matter
        run = RUN | {"predictions": rows}
        assert [row["file"] for row in choose_images(run, 1)] == ["w/a.png", "z/b.png"]
        assert [row["file"] for row in choose_images(run, 2)] == ["w/a.png", "z/b.png", "y/c.png"]
        assert len(choose_images(run, 9)) == 4


def test_scored_images_are_told_by_file_and_target():
    assert scored_images(RUN) == {(row["file"], row["target"]) for row in ROWS[::-1]}


def test_images_are_grouped_by_case_where_it_is_known():
    assert (groups(ROWS), group_name(ROWS)) == (["14-1", "14-1", "14-2", "14-3"], "case")
    assert (groups(WITHOUT_CASES), group_name(WITHOUT_CASES)) == (["14-1AB", "14-1CD", "14-2", "14-3"], "patient")


def test_shown_images_are_counted():
    assert describe_rows(ROWS, RUN) == "4 validation images of 4 patients (3 cases)"
    assert describe_rows(ROWS[:2], RUN) == "2 validation images of 2 patients (1 case), taken from 4"
    assert describe_rows(WITHOUT_CASES, RUN) == "4 validation images of 4 patients"


def test_a_class_without_images_differs_from_one_that_was_left_out():
    assert label_classes(["A", "F", "DC"], ROWS, ROWS[:3]) == [
        "A adenosis: 1 image, none taken",
        "F fibroadenoma: no image",
        "DC ductal carcinoma: n = 3, 2 cases",
    ]
    assert label_classes(["A", "F", "DC"], WITHOUT_CASES, WITHOUT_CASES) == [
        "A adenosis: n = 1, 1 patient",
        "F fibroadenoma: no image",
        "DC ductal carcinoma: n = 3, 3 patients",
    ]


def test_the_table_has_no_rows_of_absent_classes():
    run = RUN | {"variant": "KFDE", "magnification": "40X", "fold": 0, "seed": 1, "device": "cpu"}
    means = np.array([[1.0, 2.0], [np.nan, np.nan], [3.0, 4.0]])
    rows = table_rows(run, "stages.3.mfdf", "branch", ["1 x 1 px", "3 x 3 px"], means, means / 10)
    assert [(row["class"], row["channel_or_branch"], row["mean"], row["sd"]) for row in rows] == [
        ("A", "1 x 1 px", 1, 0.1),
        ("A", "3 x 3 px", 2, 0.2),
        ("DC", "1 x 1 px", 3, 0.3),
        ("DC", "3 x 3 px", 4, 0.4),
    ]
    common = {
        "variant": "KFDE",
        "magnification": "40X",
        "fold": 0,
        "seed": 1,
        "module": "stages.3.mfdf",
        "kind": "branch",
    }
    assert all(common.items() <= row.items() and len(row) == 10 for row in rows)
