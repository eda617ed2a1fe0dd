"""The documentation is run: docstring examples, the code blocks of every page, and the site itself."""

import doctest
import importlib
import json
import os
import pkgutil
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import timm
import torch
from packaging.version import Version
from torch import nn

import kfde_layers
from tests.helpers import needs_local_dir

ROOT = Path(__file__).parents[1]
MODULES = [info.name for info in pkgutil.walk_packages(kfde_layers.__path__, "kfde_layers.")]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
PAGES = [page for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))) if BLOCK.search(page.read_text())]


@pytest.fixture
def offline_weights(monkeypatch):
    """Answer a download of pretrained weights with weights of the right shape."""

    def answer(hub_id, *args, **kwargs):
        return timm.create_model(hub_id.removeprefix("timm/").split(".")[0]).state_dict()

    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", answer)


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
    """What the code of a page needs and may find lacking."""
    text = page.read_text()
    marks = [needs_local_dir] if "local-dir:" in text else []
    for package in ("accelerate", "lightning"):
        if re.search(rf"^(import|from) {package}\b", text, re.MULTILINE):
            marks.append(pytest.mark.skipif(find_spec(package) is None, reason=f"needs {package}"))
    return marks


# Lightning looks at data loaders in a way that torch has deprecated, and its advice hangs on the number of cores.
@pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers:UserWarning")
@pytest.mark.parametrize("page", [pytest.param(page, marks=marks_of(page), id=page.name) for page in PAGES])
def test_code_blocks_run(page, offline_weights, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": page.stem}
    for block in BLOCK.findall(page.read_text()):
        exec(compile(block, str(page), "exec"), names)  # the blocks of a page build on each other
    assert "kfde_layers" in {getattr(value, "__module__", "").split(".")[0] for value in names.values()}


def test_every_page_that_should_have_code_has_some():
    assert {page.stem for page in PAGES} >= {"README", "hub", "insertion", "layers", "models", "training"}


def test_the_readme_prints_what_it_says(offline_weights, capsys):
    (block,) = BLOCK.findall((ROOT / "README.md").read_text())
    exec(block, {})
    said = re.findall(r"print\(.*\)  # (.*)", block)
    assert capsys.readouterr().out.splitlines() == said
    assert len(said) == 2


def test_the_readme_counts_parameters_right():
    text = (ROOT / "README.md").read_text()
    for name in ("CFE", "SFE", "CSFE", "MFDF"):
        layer = getattr(kfde_layers, name)(768)
        (said,) = re.findall(rf"^\| `{name}` \|.*\| ([\d,]+) \|$", text, re.MULTILINE)
        assert int(said.replace(",", "")) == sum(parameter.numel() for parameter in layer.parameters())


def test_the_cost_table_is_right():
    text = (ROOT / "docs/models.md").read_text()
    rows = re.findall(
        r"^\| (\w+) \| (\d+) \| ([\d.]+) M \| ([\d.]+) M \| ([\d.]+) M \| ([\d.]+) M \|$", text, re.MULTILINE
    )
    assert len(rows) == 9

    def count(name, **kwargs):
        model = timm.create_model(name, device="meta", **kwargs)
        return sum(parameter.numel() for parameter in model.parameters()), model.num_features

    likely = {"groups": 1, "norm_layer": nn.BatchNorm2d, "act_layer": nn.ReLU}
    for size, channels, *said in rows:
        bare, width = count(f"convnextv2_{size}")
        kfde = [count(f"kfde_convnextv2_{size}", mfdf=mfdf)[0] - bare for mfdf in (True, {"groups": 32}, likely)]
        assert int(channels) == width
        for given, wanted, digits in zip(said, (bare, *kfde), (1, 2, 2, 1), strict=True):
            assert given == f"{wanted / 1e6:.{digits}f}"


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return folder


def test_the_site_builds_with_every_page(site):
    for page in (ROOT / "docs").glob("*.md"):
        built = site / "index.html" if page.stem == "index" else site / page.stem / "index.html"
        assert built.exists(), page


def test_mathematics_is_rendered_in_the_page(site):
    layers, api = ((site / page / "index.html").read_text() for page in ("layers", "api"))
    assert layers.count("<math") >= 8
    assert api.count("<math") >= 20
    for text in (layers, api):
        assert "arithmatex" not in text
        assert "\\frac" not in re.sub(r"<code>.*?</code>", "", text, flags=re.DOTALL)


def test_a_page_asks_no_other_host_for_anything(site):
    fetched = re.compile(r'<(?:script|img|iframe|source)[^>]*\ssrc="([^"]*)"|<link[^>]*\shref="([^"]*)"|url\(([^)]*)\)')
    for path in [*site.rglob("*.html"), *site.rglob("*.css")]:
        for groups in fetched.findall(path.read_text()):
            address = "".join(groups).strip("'\"")
            assert not re.match(r"(https?:)?//", address), (path, address)


def test_the_api_page_shows_every_public_name(site):
    text = (site / "api/index.html").read_text()
    for name in [*kfde_layers.__all__, *(f"functional.{name}" for name in kfde_layers.functional.__all__)]:
        if name != "functional":
            assert f'id="kfde_layers.{name}"' in text or f'id="kfde_layers.ops.{name}' in text, name


def test_the_compatibility_page_has_a_cell_for_each_that_is_tested(site, tmp_path):
    paths = tmp_path / "cells.json", ROOT / "docs/compatibility.json"
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", "--cells", paths[0]]
    subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    tested, kept = (json.loads(path.read_text())["cells"] for path in paths)
    assert {(cell["table"], cell["row"], cell["column"]) for cell in tested} == {
        (cell["table"], cell["row"], cell["column"]) for cell in kept
    }
    assert not any(cell["failed"] for cell in kept)
    families = {cell["row"] for cell in kept if cell["table"] == "timm families"}
    assert f"exporters and {len(families)} families" in (ROOT / "README.md").read_text()
    page = (site / "compatibility/index.html").read_text()
    assert page.count("✓") == sum(cell["passed"] > 0 for cell in kept)
    assert "✗" not in page


def test_the_benchmarks_page_holds_the_committed_figures(site):
    page = (site / "benchmarks/index.html").read_text()
    paths = sorted((ROOT / "benchmarks/results").glob("*/*.json"))
    newest = max((Version(path.parent.name) for path in paths), default=None)
    assert ("No figures of this version are there yet." in page) == (newest is None)
    lines = [re.findall(r"<td[^>]*>(.*?)</td>", line) for line in re.findall(r"<tr>(.*?)</tr>", page, re.DOTALL)]
    drawings = 0
    for path in paths:
        if Version(path.parent.name) != newest:
            continue
        result = json.loads(path.read_text())
        drawings += result["suite"] != "models"
        assert result["machine"]["name"] in page
        for row in result["rows"]:
            label = "backbone" if result["suite"] == "models" else "copy"
            medians = [spread["median"] for spread in row["over"].get(label, [])]
            said = [cells for cells in lines if cells[:2] == [row["subject"], row["candidate"]]]
            assert said, row
            assert not medians or any(cell.startswith(f"{min(medians):.2f}") for cells in said for cell in cells), row
    figures = re.findall(r'<img[^>]* src="\.\./(figures/[^"]*)"', page)
    assert len(figures) == drawings
    assert all((site / figure).exists() for figure in figures)
