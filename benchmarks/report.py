"""Turn results into a page: Markdown, and the figures of plots.py.

python -m benchmarks.report benchmarks/results/0.1.0/*.json --output report
"""

import itertools
import re
import statistics
from collections.abc import Sequence
from pathlib import Path

from benchmarks import plots
from benchmarks.arguments import command_parser
from benchmarks.schema import Result, Row, best, load
from benchmarks.targets import regret, verdicts

MODELS = ("kfde", "backbone", "kfde compiled", "backbone compiled")
OURS = ("auto", "fused", "reference", "auto compiled", "kfde", "kfde compiled")
RIVALS = ("textbook", "textbook compiled", "backbone", "backbone compiled")
MIB = 2**20


def page(results: Sequence[Result]) -> str:
    """Write all results in Markdown, with headings from the third level."""
    if not results:
        return "No figures of this version are there yet."
    parts = ["### Targets", targets_table(results)]
    for result in results:
        parts += section(result)
    return "\n\n".join(parts)


def section(result: Result) -> list[str]:
    """Write the parts of one result: how it was measured, its summary, its figure and every row."""
    titles = {
        "layers": "Layers",
        "sweep": "Cost of CSFE",
        "grid": "Small and large maps",
        "calls": "Cost of a call",
        "models": "Models",
    }
    machine, versions = result["machine"], result["versions"]
    libraries = ", ".join(f"{name} {number}" for name, number in versions.items() if number is not None)
    drivers = [f"{name} {machine[name]}" for name in ("driver", "cuda") if machine[name] is not None]
    parts = [
        f"### {titles[result['suite']]} on {machine['name']}, {result['dtype']}",
        f"{result['date']}; {result['rounds']} rounds, best of {result['repeats']}, seed {result['seed']}; "
        + ", ".join([f"{machine['threads']} threads", *drivers, libraries])
        + ".",
    ]
    if result["suite"] == "layers":
        parts.append('Time of `impl="auto"` over that of the textbook implementation:')
        parts.append(summary(result["rows"]))
    if result["suite"] == "grid":
        parts += ['Time of `impl="auto"` over other times, in the median and at its worst:', grid_table(result["rows"])]
        parts += ["Where it takes longer than the textbook implementation:", losses_table(result["rows"])]
    if result["suite"] == "calls":
        parts.append(
            "Microseconds of a forward pass. Steps: the bare operations of PyTorch. Each of the next columns adds "
            "something: the choice whether an operator is needed; the choice of the implementation and the checks of "
            "the arguments; the module; what autograd records. Operator: the steps alone, as an operator of PyTorch."
        )
        return [*parts, calls_table(result["rows"])]
    if result["suite"] in ("layers", "sweep"):
        parts.append(f"![{titles[result['suite']]}, plotted](figures/{stem(result)}.svg)")
    for work, rows in [] if result["suite"] == "grid" else pieces_of_work(result["rows"]):
        parts += [f"**{work}**", models_table(rows) if result["suite"] == "models" else layers_table(rows)]
    for heading, lines in (("No number, for a wrong result", "failures"), ("Not run", "skipped")):
        if result[lines]:
            parts += [f"{heading}:", "\n".join(f"- {line}" for line in result[lines])]
    return parts


def stem(result: Result) -> str:
    """Return a name for the files of a result."""
    machine = re.sub(r"\W+", "-", result["machine"]["name"].lower()).strip("-")
    return f"{result['suite']}-{machine}-{result['dtype']}"


def figures(results: Sequence[Result]) -> dict[str, bytes]:
    """Draw the figures of all results: SVG by file name."""
    draw = {"layers": plots.bandwidth, "sweep": plots.cost}
    return {f"{stem(result)}.svg": draw[result["suite"]](result) for result in results if result["suite"] in draw}


def table(header: Sequence[str], lines: Sequence[Sequence[str]], text_columns: int) -> str:
    """Write a Markdown table, of which the first columns are text and the rest are numbers."""
    rule = ["---"] * text_columns + ["---:"] * (len(header) - text_columns)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *lines))


def targets_table(results: Sequence[Result]) -> str:
    """Write the table of targets and measured numbers."""
    lines = []
    for verdict in verdicts(results):
        target, measured, where = verdict
        asked = f"{'≥' if target.at_least else '≤'} {target.bound:g}"
        lines.append((target.what, where, asked, "" if measured is None else f"{measured:.2f}", verdict.word))
    return table(("target", "at its worst", "asked", "measured", "verdict"), lines, 2)


def summary(rows: Sequence[Row]) -> str:
    """Write the table of the ratios of "auto" to the textbook implementation: a line for each layer and shape."""
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for row in rows:
        if row["candidate"] == "auto" and "textbook" in row["over"]:
            line = cells.setdefault((row["subject"], str(tuple(row["shape"]))), {})
            line[f"{row['layout']}, {row['work']}"] = ratio(row, "textbook")
    columns = list(dict.fromkeys(itertools.chain.from_iterable(cells.values())))
    lines = [(*key, *(line.get(column, "") for column in columns)) for key, line in sorted(cells.items())]
    return table(("layer", "shape", *columns), lines, 2)


