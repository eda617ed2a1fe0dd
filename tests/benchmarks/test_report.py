import json
import re
import sys
from xml.etree import ElementTree

import pytest

from benchmarks import report, targets


def lines(table):
    """The cells of a Markdown table below its header."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]


@pytest.fixture
def layers(make_row, make_result):
    return make_result(
        make_row(over={"textbook": 0.25, "copy": 9}),
        make_row(over={"textbook": 1.25, "copy": 9}, work="forward+backward", saved_bytes=1050),
        make_row("floor", "copy", {"copy": 1}, work="forward+backward"),
        make_row("peer", "SE", {"copy": 3}, work="forward+backward"),
        failures=["SFE fused is WRONG"],
        skipped=["CFE fused cannot run"],
    )


@pytest.fixture
def models(make_row, make_result):
    size = {"work": "training", "shape": [8, 3, 224, 224]}
    return make_result(
        make_row("tiny", "kfde", {"backbone": 1.25}, peak_bytes=3 * 2**20, **size),
        make_row("tiny", "backbone", {"backbone": 1}, peak_bytes=2 * 2**20, **size),
        suite="models",
    )


@pytest.fixture
def sweep(make_row, make_result):
    shapes = [[8, 64, 7, 7], [8, 64, 14, 14], [8, 128, 7, 7], [4, 64, 7, 7]]
    kinds = [("CSFE", "auto"), ("CSFE", "textbook"), ("floor", "copy")]
    works = ("forward", "forward+backward")
    return make_result(
        *(make_row(*kind, {"copy": 1}, shape=shape, work=work) for shape in shapes for work in works for kind in kinds),
        suite="sweep",
    )


def test_losses_are_marked(layers, models):
    assert lines(report.summary(layers["rows"])) == [["CSFE", "(8, 96, 56, 56)", "0.25", "1.25 loss"]]
    assert lines(report.models_table(models["rows"]))[0][-2] == "1.25 loss"
    printed = [report.row_line(row) for row in (*layers["rows"], *models["rows"])]
    assert [line.count("loss") for line in printed] == [0, 1, 0, 0, 1, 0]


def test_a_grid_says_where_auto_is_wrong(make_row, make_result, make_spread):
    shapes = [[1, 8, side, side] for side in (1, 2, 3)]
    rows = [
        make_row("SFE", candidate, {"textbook": ratio}, shape=shape, ms=[make_spread(ms)])
        for shape, ratio, auto in zip(shapes, (0.5, 1.02, 1.25), (2.0, 1.0, 1.0), strict=True)
        for candidate, ms in (("auto", auto), ("reference", 1.5))
    ]
    assert lines(report.grid_table(rows)) == [["SFE", "forward", "3", "1.02", "1.25", "1.00", "1.33"]]
    assert lines(report.losses_table(rows)) == [["SFE", "forward", "(1, 8, 3, 3)", "contiguous", "1.25 loss"]]
    grid = make_result(*rows, suite="grid")
    assert "| (1, 8, 3, 3) | contiguous | 1.25 loss |" in report.page([grid])
    worst = verdict([grid], "SFE / textbook, any map")
    assert (worst.measured, worst.where, worst.word) == (1.25, "(1, 8, 3, 3) contiguous forward, float32", "MISSED")
    assert verdict([grid], "SFE / the faster implementation").measured == pytest.approx(4 / 3)


def test_only_this_package_can_lose_and_never_to_a_copy(make_row):
    assert report.ratio(make_row("CSFE", "textbook", {"textbook compiled": 3}), "textbook compiled") == "3.00"
    assert report.ratio(make_row("CSFE", "auto compiled", {"textbook compiled": 3}), "textbook compiled") == "3.00 loss"
    assert report.ratio(make_row(over={"copy": 3}), "copy") == "3.00"
    assert report.ratio(make_row(), "textbook") == ""


def test_every_row_is_in_its_table(layers):
    (first, rows), (second, rows_with_backward) = report.pieces_of_work(layers["rows"])
    assert (first, second) == tuple(f"(8, 96, 56, 56), contiguous, {work}" for work in ("forward", "forward+backward"))
    assert lines(report.layers_table(rows)) == [["CSFE", "auto", "2 (1.8-2.2)", "0.25", "9.00", "0.50", ""]]
    assert lines(report.layers_table(rows_with_backward)) == [
        ["CSFE", "auto", "2 (1.8-2.2)", "1.25 loss", "9.00", "0.50", "1.05"],
        ["floor", "copy", "2 (1.8-2.2)", "", "1.00", "0.50", ""],
        ["peer", "SE", "2 (1.8-2.2)", "", "3.00", "0.50", ""],
    ]


def test_a_model_s_row_counts_images(models):
    kfde_line, _ = lines(report.models_table(models["rows"]))
    assert kfde_line == ["tiny", "kfde", "2 (1.8-2.2)", "4000.0", "1.25 loss", "3"]


def test_the_page_says_how_it_was_measured_and_what_is_missing(layers, models, sweep):
    page = report.page([layers, models, sweep])
    assert "### Layers on Some (R) CPU, float32" in page
    assert "2026-01-31; 21 rounds, best of 1, seed 0; 2 threads, kfde_layers 0.1.0, torch 2.9" in page
    assert "- SFE fused is WRONG" in page
    assert "- CFE fused cannot run" in page
    assert set(re.findall(r"\(figures/([^)]*)\)", page)) == set(report.figures([layers, models, sweep]))
    assert "No figures" in report.page([])


@pytest.mark.slow
def test_figures_are_drawings_and_the_same_each_time(layers, sweep):
    figures = report.figures([layers, sweep])
    assert figures == report.figures([layers, sweep])
    assert set(figures) == {"layers-some-r-cpu-float32.svg", "sweep-some-r-cpu-float32.svg"}
    for svg in figures.values():
        assert ElementTree.fromstring(svg).tag.endswith("svg")
        assert b"<dc:date>" not in svg


def test_the_report_is_written(layers, sweep, monkeypatch, tmp_path):
    for name, result in (("a", layers), ("b", sweep)):
        (tmp_path / f"{name}.json").write_text(json.dumps(result))
    paths = [str(tmp_path / f"{name}.json") for name in "ab"]
    monkeypatch.setattr(sys, "argv", ["report.py", *paths, "--output", str(tmp_path / "out")])
    report.main()
    text = (tmp_path / "out/report.md").read_text()
    for name in re.findall(r"\((figures/[^)]*)\)", text):
        assert (tmp_path / "out" / name).stat().st_size > 1000


# Targets


def verdict(results, what):
    (matching,) = [verdict for verdict in targets.verdicts(results) if verdict.target.what == what]
    return matching


def test_a_target_is_judged_by_its_worst_row(make_row, make_result):
    good = make_row(over={"textbook": 0.25}, layout="channels_last")
    assert verdict([make_result(good)], "CSFE forward / textbook").word == "met"
    missed = verdict([make_result(good, make_row(over={"textbook": 0.36}))], "CSFE forward / textbook")
    assert (missed.word, missed.measured) == ("MISSED", 0.36)
    assert missed.where == "(8, 96, 56, 56) contiguous forward, float32"


def test_the_best_repetition_is_judged(make_row, make_result, make_spread):
    row = make_row()
    row["over"] = {"textbook": [make_spread(0.5), make_spread(0.3)]}
    assert verdict([make_result(row, repeats=2)], "CSFE forward / textbook").measured == 0.3


def test_other_candidates_dtypes_and_devices_are_not_judged(make_row, make_result):
    rows = [
        make_row("CSFE", "fused", {"textbook": 0.3}),
        make_row("CFE", "auto", {"textbook": 0.3}),
        make_row(over={"copy": 3}),
    ]
    assert verdict([make_result(*rows)], "CSFE forward / textbook").word == "not measured"
    half = make_result(make_row(over={"textbook": 0.3}), dtype="bfloat16")
    assert verdict([half], "CSFE forward / textbook").word == "not measured"
    assert all(judged.target.device == "cpu" for judged in targets.verdicts([half]))
    assert targets.verdicts([]) == []
    assert targets.verdicts([make_result(suite="sweep")]) == []


def test_memory_is_judged_in_inputs(make_row, make_result):
    row = make_row(work="forward+backward", saved_bytes=1050)
    assert verdict([make_result(row)], "CSFE, saved for backward / input").measured == 1.05
    peak = make_row("MFDF", peak_bytes=1600)
    assert verdict([make_result(peak)], "MFDF forward, peak memory / input, 56 px").word == "MISSED"


def test_a_model_is_judged_by_throughput_and_on_gpu_by_memory(models):
    assert verdict([models], "tiny training, throughput / backbone").measured == 0.8
    on_gpu = models | {"dtype": "bfloat16", "machine": models["machine"] | {"device": "cuda"}}
    assert verdict([on_gpu], "tiny training, peak memory / backbone").measured == 1.5
    assert verdict([on_gpu], "tiny inference, peak memory / backbone").word == "not measured"


def test_one_image_has_a_target_of_its_own(make_row, make_result):
    images = {"work": "inference", "layout": "channels_last"}
    result = make_result(
        make_row("tiny", "kfde", {"backbone": 1.02}, shape=[1, 3, 224, 224], **images),
        make_row("tiny", "kfde", {"backbone": 1.25}, shape=[256, 3, 224, 224], **images),
        suite="models",
    )
    result |= {"dtype": "bfloat16", "machine": result["machine"] | {"device": "cuda"}}
    assert verdict([result], "tiny inference of one image in a CUDA graph, time / backbone").measured == 1.02
    assert verdict([result], "tiny inference, throughput / backbone").measured == 0.8


def test_a_speed_must_be_at_least(make_row, make_result):
    rows = [
        make_row(over={"textbook": ratio}, layout="channels_last", shape=[64, 96, side, side])
        for ratio, side in ((0.1, 56), (0.9, 28))
    ]
    on_gpu = make_result(*rows)
    on_gpu["machine"]["device"] = "cuda"
    met = verdict([on_gpu], "CSFE forward, speed / textbook")  # this target applies to 56 px only
    assert (met.word, met.measured) == ("met", 10)
    assert "| ≥ 8 | 10.00 | met |" in report.targets_table([on_gpu])
