"""Run the documentation: docstring examples, the code blocks of every page, and the build of the site."""

import doctest
import importlib
import json
import os
import pkgutil
import re
import subprocess
import sys
from importlib.util import find_spec

import pytest
import timm
import torch
from packaging.version import Version
from torch import nn

import kfde_layers
from tests.support.agreement import count_parameters
from tests.support.detectors import import_ultralytics, write_data
from tests.support.pages import DOCS, ROOT, BuiltPage, fetched_by_style, python_blocks, run_block

MODULES = [info.name for info in pkgutil.walk_packages(kfde_layers.__path__, "kfde_layers.")]
PAGES = [page for page in (ROOT / "README.md", *sorted(DOCS.glob("*.md"))) if python_blocks(page)]


@pytest.fixture
def offline_weights(monkeypatch):
    """Replace a download of pretrained weights by random weights of the right shape."""

    def random_weights(hub_id, *args, **kwargs):
        return timm.create_model(hub_id.removeprefix("timm/").split(".")[0]).state_dict()

    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", random_weights)


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name):
    module = importlib.import_module(name)
    result = doctest.testmod(module, extraglobs={"torch": torch, "nn": nn})
    assert result.failed == 0


def test_docstring_examples_are_found_and_can_fail():
    attempted = sum(
        doctest.testmod(importlib.import_module(name), extraglobs={"torch": torch, "nn": nn}).attempted
        for name in MODULES
    )
    assert attempted > 15

    def wrong():
        """
        >>> 1 + 1
        3
        """

    runner = doctest.DocTestRunner(verbose=False)
    for test in doctest.DocTestFinder().find(wrong, "wrong", globs={}):
        assert runner.run(test, out=lambda text: None).failed == 1


def marks_of(page):
    """Return the marks of a page whose code needs packages that may not be installed."""
    text = page.read_text()
    marks = []
    for package in ("accelerate", "lightning", "torchvision", "transformers", "ultralytics"):
        if re.search(rf"^(import|from) {package}\b", text, re.MULTILINE):
            marks.append(pytest.mark.skipif(find_spec(package) is None, reason=f"needs {package}"))
            if package == "ultralytics":
                marks.append(pytest.mark.deployment)
    return marks


