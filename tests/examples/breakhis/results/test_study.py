import csv
import json
from functools import partial
from pathlib import Path
from statistics import stdev

import pytest
from breakhis.results import intervals, paper, study
from breakhis.results.intervals import bootstrap
from breakhis.results.study import COMPARED, SCORES, group_runs, write_study
from breakhis.training.flags import PRIMARY_SCORES

from tests.support.runs import BINARY, SUBTYPES, read_rows

# The images of two folds: patient and class. Patients a and c have two images, the others one.
FOLDS = [["a0", "a0", "b1"], ["c0", "c0", "d1", "e1"]]


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch):
    monkeypatch.setattr(study, "bootstrap", partial(bootstrap, resamples=200))
    monkeypatch.setattr(intervals, "MIN_CASES", 2)  # tables of few images can be worked by hand


@pytest.fixture
def write_run(tmp_path):
    """Write a finished run; `right` has a letter for each image of the fold: y if the model is right."""

    def write(variant: str, right: str, fold=0, seed=0, magnification="40X", images=None, **changes) -> Path:
        images = images or FOLDS[fold]
        classes = SUBTYPES if changes.get("task") == "subtype" else BINARY
        folder = tmp_path / "runs" / f"{variant}-{magnification}-fold{fold}-seed{seed}"
        folder.mkdir(parents=True)
        metrics = {"dataset": "breakhis", "synthetic": False, "task": "binary", "scored_on": "test"}
        metrics |= {"protocol_in_words": "patient protocol"}
        metrics |= {"variant": variant, "magnification": magnification, "fold": fold, "seed": seed}
        metrics |= {"classes": classes, "best_epoch": 3, **dict.fromkeys(SCORES, 0.5)}
        metrics |= {"n_images": {"test": len(images)}, "n_patients": {"test": len(set(images))}}
        metrics |= {"n_cases": {"test": len(set(images))}, "n_shared": 0, "flags": {}}
        (folder / "metrics.json").write_text(json.dumps(metrics | changes))
        with (folder / "predictions.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["file", "patient", "case", "target", "prediction", *(f"prob_{name}" for name in classes)])
            for number, (image, letter) in enumerate(zip(images, right, strict=True)):
                target = int(image[1])
                answer = target if letter == "y" else 1 - target
                row = [0.8 if index == answer else 0.2 / (len(classes) - 1) for index in range(len(classes))]
                writer.writerow([f"{number}.png", image[0], f"case {image[0]}", classes[target], classes[answer], *row])
        return folder

    return write


def table(tables: str, start: str) -> list[list[str]]:
    """Return the sentence that starts with `start` as first row, then the header and the rows of its table."""
    blocks = tables.split("\n\n")
    (position,) = [index for index, block in enumerate(blocks) if block.startswith(start)]
    header, _, *rows = blocks[position + 1].splitlines()
    return [[blocks[position]], *([cell.strip() for cell in line.strip("|").split("|")] for line in (header, *rows))]


def two_variants(write_run) -> list[Path]:
    """Write runs of two folds and two seeds. The second variant has one more right image with seed 0 only."""
    return [
        write_run("baseline", "yny", 0, 0, image_accuracy=0.5, auc=0.9),
        write_run("baseline", "nyy", 0, 1, image_accuracy=0.6, auc=None),
        write_run("baseline", "ynyy", 1, 0, image_accuracy=0.8, auc=0.7),
        write_run("baseline", "yynn", 1, 1, image_accuracy=0.7, auc=None),
        write_run("KFDE", "yyy", 0, 0, image_accuracy=0.9),
        write_run("KFDE", "nyy", 0, 1, image_accuracy=0.9),
        write_run("KFDE", "yyyn", 1, 0, image_accuracy=0.9),
        write_run("KFDE", "yynn", 1, 1, image_accuracy=0.9),
    ]


def test_means_deviations_and_differences_worked_by_hand(write_run, tmp_path):
    write_study(tmp_path, two_variants(write_run))
    results = json.loads((tmp_path / "results.json").read_text())
    assert {cell["protocol"] for cell in results["cells"]} == {"patient protocol"}
    assert [results[key] for key in ("dataset", "synthetic", "task")] == [*("breakhis", False, "binary")]
    first, second = results["cells"]
    assert (first["variant"], first["magnification"], first["n_runs"], first["n_cases"]) == ("baseline", "40X", 4, 5)
    assert first["image_accuracy"]["mean"] == pytest.approx(0.65)
    # Squares of -0.15, -0.05, 0.15, 0.05 sum to 0.05, over n - 1 = 3.
    assert first["image_accuracy"]["sd"] == pytest.approx((0.05 / 3) ** 0.5)
    assert first["auc"]["mean"] == pytest.approx(0.8)  # of the two runs that have one
    assert first["auc"]["sd"] == pytest.approx(stdev([0.9, 0.7]))
    assert second["variant"] == "KFDE"
    assert second["image_accuracy"] == {"mean": pytest.approx(0.9), "sd": pytest.approx(0, abs=1e-12)}

    baseline = [row for row in results["intervals"] if row["variant"] == "baseline"]
    assert [row["score"] for row in baseline] == [
        "image_accuracy",
        "patient_recognition_rate",
        "balanced_accuracy",
        "auc",
    ]
    assert not any({"to", "difference", "low", "high"} & row.keys() for row in baseline)
    assert baseline[0]["value"] == pytest.approx((5 / 7 + 4 / 7) / 2)
    assert baseline[0]["value_low"] < baseline[0]["value"] < baseline[0]["value_high"]
    rows = {row["score"]: row for row in results["intervals"] if row["variant"] == "KFDE"}
    assert list(rows) == list(COMPARED)
    for row in rows.values():
        assert (row["variant"], row["to"], row["magnification"]) == ("KFDE", "baseline", "40X")
        assert (row["n_cases"], row["n_seeds"]) == (5, 2)
        assert row["low"] <= row["difference"] <= row["high"]
        assert row["low"] < row["high"]
    # Of 7 images over both folds: seed 0 has 6 right against 5, seed 1 has 4 against 4.
    assert rows["image_accuracy"]["difference"] == pytest.approx((1 / 7 + 0) / 2)
    # Recalls of seed 0: 4/4 and 2/3 against 2/4 and 3/3; those of seed 1 are the same.
    assert rows["balanced_accuracy"]["difference"] == pytest.approx(((4 / 4 + 2 / 3) - (2 / 4 + 3 / 3)) / 2 / 2)
    # Two values of probability only, so that the area is the mean of the recalls.
    assert rows["auc"]["difference"] == pytest.approx(rows["balanced_accuracy"]["difference"])


def test_a_difference_that_is_the_same_in_all_resamples_has_no_interval(write_run, tmp_path):
    """One variant is right on every image and the other on none."""
    folders = [
        write_run(variant, 4 * letter, 1, seed)
        for variant, letter in (("worse", "n"), ("better", "y"))
        for seed in (0, 1)
    ]
    tables = write_study(tmp_path, folders)
    rows = json.loads((tmp_path / "results.json").read_text())["intervals"]
    assert [(row["value"], row["value_low"], row["value_high"]) for row in rows] == 4 * [
        (0, None, None),
        (1, None, None),
    ]
    assert [(row["difference"], row["low"], row["high"]) for row in rows if "to" in row] == 4 * [(1, None, None)]
    cells = [row[3:5] for row in table(tables, "All folds together")[2:]]
    assert cells[:2] == [
        ["0.000 (no interval: the resamples agree)", ""],
        ["1.000 (no interval: the resamples agree)", "+1.000 (no interval: the resamples agree)"],
    ]


def test_few_cases_have_no_interval(write_run, tmp_path, monkeypatch):
    monkeypatch.setattr(intervals, "MIN_CASES", 8)
    tables = write_study(tmp_path, two_variants(write_run))
    cells = [cell for row in table(tables, "All folds together")[2:] for cell in row[3:5] if cell]
    assert cells
    assert all(cell.endswith(" (too few cases for an interval)") for cell in cells)


def test_few_cases_of_a_class_have_no_interval_of_a_score_over_classes(write_run, tmp_path, monkeypatch):
    monkeypatch.setattr(intervals, "MIN_CASES", 3)  # five cases, two of them of the first class
    tables = write_study(tmp_path, two_variants(write_run))
    cells = {row[1]: row[3] for row in table(tables, "All folds together")[2:]}
    for score in ("balanced accuracy", "AUC"):
        assert cells[score].endswith(" (too few cases of a class for an interval)")
    assert "[" in cells["image accuracy"]


def test_a_narrow_interval_is_written_with_more_digits():
    assert study._with_interval(intervals.Interval(0.0062, 0.00611, 0.00629), "+", None) == "+0.0062 [+0.0061, +0.0063]"


def test_the_share_of_resamples_that_lack_a_class_is_printed_where_it_matters(write_run, tmp_path):
    tables = write_study(tmp_path, two_variants(write_run))
    shares = {row[1]: row[5] for row in table(tables, "All folds together")[2:]}
    assert shares["image accuracy"] == shares["patient recognition rate"] == "5 cases, 2 seeds"
    # Three of five cases have the second class, two the first: (2/5)^5 + (3/5)^5 = 0.088 of the resamples lack one.
    share = float(shares["AUC"].removeprefix("5 cases, 2 seeds; ").partition("%")[0])
    assert shares["AUC"] == f"5 cases, 2 seeds; {share:.0f}% of the resamples lack a class"
    assert share == pytest.approx(8.8, abs=6)


def test_patients_weigh_alike_in_their_rate(write_run, tmp_path):
    """Patient a has two images, both wrong, and b one, which is right."""
    write_study(tmp_path, [write_run("KFDE", "nny")])
    values = {row["score"]: row["value"] for row in json.loads((tmp_path / "results.json").read_text())["intervals"]}
    assert values["image_accuracy"] == pytest.approx(1 / 3)
    assert values["patient_recognition_rate"] == pytest.approx(1 / 2)


def test_the_primary_score_alone_gets_a_verdict(write_run, tmp_path):
    flags = {"question": "Does it help?", "primary_score": "image_accuracy", "margin": 0.01}
    folders = [write_run("baseline", "ynyn", 1, flags=flags), write_run("KFDE", "yyyn", 1, flags=flags)]
    tables = write_study(tmp_path, folders)
    assert (
        "The primary score is image accuracy; differences up to 0.01 do not matter."
        in table(tables, "All folds together")[0][0]
    )
    results = json.loads((tmp_path / "results.json").read_text())
    assert {key: results[key] for key in flags} == flags
    verdicts = {
        row[1]: row[4].rpartition(": ")[2] for row in table(tables, "All folds together")[2:] if row[0] == "KFDE"
    }
    assert verdicts["image accuracy"] == "undecided"
    assert "undecided" not in verdicts["AUC"]


def test_the_tables_put_each_number_next_to_its_protocol(write_run, tmp_path):
    tables = write_study(tmp_path, two_variants(write_run))
    assert (tmp_path / "results.md").read_text() == tables + "\n"
    sentence, header, *rows = table(tables, "Image accuracy")
    assert sentence == ["Image accuracy, breakhis, binary; mean ± sd over folds and seeds, n cases that are scored."]
    assert header == ["method", "protocol", "40X"]
    assert rows[:2] == [
        ["baseline", "patient protocol", "0.650 ± 0.129 (n = 5)"],
        ["KFDE", "patient protocol", "0.900 ± 0.000 (n = 5)"],
    ]
    for start in ("Patient recognition rate", "Balanced accuracy", "Macro F1", "AUC", "ECE"):
        _, _, *rows = table(tables, start)
        assert [row[:2] for row in rows] == [["baseline", "patient protocol"], ["KFDE", "patient protocol"]]
    sentence, header, *rows = table(tables, "All folds together")
    assert sentence == [
        "All folds together, breakhis, binary, patient protocol; in brackets 95 % of the bootstrap over cases and "
        "seeds."
    ]
    assert header == ["method", "score", "magnification", "value", "less baseline", "over"]
    assert [row[:3] for row in rows] == [
        [variant, score, "40X"]
        for score in ("image accuracy", "patient recognition rate", "balanced accuracy", "AUC")
        for variant in ("baseline", "KFDE")
    ]
    assert (rows[0][3].split()[0], rows[0][4]) == ("0.643", "")
    assert (rows[1][3].split()[0], rows[1][4].split()[0]) == ("0.714", "+0.071")
    assert rows[1][5] == "5 cases, 2 seeds"


def test_shared_cases_are_counted_for_each_protocol(write_run, tmp_path):
    apart = write_run("apart", "yyy", protocol_in_words="apart")
    leaked = write_run("leaked", "yyy", protocol_in_words="leaked", n_shared=2)
    ends = {
        (apart, leaked): "seeds. 2 of 3 test images of the leaked are of cases that training or validation has too.",
        (leaked,): "seeds. 2 of 3 test images are of cases that training or validation has too.",
        (apart,): "over cases and seeds.",
    }
    for folders, end in ends.items():
        (sentence,), *_ = table(write_study(tmp_path, folders), "All folds together")
        assert sentence.endswith(end)


def test_a_choice_on_validation_has_no_verdicts(write_run, tmp_path):
    flags = {"question": "Which?", "primary_score": "image_accuracy", "margin": 0.01}
    sizes = {f"n_{what}": {"val": 3, "test": 9} for what in ("images", "patients", "cases")}
    for scored_on in ("test", "val"):
        folders = [
            write_run(f"{name} {scored_on}", right, scored_on=scored_on, flags=flags, **sizes)
            for name, right in (("first", "yyy"), ("second", "nnn"))
        ]
        verdict = ": undecided" in write_study(tmp_path, folders)  # with two cases all is undecided
        assert verdict == (scored_on == "test")


def test_the_file_of_runs_has_a_row_for_each(write_run, tmp_path):
    folders = two_variants(write_run)
    write_study(tmp_path, folders)
    rows = read_rows(tmp_path / "results.csv")
    assert list(rows[0]) == [
        *("variant", "magnification", "fold", "seed", *SCORES, "n_images", "n_patients", "n_cases", "best_epoch")
    ]
    assert [(row["variant"], row["fold"], row["seed"]) for row in rows[:3]] == [
        ("baseline", "0", "0"),
        ("baseline", "0", "1"),
        ("baseline", "1", "0"),
    ]
    assert [row["image_accuracy"] for row in rows] == ["0.5", "0.6", "0.8", "0.7", *["0.9"] * 4]
    assert [row["auc"] for row in rows[:2]] == ["0.9", ""]
    assert [(row["n_images"], row["n_patients"]) for row in rows[1:3]] == [("3", "2"), ("4", "3")]
    assert {row["best_epoch"] for row in rows} == {"3"}


def test_variants_and_magnifications_keep_their_order(write_run, tmp_path):
    order = [(variant, power) for variant in ("zeta", "alpha", "mu") for power in ("200X", "40X")]
    tables = write_study(tmp_path, [write_run(variant, "yyy", magnification=power) for variant, power in order])
    _, header, *rows = table(tables, "Image accuracy")
    assert header[2:] == ["200X", "40X"]
    assert [row[0] for row in rows[:3]] == ["zeta", "alpha", "mu"]
    assert {cell for row in rows[:3] for cell in row[2:]} == {"0.500 (n = 2)"}  # of a single run, without deviation
    _, header, *rows = table(tables, "All folds together")
    assert header[4] == "less zeta"
    assert list(dict.fromkeys(row[0] for row in rows)) == ["zeta", "alpha", "mu"]


def test_a_score_that_no_run_has_is_undefined(write_run, tmp_path):
    images = ["a1", "b1", "c1"]
    folders = [write_run(variant, "yny", images=images, auc=None) for variant in ("baseline", "KFDE")]
    tables = write_study(tmp_path, folders)
    assert {row[2] for row in table(tables, "AUC")[2:]} == {"undefined"}
    rows = table(tables, "All folds together")[2:]
    assert [row[1] for row in rows] == [
        *["image accuracy"] * 2,
        *["patient recognition rate"] * 2,
        *["balanced accuracy"] * 2,
    ]
    (cell, _) = json.loads((tmp_path / "results.json").read_text())["cells"]
    assert cell["auc"] == {"mean": None, "sd": None}


def test_a_single_variant_has_no_differences(write_run, tmp_path):
    tables = write_study(tmp_path, [write_run("KFDE", "yyy"), write_run("KFDE", "yyyy", 1)])
    assert {row[4] for row in table(tables, "All folds together")[2:]} == {""}
    rows = json.loads((tmp_path / "results.json").read_text())["intervals"]
    assert [row["value"] for row in rows] == [1, 1, 1, 1]


def test_names_in_the_tables_are_no_markup_and_no_formulas(write_run, tmp_path):
    names = ("=<b>\x1b[31m", "b|c")
    folders = [write_run(name, "ynn") for name in names]
    tables = write_study(tmp_path, folders)
    assert "<" not in tables
    assert "\x1b" not in tables
    assert "| =&lt;b&gt;\\x1b[31m | patient protocol |" in tables
    assert "| b&#124;c | patient protocol |" in tables
    assert [row["variant"] for row in read_rows(tmp_path / "results.csv")] == [f"'{names[0]}", names[1]]


def test_variants_that_predict_different_images_are_refused(write_run, tmp_path):
    folders = [write_run("baseline", "yyy"), write_run("KFDE", "yyyy", 1)]
    with pytest.raises(ValueError, match="arms must predict the same images"):
        write_study(tmp_path, folders)


def test_leaking_patients_are_named_with_the_scores(write_run, tmp_path):
    named = {"protocol_in_words": "image protocol (patients leak)"}
    tables = write_study(tmp_path, [write_run(name, "yyy", **named) for name in ("baseline", "KFDE")])
    _, _, *rows = table(tables, "Image accuracy")
    assert [row[1] for row in rows[:2]] == ["image protocol (patients leak)"] * 2
    assert table(tables, "All folds together")[0][0].startswith(
        "All folds together, breakhis, binary, image protocol (patients leak); "
    )


MAGNIFICATIONS = ["40X", "100X", "200X", "400X"]


def test_the_papers_numbers_come_last_with_their_own_protocol(write_run, tmp_path):
    folders = [write_run("KFDE", "yyy", magnification=power) for power in (*MAGNIFICATIONS, "pooled")]
    _, header, kfde, *rows = table(write_study(tmp_path, folders), "Image accuracy")
    assert header == ["method", "protocol", *MAGNIFICATIONS, "pooled"]
    assert kfde[:2] == ["KFDE", "patient protocol"]
    assert {row[1] for row in rows} == {"paper; split unstated"}
    assert {row[-1] for row in rows} == {"not given"}
    # Tables 1 and 2 of the paper, in percent there.
    assert rows[-1][:-1] == ["KFDE", "paper; split unstated", "0.9974", "0.9956", "0.9960", "0.9788"]
    assert rows[0][:3] == ["VGG-16", "paper; split unstated", "0.8820"]
    assert len(rows) == 8


@pytest.mark.parametrize(
    ("variant", "expected"),
    [
        ("resnet50", {"GLNET": ["0.9001", "0.9232"], "KFDE": ["0.9635", "0.9452"]}),  # Table 2
        ("baseline", {"baseline": ["0.9524", "0.9355"], "CSFE": ["0.9612", "0.9360"]}),  # Table 3, the ablation
    ],
)
def test_the_papers_table_for_the_same_task_is_shown(write_run, tmp_path, variant, expected):
    folders = [write_run(variant, "yyy", task="subtype", magnification=power) for power in ("40X", "100X")]
    _, _, _, *rows = table(write_study(tmp_path, folders), "Image accuracy")
    numbers = {row[0]: row[2:] for row in rows}
    assert {name: numbers[name] for name in expected} == expected
    assert len(rows) == {"resnet50": 8, "baseline": 4}[variant]


@pytest.mark.parametrize("changes", [{"synthetic": True}, {"dataset": "idc"}])
def test_the_papers_numbers_are_left_out_for_other_images(write_run, tmp_path, changes):
    tables = write_study(tmp_path, [write_run(name, "yyy", **changes) for name in ("baseline", "KFDE")])
    assert "paper" not in tables
    source = "synthetic images" if "synthetic" in changes else "idc"
    assert f"Image accuracy, {source}, binary" in tables


def test_the_papers_tables():
    """Compare some cells with a separate transcription of the paper."""
    assert list(paper.MAGNIFICATIONS) == MAGNIFICATIONS
    assert paper.TABLES["binary"]["KFDE"] == (99.74, 99.56, 99.60, 97.88)
    assert paper.TABLES["binary"]["BreastNet"] == (97.99, 97.84, 98.51, 95.88)
    assert paper.TABLES["binary"]["Hybrid CNN-LSTM"][1] == 99.75
    assert paper.TABLES["subtype"]["KFDE"] == (96.35, 94.52, 92.64, 92.67)
    assert paper.TABLES["subtype"]["Hybrid CNN-LSTM"] == (96.50, 92.60, 88.94, 92.51)
    assert paper.TABLES["subtype"]["BHCNET"][3] == 91.15
    assert list(paper.ABLATION.items()) == [
        ("baseline", (95.24, 93.55, 91.55, 90.67)),
        ("CSFE", (96.12, 93.60, 92.11, 91.76)),
        ("MFDF", (95.75, 93.73, 92.23, 92.00)),
        ("KFDE", paper.TABLES["subtype"]["KFDE"]),
    ]
    assert [len(rows) for rows in paper.TABLES.values()] == [8, 8]


def test_runs_are_grouped_in_the_order_of_first_occurrence():
    runs = [{"fold": fold, "seed": seed} for fold, seed in ((2, 0), (0, 1), (2, 1))]
    assert group_runs(runs, "fold") == {(2,): [runs[0], runs[2]], (0,): [runs[1]]}
    assert list(group_runs(runs, "fold", "seed")) == [(2, 0), (0, 1), (2, 1)]


def test_the_scores_with_intervals_are_those_that_a_study_may_choose():
    assert tuple(COMPARED) == PRIMARY_SCORES
