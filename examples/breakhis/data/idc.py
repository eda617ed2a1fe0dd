"""Read patches of invasive ductal carcinoma from folders: `<patient>/<0 or 1>/<any name>.png`, 1 for carcinoma.

Janowczyk and Madabhushi (2016), from Cruz-Roa et al. (2014): patches of 50 x 50 px from one whole slide per patient.
"""

from pathlib import Path

from breakhis.data.images import image_files
from breakhis.data.records import Contents, Record, report_copies
from breakhis.data.sources import IDC

_CLASSES = dict(zip("01", IDC.classes["binary"], strict=True))


def find_idc(data_dir: Path) -> Contents:
    """Find every patch below a directory.

    Of several files with the same patient, label and name the first one is used, because the published archive holds
    each patient twice. The log says how many were left out.

    Args:
        data_dir: Directory to look in, at any depth.

    Returns:
        Records, sorted by path, with labels for "binary", and the images in folders with other names.

    Raises:
        ValueError: `data_dir` is not a directory, or holds no patch.
    """
    records: dict[tuple[str, str, str], Record] = {}
    misnamed: dict[Path, str] = {}
    copies: list[Path] = []
    for path in image_files(data_dir):
        label, patient_id = path.parent.name, path.parent.parent.name
        if label not in _CLASSES:
            misnamed[path] = f"its folder must be named 0 or 1, got {label!r}"
            continue
        record = Record(path, {"binary": _CLASSES[label]}, patient_id=patient_id, case_id=patient_id)
        if records.setdefault((patient_id, label, path.name), record) is not record:
            copies.append(path)
    if not records:
        raise ValueError(f"data_dir must hold patches in <patient>/<0 or 1>/, got none in {str(data_dir)!r}")
    report_copies(copies)
    return Contents(list(records.values()), misnamed)
