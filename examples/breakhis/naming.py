"""Reads BreakHis by its file names.

A name says everything: `SOB_M_DC-14-2523-40-010.png` is a malignant tumour, a ductal carcinoma, of slide 2523 of the
year 2014, at magnification 40X, image 10. Folders are not looked at, so any layout below the data directory will do.
"""

import logging
import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from breakhis.images import IMAGE_SUFFIXES, image_files
from breakhis.records import Found, Record, Source, report_copies

logger = logging.getLogger(__name__)

BENIGN = ("A", "F", "PT", "TA")
MALIGNANT = ("DC", "LC", "MC", "PC")

_NAME = re.compile(
    rf"SOB_(?:B_(?P<benign>{'|'.join(BENIGN)})|M_(?P<malignant>{'|'.join(MALIGNANT)}))"
    r"-(?P<year>\d{2})-(?P<slide>\d+[A-Z]*)-(?P<magnification>40|100|200|400)-(?P<sequence>\d{3})"
)
GRAMMAR = "SOB_<B|M>_<type>-<year>-<slide>-<magnification>-<sequence>.png"


def parse_name(path: Path) -> Record:
    """Reads a file's name; the file need not exist.

    The patient is year and slide, such as "14-22549AB". The type is left out of it on purpose: slide 14-13412 is filed
    under DC and under LC with the same pixels, and must count as one patient. The case is the same without the letters
    at its end: 22549AB, 22549CD and 22549G look like parts of one case.

    Args:
        path: A path whose last part follows BreakHis' grammar; the picture may have been saved in another format.

    Returns:
        The image's record, with labels for "binary" and "subtype".

    Raises:
        ValueError: The name does not follow the grammar.
    """
    match = _NAME.fullmatch(path.stem)
    if match is None or path.suffix.lower() not in IMAGE_SUFFIXES:
        raise ValueError(f"path must be named {GRAMMAR}, got {path.name!r}")
    patient_id = f"{match['year']}-{match['slide']}"
    return Record(
        path=path,
        labels={
            "binary": "benign" if match["benign"] else "malignant",
            "subtype": match["benign"] or match["malignant"],
        },
        patient_id=patient_id,
        case_id=patient_id.rstrip("ABCDEFGHIJKLMNOPQRSTUVWXYZ"),
        magnification=f"{match['magnification']}X",
    )


def find_breakhis(data_dir: Path) -> Found:
    """Finds every BreakHis image below a directory.

    Of several files of one name the first counts: copies of the data set that are sorted into folds hold each image
    several times, and a copy could land on the other side of a split. The others are counted in the log, and a slide
    that is filed under two types is reported there.

    Args:
        data_dir: Where to look, to any depth.

    Returns:
        Records, sorted by file name, and the pictures with other names.

    Raises:
        ValueError: `data_dir` is no directory, or holds no image of BreakHis.
    """
    records: dict[str, Record] = {}
    misnamed: dict[Path, str] = {}
    copies: list[Path] = []
    for path in image_files(data_dir):
        try:
            record = parse_name(path)
        except ValueError as error:
            misnamed[path] = str(error)
            continue
        if records.setdefault(path.stem, record) is not record:
            copies.append(path)
    if not records:
        raise ValueError(f"data_dir must hold images named {GRAMMAR} at any depth, got none in {str(data_dir)!r}")
    report_copies(copies)
    _report_conflicts(records.values())
    return Found([records[name] for name in sorted(records)], misnamed)


def _report_conflicts(records: Iterable[Record]) -> None:
    """Names the patients whose slide is filed under more than one type."""
    subtypes = defaultdict(set)
    for record in records:
        subtypes[record.patient_id].add(record.labels["subtype"])
    for patient_id, found in sorted(subtypes.items()):
        if len(found) > 1:
            logger.warning(
                "WARNING: slide %s is filed under %s: it counts as one patient, whose images have different labels",
                patient_id,
                " and ".join(sorted(found)),
            )


BREAKHIS = Source(
    classes={"binary": ("benign", "malignant"), "subtype": BENIGN + MALIGNANT},
    magnifications=("40X", "100X", "200X", "400X"),
    find=find_breakhis,
)
