"""Draw a small data set in the folders and names of BreakHis, so that the example runs without the real one."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from breakhis.data.field import draw_field
from breakhis.data.naming import DIAGNOSES
from breakhis.data.sources import BENIGN, BREAKHIS
from breakhis.data.tissue import draw_stain


def draw_tree(
    root: Path,
    seed: int,
    magnifications: Sequence[str] = BREAKHIS.magnifications,
    patients_per_subtype: int = 5,
    images_per_patient: int = 4,
) -> int:
    """Draw `BreaKHis_v1/...` below a directory, with the folders and file names of the real data set.

    Each patient has one subtype and one stain. Each image has its own random state, so that a tree for one
    magnification holds the same images as the full tree.

    Args:
        root: Directory in which `BreaKHis_v1` is made; files already there are overwritten.
        seed: Seed of the images.
        magnifications: Magnifications to draw, of "40X", "100X", "200X", "400X".
        patients_per_subtype: Number of patients of each of the eight subtypes.
        images_per_patient: Number of images of each patient at each magnification.

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
                folder = root / "BreaKHis_v1" / "histology_slides" / "breast" / diagnosis / "SOB"
                folder = folder / DIAGNOSES[subtype].replace(" ", "_")
                folder = folder / f"SOB_{letter}_{subtype}_{slide}" / magnification
                folder.mkdir(parents=True, exist_ok=True)
                for sequence in range(1, images_per_patient + 1):
                    rng = np.random.default_rng([seed, kind, patient, int(power), sequence])
                    image = draw_field(subtype, magnification, stain, rng)
                    image.save(folder / f"SOB_{letter}_{subtype}-{slide}-{power}-{sequence:03d}.png")
                    count += 1
    return count
