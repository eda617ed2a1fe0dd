"""Write the committed benchmark results into the pages when the site is built, so that no number is kept twice."""

import sys
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
RESULTS_MARK, COSTS_MARK = "<!-- results -->", "<!-- costs -->"

sys.path.insert(0, str(ROOT))
from benchmarks import costs, report, schema  # noqa: E402


def newest() -> list[schema.Result]:
    """Load the results of the newest version that has any, in the order of their names."""
    paths = sorted(RESULTS.glob("*/*.json"))
    version = max((tuple(map(int, path.parent.name.split("."))) for path in paths), default=())
    return [schema.load(path) for path in paths if path.parent.name == ".".join(map(str, version))]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the figures."""
    for name, svg in report.figures(newest()).items():
        files.append(File.generated(config, f"figures/{name}", content=svg))
    return files


def on_page_markdown(markdown: str, **_: object) -> str:
    """Write the tables."""
    for mark, write in ((RESULTS_MARK, report.page), (COSTS_MARK, costs.costs_table)):
        if mark in markdown:
            markdown = markdown.replace(mark, write(newest()))
    return markdown