# Lightning calls deprecated functions of PyTorch, and its advice depends on the number of cores.
@pytest.mark.slow
@pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers:UserWarning")
@pytest.mark.parametrize("page", [pytest.param(page, marks=marks_of(page), id=page.name) for page in PAGES])
def test_code_blocks_run(page, offline_weights, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    if page.stem == "detectors":
        import_ultralytics(tmp_path / "settings")
        write_data(tmp_path, "detect")
    names = {"__name__": page.stem}
    for block in python_blocks(page):
        run_block(block, page, names)  # a block uses the names of the blocks above it
    assert "kfde_layers" in {getattr(value, "__module__", "").split(".")[0] for value in names.values()}


def test_these_pages_have_code():
    assert {page.stem for page in PAGES} >= {"README", "detectors", "hub", "insertion", "layers", "models", "training"}


@pytest.mark.slow
def test_the_readme_prints_what_it_says(offline_weights, capsys):
    (block,) = python_blocks(ROOT / "README.md")
    run_block(block, ROOT / "README.md")
    promised = re.findall(r"print\(.*\)  # (.*)", block)
    assert capsys.readouterr().out.splitlines() == promised
    assert len(promised) == 2


def test_the_readme_counts_parameters_right():
    text = (ROOT / "README.md").read_text()
    for name in ("CFE", "SFE", "CSFE", "MFDF"):
        layer = getattr(kfde_layers, name)(768)
        (written,) = re.findall(rf"^\| `{name}` \|.*\| ([\d,]+) \|$", text, re.MULTILINE)
        assert int(written.replace(",", "")) == count_parameters(layer)


def test_every_symbol_is_a_name_in_the_code():
    code = "\n".join(path.read_text() for path in sorted((ROOT / "kfde_layers").rglob("*.py")))
    table = re.findall(r"^\|.*\|$", (ROOT / "docs/symbols.md").read_text(), re.MULTILINE)
    names = {name for row in table for text in re.findall(r"`([^`]+)`", row) for name in re.findall(r"[a-z]\w*", text)}
    assert len(names) > 40
    unknown = {name for name in names if not re.search(rf"\b{name}\b", code)}
    assert not unknown


@pytest.mark.slow
def test_the_cost_table_is_right():
    text = (ROOT / "docs/models.md").read_text()
    rows = re.findall(
        r"^\| (\w+) \| (\d+) \| ([\d.]+) M \| ([\d.]+) M \| ([\d.]+) M \| ([\d.]+) M \|$", text, re.MULTILINE
    )
    assert len(rows) == 9

    dense = {"groups": 1, "norm_layer": nn.BatchNorm2d, "act_layer": nn.ReLU}
    for size, channels, *written in rows:
        backbone = timm.create_model(f"convnextv2_{size}", device="meta")
        assert int(channels) == backbone.num_features
        counts = [count_parameters(backbone)]
        for mfdf in (True, {"groups": 32}, dense):
            kfde = timm.create_model(f"kfde_convnextv2_{size}", device="meta", mfdf=mfdf)
            counts.append(count_parameters(kfde) - count_parameters(backbone))
        for number, count, digits in zip(written, counts, (1, 2, 2, 1), strict=True):
            assert number == f"{count / 1e6:.{digits}f}"


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
def test_the_site_builds_with_every_page(site):
    for page in DOCS.glob("*.md"):
        built = site / "index.html" if page.stem == "index" else site / page.stem / "index.html"
        assert built.exists(), page


@pytest.mark.slow
def test_formulas_are_rendered(site):
    layers, api = (BuiltPage(site / page / "index.html") for page in ("layers", "api"))
    assert layers.tags.count("math") >= 8
    assert api.tags.count("math") >= 20
    for page in (layers, api):
        assert "arithmatex" not in page.text
        assert "\\frac" not in page.prose


@pytest.mark.slow
def test_a_page_fetches_nothing_from_other_hosts(site):
    fetched = [(path, BuiltPage(path).fetched) for path in site.rglob("*.html")]
    fetched += [(path, fetched_by_style(path.read_text())) for path in site.rglob("*.css")]
    for path, addresses in fetched:
        for address in addresses:
            assert not re.match(r"(https?:)?//", address), (path, address)


@pytest.mark.slow
def test_the_api_page_shows_every_public_name(site):
    ids = BuiltPage(site / "api/index.html").ids
    for name in [*kfde_layers.__all__, *(f"functional.{name}" for name in kfde_layers.functional.__all__)]:
        if name != "functional":
            assert any(f"{i}.".startswith((f"kfde_layers.{name}.", f"kfde_layers.ops.{name}")) for i in ids), name


@pytest.fixture
def tested_cells(request, tmp_path):
    """The cells of all tests, which another process collects if this one has collected only a part."""
    collected = request.config.pluginmanager.get_plugin("cells").collected
    if {path for path, _ in collected} >= set((ROOT / "tests").rglob("test_*.py")):
        return {cell for _, cell in collected if cell is not None}
    path = tmp_path / "cells.json"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "--collect-only",
        "-q",
        "-m",
        "",
        "-p",
        "no:cacheprovider",
        "--cells",
        path,
    ]
    subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    return {(cell["table"], cell["row"], cell["column"]) for cell in json.loads(path.read_text())["cells"]}


@pytest.mark.slow
def test_the_compatibility_page_has_every_tested_cell(site, tested_cells):
    committed = json.loads((DOCS / "compatibility.json").read_text())["cells"]
    assert tested_cells == {(cell["table"], cell["row"], cell["column"]) for cell in committed}
    assert not any(cell["failed"] for cell in committed)
    families = {cell["row"] for cell in committed if cell["table"] == "timm families"}
    assert f"exporters and {len(families)} families" in (ROOT / "README.md").read_text()
    page = (site / "compatibility/index.html").read_text()
    assert page.count("✓") == sum(cell["passed"] > 0 for cell in committed)
    assert "✗" not in page


@pytest.mark.slow
def test_the_benchmarks_page_holds_the_committed_figures(site):
    page = BuiltPage(site / "benchmarks/index.html")
    paths = sorted((ROOT / "benchmarks/results").glob("*/*.json"))
    newest = max((Version(path.parent.name) for path in paths), default=None)
    assert ("No figures of this version are there yet." in page.text) == (newest is None)
    results = [json.loads(path.read_text()) for path in paths if Version(path.parent.name) == newest]
    for result in results:
        assert result["machine"]["name"] in page.text
        if result["suite"] in ("grid", "calls"):  # a line for each layer
            assert {row["subject"] for row in result["rows"]} - {"floor"} <= {cells[0] for cells in page.rows if cells}
            continue
        baseline = "backbone" if result["suite"] == "models" else "copy"
        for row in result["rows"]:
            page_rows = [cells for cells in page.rows if cells[:2] == [row["subject"], row["candidate"]]]
            assert page_rows, row
            medians = [spread["median"] for spread in row["over"].get(baseline, [])]
            fastest = f"{min(medians):.2f}" if medians else ""
            assert any(cell.startswith(fastest) for cells in page_rows for cell in cells), row
    figures = [address for address in page.images if address.startswith("../figures/")]
    assert len(figures) == sum(result["suite"] in ("layers", "sweep") for result in results)
    assert all((site / "benchmarks" / figure).exists() for figure in figures)
