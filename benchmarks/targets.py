"""Targets of the layers and models, and whether measurements meet them."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

from benchmarks.schema import Result, Row, best

Measure = Callable[[Row, list[Row]], float | None]
"""From a row and all rows of its result to a number; None if the row has no such number."""


class Target(NamedTuple):
    """A bound on a number of some rows."""

    what: str
    """Name of the target."""
    device: str
    """Device of the results that it applies to."""
    dtypes: tuple[str, ...]
    """Dtypes of the results that it applies to."""
    applies_to: Callable[[Row], bool]
    """Whether it applies to a row of these results."""
    measure: Measure
    """The number."""
    bound: float
    """The bound."""
    at_least: bool = False
    """Whether the bound is a lower one."""
    suites: tuple[str, ...] = ("layers", "models")
    """Suites of the results that it applies to."""


class Verdict(NamedTuple):
    """A target and the row that is worst for it."""

    target: Target
    """The target."""
    measured: float | None
    """The number of that row; None: there is no row."""
    where: str
    """The input and the work of that row."""

    @property
    def word(self) -> str:
        """Return whether the target is met, as a word of the table."""
        if self.measured is None:
            return "not measured"
        bound = self.target.bound
        return "met" if (self.measured >= bound if self.target.at_least else self.measured <= bound) else "MISSED"


def verdicts(results: Iterable[Result]) -> list[Verdict]:
    """Judge each target of the devices that were measured."""
    results = list(results)
    judged = []
    for target in TARGETS:
        on_device = [
            result
            for result in results
            if result["machine"]["device"] == target.device and result["suite"] in target.suites
        ]
        measured = []
        for result in on_device:
            for row in filter(target.applies_to, result["rows"] if result["dtype"] in target.dtypes else []):
                value = target.measure(row, result["rows"])
                if value is not None:
                    where = f"{tuple(row['shape'])} {row['layout']} {row['work']}, {result['dtype']}"
                    measured.append((value, where))
        if measured:
            judged.append(Verdict(target, *(min if target.at_least else max)(measured)))
        elif on_device:
            judged.append(Verdict(target, None, ""))
    return judged


def rows(
    subject: str,
    *work: str,
    candidate: str = "auto",
    side: int = 0,
    layout: str = "",
    one_sample: bool | None = None,
) -> Callable[[Row], bool]:
    """Choose rows of a subject, by default those of "auto" on every map, in every layout and of every batch size."""

    def applies_to(row: Row) -> bool:
        return (
            (row["subject"], row["candidate"]) == (subject, candidate)
            and row["work"] in work
            and side in (0, row["shape"][2])
            and layout in ("", row["layout"])
            and one_sample in (None, row["shape"][0] == 1)
        )

    return applies_to


def over(label: str) -> Measure:
    """Measure the time over that of a baseline."""
    return lambda row, _: best(row["over"][label])["median"] if label in row["over"] else None


def speed_over(label: str) -> Measure:
    """Measure the speed over that of a baseline."""
    return lambda row, _: 1 / best(row["over"][label])["median"] if label in row["over"] else None


def regret(row: Row, rows: list[Row]) -> float:
    """Measure the time over that of the faster one of "auto" and the reference on the same work."""
    keys = ("subject", "shape", "layout", "work")
    rivals = [rival for rival in rows if all(rival[key] == row[key] for key in keys)]
    times = [best(rival["ms"])["median"] for rival in rivals if rival["candidate"] in ("auto", "reference")]
    return best(row["ms"])["median"] / min(times)


def peak(row: Row, _: list[Row]) -> float:
    """Measure the peak memory over that of the input."""
    return row["peak_bytes"] / row["input_bytes"]


def saved(row: Row, _: list[Row]) -> float | None:
    """Measure the memory kept for backward over that of the input."""
    return None if row["saved_bytes"] is None else row["saved_bytes"] / row["input_bytes"]


def peak_over_backbone(row: Row, rows: list[Row]) -> float | None:
    """Measure the peak memory over that of the backbone on the same work."""
    keys = ("subject", "shape", "layout", "work")
    for backbone in rows:
        if backbone["candidate"] == "backbone" and all(backbone[key] == row[key] for key in keys):
            return row["peak_bytes"] / backbone["peak_bytes"]
    return None


BOTH = ("forward", "forward+backward")
GATES_AND_BRANCHES = ("CFE", "SFE", "CSFE", "MFDF")
FP32 = ("float32",)
ANY = ("float32", "bfloat16", "float16")
COPY, TEXTBOOK, COMPILED = over("copy"), over("textbook"), over("textbook compiled")
LARGE = {"side": 56, "layout": "channels_last"}

TARGETS = [
    Target("CSFE forward / textbook", "cpu", FP32, rows("CSFE", "forward"), TEXTBOOK, 0.35),
    Target("CSFE forward / compiled textbook", "cpu", FP32, rows("CSFE", "forward"), COMPILED, 2.0),
    Target("CSFE forward+backward / textbook", "cpu", FP32, rows("CSFE", "forward+backward"), TEXTBOOK, 0.5),
    *(
        Target(
            f"{name} compiled / compiled textbook",
            "cpu",
            FP32,
            rows(name, *BOTH, candidate="auto compiled"),
            COMPILED,
            1.15,
        )
        for name in ("CSFE", "MFDF")
    ),
    Target("CSFE, saved for backward / input", "cpu", FP32, rows("CSFE", "forward+backward"), saved, 1.1),
    Target("MFDF forward / textbook, 56 px", "cpu", FP32, rows("MFDF", "forward", side=56), TEXTBOOK, 0.4),
    Target("MFDF forward / textbook, 28 px", "cpu", FP32, rows("MFDF", "forward", side=28), TEXTBOOK, 0.7),
    Target("MFDF forward / textbook", "cpu", FP32, rows("MFDF", "forward"), TEXTBOOK, 1.15),
    Target(
        "MFDF forward+backward / textbook, 56 px", "cpu", FP32, rows("MFDF", "forward+backward", side=56), TEXTBOOK, 0.6
    ),
    Target("MFDF forward+backward / textbook", "cpu", FP32, rows("MFDF", "forward+backward"), TEXTBOOK, 1.15),
    Target("MFDF forward, peak memory / input, 56 px", "cpu", FP32, rows("MFDF", "forward", side=56), peak, 1.5),
    *(
        Target(
            f"{size} {work}, throughput / backbone",
            "cpu",
            FP32,
            rows(size, work, candidate="kfde", one_sample=False),
            speed_over("backbone"),
            bound,
            at_least=True,
        )
        for size in ("atto", "tiny")
        for work, bound in (("inference", 0.95), ("training", 0.93))
    ),
    *(
        Target(f"{name} / textbook, any map", "cpu", FP32, rows(name, *BOTH), TEXTBOOK, 1.03, suites=("grid",))
        for name in GATES_AND_BRANCHES
    ),
    *(
        Target(f"{name} / the faster implementation", "cpu", FP32, rows(name, *BOTH), regret, 1.1, suites=("grid",))
        for name in GATES_AND_BRANCHES
    ),
    *(
        Target(
            f"{size} inference of one image, time / backbone",
            "cpu",
            FP32,
            rows(size, "inference", candidate="kfde", one_sample=True),
            over("backbone"),
            1.03,
        )
        for size in ("atto", "femto", "tiny")
    ),
    Target("CSFE forward / copy", "cuda", ("bfloat16",), rows("CSFE", "forward", **LARGE), COPY, 1.5),
    Target("CSFE forward / copy", "cuda", FP32, rows("CSFE", "forward", **LARGE), COPY, 1.7),
    Target(
        "CSFE forward, speed / textbook",
        "cuda",
        ANY,
        rows("CSFE", "forward", **LARGE),
        speed_over("textbook"),
        8.0,
        at_least=True,
    ),
    Target(
        "CSFE forward, speed / compiled textbook",
        "cuda",
        ANY,
        rows("CSFE", "forward", **LARGE),
        speed_over("textbook compiled"),
        1.3,
        at_least=True,
    ),
    Target("CSFE forward+backward / copy", "cuda", ANY, rows("CSFE", "forward+backward", **LARGE), COPY, 4.5),
    Target("MFDF forward / depthwise 7x7", "cuda", ANY, rows("MFDF", "forward"), over("depthwise 7x7"), 1.3),
    Target(
        "tiny inference of one image in a CUDA graph, time / backbone",
        "cuda",
        ("bfloat16",),
        rows("tiny", "inference", candidate="kfde", one_sample=True),
        over("backbone"),
        1.03,
    ),
    *(
        target
        for work in ("inference", "training")
        for target in (
            Target(
                f"tiny {work}, throughput / backbone",
                "cuda",
                ("bfloat16",),
                rows("tiny", work, candidate="kfde", one_sample=False),
                speed_over("backbone"),
                0.97,
                at_least=True,
            ),
            Target(
                f"tiny {work}, peak memory / backbone",
                "cuda",
                ("bfloat16",),
                rows("tiny", work, candidate="kfde", one_sample=False),
                peak_over_backbone,
                1.03,
            ),
        )
    ),
]
