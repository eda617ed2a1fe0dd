"""Read BreakHis by its file names.

A name says everything: `SOB_M_DC-14-2523-40-010.png` is a malignant tumour, a ductal carcinoma, of slide 2523 of the
year 2014, at magnification 40X, image 10. Folders are ignored, so the data directory may have any layout.
"""

import logging
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from breakhis.data.images import IMAGE_SUFFIXES, image_files
from breakhis.data.records import Contents, Record, report_copies
from breakhis.data.sources import BENIGN, MALIGNANT
from breakhis.names import printable

logger = logging.getLogger(__name__)

DIAGNOSES = {
    "A": "adenosis",
    "F": "fibroadenoma",
    "PT": "phyllodes tumor",
    "TA": "tubular adenoma",
    "DC": "ductal carcinoma",
    "LC": "lobular carcinoma",
    "MC": "mucinous carcinoma",
    "PC": "papillary carcinoma",
}
"""What the abbreviations of the types mean."""

_NAME = re.compile(
    rf"SOB_(?:B_(?P<benign>{'|'.join(BENIGN)})|M_(?P<malignant>{'|'.join(MALIGNANT)}))"
    r"-(?P<year>\d{2})-(?P<slide>\d+[A-Z]*)-(?P<magnification>40|100|200|400)-(?P<sequence>\d{3})"
)
GRAMMAR = "SOB_<B|M>_<type>-<year>-<slide>-<magnification>-<sequence>.png"


def parse_name(path: Path) -> Record:
    """Read the name of a file, which need not exist.

    The patient is year and slide, such as "14-22549AB". The type is not part of it: slide 14-13412 is filed under DC
    and under LC with the same pixels, and must count as one patient. The case is the patient without the letters at
    the end: 22549AB, 22549CD and 22549G look like parts of one case.

    Args:
        path: A path whose last part follows BreakHis' grammar, with the suffix of any image format.

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


def full_names(classes: Sequence[str]) -> list[str]:
    """Return class names for a reader, such as "DC ductal carcinoma"; of other data sets, the names as they are."""
    if set(classes) <= set(DIAGNOSES):
        return [f"{name} {DIAGNOSES[name]}" for name in classes]
    return [printable(name) for name in classes]


def find_breakhis(data_dir: Path) -> Contents:
    """Find every BreakHis image below a directory.

    Of several files with the same name the first one is used: copies of the data set that are sorted into folds hold
    each image several times, and a copy could get to the other side of a split. The log says how many were left out,
    and names a slide that is filed under two types.

    Args:
        data_dir: Directory to look in, at any depth.

    Returns:
        Records, sorted by file name, and the images with other names.

    Raises:
        ValueError: `data_dir` is not a directory, or holds no image of BreakHis.
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
    return Contents([records[name] for name in sorted(records)], misnamed)


def _report_conflicts(records: Iterable[Record]) -> None:
    """Name in the log the patients whose slide is filed under more than one type."""
    subtypes = defaultdict(set)
    for record in records:
        subtypes[record.patient_id].add(record.labels["subtype"])
    for patient_id, names in sorted(subtypes.items()):
        if len(names) > 1:
            logger.warning(
                "WARNING: slide %s is filed under %s: it counts as one patient, whose images have different labels",
                patient_id,
                " and ".join(sorted(names)),
            )
