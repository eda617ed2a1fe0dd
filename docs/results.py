"""Put the committed benchmark results into the page while the site is built, so that no figure is kept twice."""

import sys
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
MARK = "<!-- results -->"

sys.path.append(str(BENCHMARKS))
import report  # noqa: E402
import schema  # noqa: E402


def newest() -> list[schema.Result]:
    """The results of the newest version that has any, in order of their names."""
    paths = sorted((BENCHMARKS / "results").glob("*/*.json"))
    version = max((tuple(map(int, path.parent.name.split("."))) for path in paths), default=())
    return [schema.load(path) for path in paths if path.parent.name == ".".join(map(str, version))]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the figures."""
    for name, svg in report.figures(newest()).items():
        files.append(File.generated(config, f"figures/{name}", content=svg))
    return files


def on_page_markdown(markdown: str, **_: object) -> str:
    """Write the tables."""
    return markdown.replace(MARK, report.page(newest())) if MARK in markdown else markdown
