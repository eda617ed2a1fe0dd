import json
from pathlib import Path

import pytest
from breakhis.data.naming import parse_name
from breakhis.training.trained_on import describe_training, warn_of


def records(*names):
    return [parse_name(Path(f"SOB_M_DC-14-{name}-001.png")) for name in names]


TRAINED = describe_training(records("22549AB-100", "22549CD-100", "10926-100"), "100X")


def test_a_case_is_recognised_and_not_named():
    assert TRAINED["magnification"] == "100X"
    assert len(TRAINED["cases"]) == 2  # two of the slides are of one case
    assert "22549" not in json.dumps(TRAINED)
    assert warn_of(json.loads(json.dumps(TRAINED)), records("22549G-100", "10926-100", "2523-100")) == [
        "2 images are of cases that the model was trained on: its score of them is too good"
    ]


def test_other_magnifications_are_counted():
    assert warn_of(TRAINED, records("2523-100", "2523-400", "2523-40")) == [
        "2 images have another magnification than the 100X that the model was trained on"
    ]
    pooled = describe_training(records("10926-100"), "pooled")
    assert warn_of(pooled, records("2523-400")) == []


@pytest.mark.parametrize("trained_on", [None, 3, {}, {"cases": 3}, {"magnification": None, "cases": [1, None]}])
def test_a_file_that_does_not_say_so_is_no_error(trained_on):
    assert warn_of(trained_on, records("2523-400")) == []
