"""Targets of the layers and models, and whether a measurement meets it."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

from schema import Result, Row, best

Measure = Callable[[Row, list[Row]], float | None]  # a row and those measured with it; None: the row lacks it


class Target(NamedTuple):
    """A bound that every row it speaks of must keep."""

    what: str
    device: str
    dtypes: tuple[str, ...]
    speaks_of: Callable[[Row], bool]
    measure: Measure
    bound: float
    at_least: bool = False


class Verdict(NamedTuple):
    """A target and the row that keeps it worst."""

    target: Target
    measured: float | None
    where: str

    @property
    def word(self) -> str:
        if self.measured is None:
            return "not measured"
        bound = self.target.bound
        return "met" if (self.measured >= bound if self.target.at_least else self.measured <= bound) else "MISSED"


def verdicts(results: Iterable[Result]) -> list[Verdict]:
    """The verdict on each target of the devices that were measured."""
    results = [result for result in results if result["suite"] != "sweep"]
    found = []
    for target in TARGETS:
        on_device = [result for result in results if result["machine"]["device"] == target.device]
        measured = []
        for result in on_device:
            for row in filter(target.speaks_of, result["rows"] if result["dtype"] in target.dtypes else []):
                value = target.measure(row, result["rows"])
                if value is not None:
                    where = f"{tuple(row['shape'])} {row['layout']} {row['work']}, {result['dtype']}"
                    measured.append((value, where))
        if measured:
            found.append(Verdict(target, *(min if target.at_least else max)(measured)))
        elif on_device:
            found.append(Verdict(target, None, ""))
    return found


def rows(subject: str, *work: str, candidate: str = "auto", side: int = 0, layout: str = "") -> Callable[[Row], bool]:
    """Rows of a subject, by default its "auto" on every map and in every layout."""

    def speaks_of(row: Row) -> bool:
        return (
            (row["subject"], row["candidate"]) == (subject, candidate)
            and row["work"] in work
            and side in (0, row["shape"][2])
            and layout in ("", row["layout"])
        )

    return speaks_of


def over(label: str) -> Measure:
    return lambda row, _: best(row["over"][label])["median"] if label in row["over"] else None


def speed_over(label: str) -> Measure:
    return lambda row, _: 1 / best(row["over"][label])["median"] if label in row["over"] else None


def peak(row: Row, _: list[Row]) -> float:
    return row["peak_bytes"] / row["input_bytes"]


def saved(row: Row, _: list[Row]) -> float | None:
    return None if row["saved_bytes"] is None else row["saved_bytes"] / row["input_bytes"]


def peak_over_backbone(row: Row, measured: list[Row]) -> float | None:
    same = ("subject", "shape", "layout", "work")
    for other in measured:
        if other["candidate"] == "backbone" and all(other[key] == row[key] for key in same):
            return row["peak_bytes"] / other["peak_bytes"]
    return None


BOTH = ("forward", "forward+backward")
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
            rows(size, work, candidate="kfde"),
            speed_over("backbone"),
            bound,
            at_least=True,
        )
        for size in ("atto", "tiny")
        for work, bound in (("inference", 0.95), ("training", 0.93))
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
    *(
        target
        for work in ("inference", "training")
        for target in (
            Target(
                f"tiny {work}, throughput / backbone",
                "cuda",
                ("bfloat16",),
                rows("tiny", work, candidate="kfde"),
                speed_over("backbone"),
                0.97,
                at_least=True,
            ),
            Target(
                f"tiny {work}, peak memory / backbone",
                "cuda",
                ("bfloat16",),
                rows("tiny", work, candidate="kfde"),
                peak_over_backbone,
                1.03,
            ),
        )
    ),
]
