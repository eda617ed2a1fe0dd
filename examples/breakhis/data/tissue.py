"""Tissue of the eight BreakHis subtypes, and the stain of a patient's slide, as numbers.

`field` draws them. The subtypes differ in the architecture in `TISSUES`, the patients in the `Stain`. All lengths are
in micrometres, so that a magnification is only a scale.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np


@dataclass(frozen=True)
class Tissue:
    """Architecture of one subtype."""

    pattern: Literal["glands", "nests", "files", "islands", "ribbons"]
    """Arrangement of the epithelial cells."""
    nucleus: float
    """Diameter of an epithelial nucleus, um."""
    pleomorphism: float
    """Relative standard deviation of that diameter."""
    chromatin: float
    """Haematoxylin in a nucleus; 1 is typical, more is the hyperchromasia of malignant cells."""
    crowding: float
    """Distance between neighbouring epithelial nuclei, in nuclear diameters."""
    stroma_spacing: float
    """Distance between neighbouring stroma nuclei, um."""
    spindle: float
    """Length over width of a stroma nucleus."""
    feature: float
    """Size of the pattern's unit, um: a gland's radius, a nest's or a ribbon's width, the distance of files."""
    spacing: float = 0.0
    """Distance between glands, um; only for "glands"."""
    aspect: float = 1.0
    """Length over width of a gland; only for "glands"."""
    disorder: float = 0.35
    """Distance of glands and cells from their regular places, in spacings."""
    coverage: float = 0.0
    """Share of the field that the pattern covers; not for "glands" and "files"."""


TISSUES = {
    "A": Tissue("glands", 6.8, 0.10, 0.80, 1.10, 28.0, 2.6, feature=20.0, spacing=68.0, aspect=1.25, disorder=0.26),
    "F": Tissue("glands", 6.6, 0.10, 0.80, 1.10, 22.0, 2.6, feature=19.0, spacing=112.0, aspect=3.6, disorder=0.30),
    "PT": Tissue("glands", 6.8, 0.14, 0.85, 1.10, 16.0, 3.2, feature=34.0, spacing=260.0, aspect=4.0, disorder=0.30),
    "TA": Tissue("glands", 6.4, 0.08, 0.80, 1.15, 26.0, 2.2, feature=20.0, spacing=54.0, aspect=1.05, disorder=0.08),
    "DC": Tissue("nests", 10.6, 0.26, 1.30, 1.25, 24.0, 2.2, feature=62.0, coverage=0.66, disorder=0.42),
    "LC": Tissue("files", 9.0, 0.14, 1.40, 1.15, 30.0, 2.6, feature=36.0, disorder=0.40),
    "MC": Tissue("islands", 9.6, 0.18, 1.30, 1.15, 32.0, 2.4, feature=44.0, coverage=0.44, disorder=0.38),
    "PC": Tissue("ribbons", 9.8, 0.20, 1.25, 1.12, 30.0, 2.4, feature=60.0, coverage=0.50, disorder=0.32),
}


@dataclass(frozen=True)
class Stain:
    """Effect of a slide's preparation on its images; a patient has one slide."""

    haematoxylin: float
    """Strength of the purple stain; 1 is typical."""
    eosin: float
    """Strength of the pink stain; 1 is typical."""
    hue: float
    """Turn of both colours from blue (-1) to red (1)."""
    white: tuple[float, float, float]
    """Colour of unstained glass under the lamp: R, G, B from 0 to 255."""
    growth: float
    """Factor on the size of all nuclei; 1 is typical."""


def draw_stain(rng: np.random.Generator) -> Stain:
    """Draw one patient's stain at random."""
    glass = rng.uniform(228, 248)
    return Stain(
        haematoxylin=float(rng.uniform(0.85, 1.15)),
        eosin=float(rng.uniform(0.75, 1.2)),
        hue=float(rng.uniform(-1, 1)),
        white=(float(glass + rng.uniform(-8, 4)), float(glass), float(glass + rng.uniform(-8, 6))),
        growth=float(rng.uniform(0.93, 1.07)),
    )
