import sys

import pytest

from benchmarks import bench_calls, report, schema


@pytest.mark.slow
def test_a_quick_run_writes_its_rows(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["bench_calls", "--quick", "--threads", "1", "--output", str(tmp_path / "a.json")])
    bench_calls.main()
    result = schema.load(tmp_path / "a.json")
    assert result["suite"] == "calls"
    found = {}
    for row in result["rows"]:
        assert tuple(row["shape"]) == bench_calls.SHAPE
        found.setdefault(row["subject"], []).append(row["candidate"])
    of_gates = ["steps", "chosen", "checked", "layer", "operator", "recorded"]
    assert found == {name: of_gates for name in ("CFE", "SFE", "CSFE")} | {"MFDF": ["checked", "layer", "recorded"]}

    first, *_, last = report.calls_table(result["rows"]).splitlines()
    assert first == "| layer | " + " | ".join(of_gates) + " |"
    assert last.startswith("| MFDF |  |  | ")
