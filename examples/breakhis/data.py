"""Finds BreakHis images by their file names and serves them to PyTorch.

A name says everything: `SOB_M_DC-14-2523-40-010.png` is a malignant tumour, a ductal carcinoma, of slide 2523 of the
year 2014, at magnification 40X, image 10. Folders are not looked at, so any layout below the data directory will do.
"""

import logging
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

logger = logging.getLogger(__name__)

BENIGN = ("A", "F", "PT", "TA")
MALIGNANT = ("DC", "LC", "MC", "PC")
MAGNIFICATIONS = ("40X", "100X", "200X", "400X")
CLASSES = {"binary": ("benign", "malignant"), "subtype": BENIGN + MALIGNANT}

_NAME = re.compile(
    rf"SOB_(?:B_(?P<benign>{'|'.join(BENIGN)})|M_(?P<malignant>{'|'.join(MALIGNANT)}))"
    r"-(?P<year>\d{2})-(?P<slide>\d+[A-Z]*)-(?P<magnification>40|100|200|400)-(?P<sequence>\d{3})\.png"
)
_GRAMMAR = "SOB_<B|M>_<type>-<year>-<slide>-<magnification>-<sequence>.png"


@dataclass(frozen=True)
class BreakHisImage:
    """One image and what its name says.

    Attributes:
        path: The file.
        subtype: Tumour type, one of A F PT TA DC LC MC PC.
        patient_id: Year and slide, such as "14-22549AB". The type is left out on purpose: slide 14-13412 is filed
            under DC and under LC with the same pixels, and must count as one patient.
        magnification: "40X", "100X", "200X" or "400X".
        sequence: The image's number within its slide and magnification.
    """

    path: Path
    subtype: str
    patient_id: str
    magnification: str
    sequence: int

    def label(self, task: str) -> str:
        """The class name for `task`: "benign" or "malignant" for "binary", the tumour type for "subtype"."""
        if task == "subtype":
            return self.subtype
        return "benign" if self.subtype in BENIGN else "malignant"


def parse_name(path: Path) -> BreakHisImage:
    """Reads a file's name; the file need not exist.

    Args:
        path: A path whose last part follows BreakHis' grammar.

    Returns:
        The image's record.

    Raises:
        ValueError: The name does not follow the grammar.
    """
    match = _NAME.fullmatch(path.name)
    if match is None:
        raise ValueError(f"path must be named {_GRAMMAR}, got {path.name!r}")
    return BreakHisImage(
        path=path,
        subtype=match["benign"] or match["malignant"],
        patient_id=f"{match['year']}-{match['slide']}",
        magnification=f"{match['magnification']}X",
        sequence=int(match["sequence"]),
    )


def find_images(data_dir: Path, magnification: str) -> list[BreakHisImage]:
    """Finds the images of one magnification, or of all four, anywhere below a directory.

    A PNG file with another name is skipped with a line in the log. So is a second file of the same name: copies of
    the data set that are sorted into folds hold each image several times, and a copy could land on the other side of a
    split.

    Args:
        data_dir: Where to look, to any depth.
        magnification: "40X", "100X", "200X", "400X" or "all".

    Returns:
        Records, sorted by file name, so that the order does not depend on the file system.

    Raises:
        ValueError: `data_dir` is no directory, or holds no image of this magnification.
    """
    if not data_dir.is_dir():
        raise ValueError(f"data_dir must be a directory, got {str(data_dir)!r}")
    images: dict[str, BreakHisImage] = {}
    for path in sorted(data_dir.rglob("*.png")):
        try:
            image = parse_name(path)
        except ValueError as error:
            logger.warning("skipped %s: %s", path, error)
            continue
        if path.name in images:
            logger.warning("skipped %s: a second copy of %s", path, images[path.name].path)
            continue
        images[path.name] = image
    if not images:
        raise ValueError(f"data_dir must hold images named {_GRAMMAR} at any depth, got none in {str(data_dir)!r}")
    chosen = [images[name] for name in sorted(images) if magnification in ("all", images[name].magnification)]
    if not chosen:
        counts = Counter(image.magnification for image in images.values())
        there = ", ".join(f"{counts[known]} of {known}" for known in MAGNIFICATIONS if counts[known])
        raise ValueError(f"magnification {magnification} has no image in {str(data_dir)!r}, which holds {there}")
    return chosen


class BreakHisDataset(Dataset):
    """Images of BreakHis as (image, target, index) triples; the index says which record a prediction belongs to."""

    def __init__(self, images: Sequence[BreakHisImage], task: str, transform: Callable[[Image.Image], Tensor]) -> None:
        """Keeps the records; files are opened one by one, when they are asked for.

        Args:
            images: The records, in the order of the indices.
            task: "binary" or "subtype".
            transform: From an RGB image to a (3, H, W) tensor.
        """
        self.images, self.transform = list(images), transform
        self.targets = [CLASSES[task].index(image.label(task)) for image in self.images]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int, int]:
        with Image.open(self.images[index].path) as file:
            return self.transform(file.convert("RGB")), self.targets[index], index
