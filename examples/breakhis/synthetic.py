"""Writes a small BreakHis tree of drawn images, so that the example runs on a machine without the data set."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from breakhis.naming import BENIGN, BREAKHIS
from breakhis.tissue import draw_field, draw_stain

_FOLDERS = {
    "A": "adenosis",
    "F": "fibroadenoma",
    "PT": "phyllodes_tumor",
    "TA": "tubular_adenoma",
    "DC": "ductal_carcinoma",
    "LC": "lobular_carcinoma",
    "MC": "mucinous_carcinoma",
    "PC": "papillary_carcinoma",
}


def draw_tree(
    root: Path,
    seed: int,
    magnifications: Sequence[str] = BREAKHIS.magnifications,
    patients_per_subtype: int = 5,
    images_per_patient: int = 4,
) -> int:
    """Draws `BreaKHis_v1/...` below a directory, in the data set's own folders and file names.

    Each patient has one subtype and one stain, and each image has a random state of its own: a tree for one
    magnification holds the same pictures as the full tree.

    Args:
        root: Where `BreaKHis_v1` is made; files already there are overwritten.
        seed: The same seed draws the same pictures.
        magnifications: Which magnifications to draw, out of "40X", "100X", "200X", "400X".
        patients_per_subtype: Patients of each of the eight subtypes.
        images_per_patient: Images of each patient at each magnification.

    Returns:
        The number of images drawn.
    """
    count = 0
    for kind, subtype in enumerate(BREAKHIS.classes["subtype"]):
        for patient in range(patients_per_subtype):
            stain = draw_stain(np.random.default_rng([seed, kind, patient]))
            for magnification in magnifications:
                power = magnification.removesuffix("X")
                slide = f"14-{1000 * (kind + 1) + patient + 1}"
                letter, diagnosis = ("B", "benign") if subtype in BENIGN else ("M", "malignant")
                folder = root / "BreaKHis_v1" / "histology_slides" / "breast" / diagnosis / "SOB" / _FOLDERS[subtype]
                folder = folder / f"SOB_{letter}_{subtype}_{slide}" / magnification
                folder.mkdir(parents=True, exist_ok=True)
                for sequence in range(1, images_per_patient + 1):
                    rng = np.random.default_rng([seed, kind, patient, int(power), sequence])
                    picture = draw_field(subtype, magnification, stain, rng)
                    picture.save(folder / f"SOB_{letter}_{subtype}-{slide}-{power}-{sequence:03d}.png")
                    count += 1
    return count
