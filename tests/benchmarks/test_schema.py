import copy
import json

import pytest

from benchmarks import schema


def test_a_result_is_valid(make_row, make_result):
    result = make_result(make_row(over={"copy": 3}), make_row(saved_bytes=7), suite="sweep")
    assert schema.validate(result) is result


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["dtype"], "float8", r"result\.dtype: wanted one of .*'bfloat16'.*, got 'float8'"),
        (["rounds"], 2.5, r"result\.rounds: wanted int, got 2\.5"),
        (["seed"], True, r"result\.seed: wanted int, got True"),
        (["machine", "driver"], 5, r"result\.machine\.driver: wanted str, got 5"),
        (["machine", "cores"], 8, r"result\.machine: missing keys \[\], unknown keys \['cores'\]"),
        (["rows"], {}, r"result\.rows: wanted list, got \{\}"),
        (["rows", 0], None, r"result\.rows\[0\]: wanted dict, got None"),
        (["rows", 0, "work"], "backward", r"result\.rows\[0\]\.work: wanted one of"),
        (["rows", 0, "shape", 1], "96", r"result\.rows\[0\]\.shape\[1\]: wanted int, got '96'"),
        (["rows", 0, "ms", 0, "median"], float("nan"), r"result\.rows\[0\]\.ms\[0\]\.median: wanted a finite number"),
        (["rows", 0, "ms", 0, "q1"], 2.5, r"result\.rows\[0\]\.ms: wanted 0 < q1 <= median <= q3"),
        (["rows", 0, "over", "copy"], [], r"result\.rows\[0\]\.over\['copy'\]: wanted 1 repetitions, got 0"),
        (["rows", 0, "over", "copy", 0], {}, r"over\['copy'\]\[0\]: missing keys \['median', 'q1', 'q3'\]"),
    ],
)
def test_a_wrong_value_is_named_with_its_place(make_row, make_result, path, value, message):
    broken = copy.deepcopy(make_result(make_row(over={"copy": 3})))
    *parents, last = path
    parent = broken
    for key in parents:
        parent = parent[key]
    parent[last] = value
    with pytest.raises(ValueError, match=message):
        schema.validate(broken)


def test_a_missing_key_is_named(make_result):
    broken = make_result()
    del broken["seed"]
    with pytest.raises(ValueError, match=r"result: missing keys \['seed'\], unknown keys \[\]"):
        schema.validate(broken)


def test_a_file_that_is_not_a_result_is_named(tmp_path, make_row, make_result):
    (tmp_path / "good.json").write_text(json.dumps(make_result(make_row())))
    (tmp_path / "bad.json").write_text("[]")
    assert schema.load(tmp_path / "good.json")["rows"][0]["subject"] == "CSFE"
    with pytest.raises(ValueError, match=r"bad\.json: result: wanted dict, got \[\]"):
        schema.load(tmp_path / "bad.json")


def test_the_best_repetition_has_the_lowest_median(make_spread):
    assert schema.best([make_spread(3.0), make_spread(2.0), make_spread(4.0)]) == make_spread(2.0)