def grid_table(rows: Sequence[Row]) -> str:
    """Write the table of a grid: a line for each layer and work."""
    lines = []
    autos = [row for row in rows if row["candidate"] == "auto" and "textbook" in row["over"]]
    for subject, work in dict.fromkeys((row["subject"], row["work"]) for row in autos):
        chosen = [row for row in autos if (row["subject"], row["work"]) == (subject, work)]
        numbers = []
        for values in (
            [best(row["over"]["textbook"])["median"] for row in chosen],
            [regret(row, list(rows)) for row in chosen],
        ):
            numbers += [f"{statistics.median(values):.2f}", f"{max(values):.2f}"]
        lines.append((subject, work, str(len(chosen)), *numbers))
    header = ("layer", "work", "maps", "/ textbook", "at worst", "/ faster implementation", "at worst")
    return table(header, lines, 2)


def losses_table(rows: Sequence[Row]) -> str:
    """Write the table of the maps on which "auto" takes longer than the textbook implementation by over 3 %."""
    lines = [
        (row["subject"], row["work"], str(tuple(row["shape"])), row["layout"], ratio(row, "textbook"))
        for row in rows
        if row["candidate"] == "auto" and "textbook" in row["over"] and best(row["over"]["textbook"])["median"] > 1.03
    ]
    return table(("layer", "work", "shape", "layout", "/ textbook"), lines, 4)


def calls_table(rows: Sequence[Row]) -> str:
    """Write the table of the time of a call: a line for each layer."""
    columns = list(dict.fromkeys(row["candidate"] for row in rows))
    cells = {(row["subject"], row["candidate"]): f"{1e3 * best(row['ms'])['median']:.1f}" for row in rows}
    subjects = dict.fromkeys(row["subject"] for row in rows)
    lines = [(subject, *(cells.get((subject, column), "") for column in columns)) for subject in subjects]
    return table(("layer", *columns), lines, 1)


def pieces_of_work(rows: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    """Group the rows that were measured together, each group with the name of its work."""

    def work(row: Row) -> str:
        return f"{tuple(row['shape'])}, {row['layout']}, {row['work']}"

    return [(name, list(group)) for name, group in itertools.groupby(rows, work)]


def layers_table(rows: Sequence[Row]) -> str:
    """Write the table of one piece of work with layers."""
    labels = [label for label in ("textbook", "textbook compiled", "copy") if any(label in row["over"] for row in rows)]
    lines = [
        (
            row["subject"],
            row["candidate"],
            milliseconds(row),
            *(ratio(row, label) for label in labels),
            f"{row['peak_bytes'] / row['input_bytes']:.2f}",
            "" if row["saved_bytes"] is None else f"{row['saved_bytes'] / row['input_bytes']:.2f}",
        )
        for row in rows
    ]
    header = (
        "layer",
        "candidate",
        "ms (quartiles)",
        *(f"/ {label}" for label in labels),
        "peak / input",
        "saved / input",
    )
    return table(header, lines, 2)


def models_table(rows: Sequence[Row]) -> str:
    """Write the table of one piece of work with models."""
    lines = []
    for row in rows:
        label = "backbone compiled" if row["candidate"].endswith("compiled") else "backbone"
        images_per_second = row["shape"][0] / best(row["ms"])["median"] * 1e3
        lines.append(
            (
                row["subject"],
                row["candidate"],
                milliseconds(row),
                f"{images_per_second:.1f}",
                ratio(row, label),
                f"{row['peak_bytes'] / MIB:.0f}",
            )
        )
    header = ("size", "model", "ms (quartiles)", "img/s", "time / backbone", "peak, MiB")
    return table(header, lines, 2)


def milliseconds(row: Row) -> str:
    """Write the time of a row: median and quartiles."""
    ms = best(row["ms"])
    return f"{ms['median']:.3g} ({ms['q1']:.3g}-{ms['q3']:.3g})"


def ratio(row: Row, label: str) -> str:
    """Write the time of a row over that of a baseline, and mark a loss with the word."""
    if label not in row["over"]:
        return ""
    return f"{best(row['over'][label])['median']:.2f}" + (" loss" if is_loss(row, label) else "")


def is_loss(row: Row, label: str) -> bool:
    """Return whether a candidate of this package took longer than the baseline that it competes with."""
    return row["candidate"] in OURS and label in RIVALS and best(row["over"][label])["median"] > 1


def row_line(row: Row) -> str:
    """Write a row for the terminal."""
    ratios = [f"{ratio(row, label)} / {label}" for label in row["over"] if label != row["candidate"]]
    unit, name = (MIB, "MiB") if row["candidate"] in MODELS else (row["input_bytes"], "of x")
    memory = [f"peak {row['peak_bytes'] / unit:.2f} {name}"]
    if row["saved_bytes"] is not None:
        memory.append(f"saved {row['saved_bytes'] / unit:.2f} {name}")
    parts = [f"{milliseconds(row)} ms", *ratios, *memory]
    return f"{row['subject']:<6}{row['candidate']:<19}" + ", ".join(parts)


def main() -> None:
    """Run the command."""
    parser = command_parser("report", __doc__)
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--output", type=Path, required=True, help="folder for report.md and figures/")
    args = parser.parse_args()
    results = [load(path) for path in args.results]
    (args.output / "figures").mkdir(parents=True, exist_ok=True)
    (args.output / "report.md").write_text(f"## Results\n\n{page(results)}\n", encoding="utf-8")
    for name, svg in figures(results).items():
        (args.output / "figures" / name).write_bytes(svg)


if __name__ == "__main__":
    main()
