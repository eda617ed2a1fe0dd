"""What is known of an image without opening it, and the data set that serves the pictures."""

import logging
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from breakhis.images import open_rgb

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Record:
    """One image.

    Attributes:
        path: The file.
        labels: Class name by task.
        patient_id: Whose tissue it shows.
        case_id: The same or coarser: ids that may belong to one patient share it.
        magnification: Such as "40X", or "" where the data set has one magnification only.
    """

    path: Path
    labels: dict[str, str]
    patient_id: str
    case_id: str
    magnification: str = ""

    def group(self, group_by: str) -> str:
        """What must not be on two sides of a split that keeps apart each "patient", "case" or "image"."""
        return {"patient": self.patient_id, "case": self.case_id, "image": str(self.path)}[group_by]


class Found(NamedTuple):
    """What a directory holds.

    Attributes:
        records: In an order that does not depend on the file system.
        misnamed: Pictures that the data set's naming does not fit, and in a sentence why not.
    """

    records: list[Record]
    misnamed: dict[Path, str]


class Source(NamedTuple):
    """A data set that can be trained on.

    Attributes:
        classes: Class names by task, in the order of a model's outputs.
        magnifications: All there are, or none where the records have no magnification.
        find: From a directory to what it holds; ValueError where there is no record.
    """

    classes: dict[str, tuple[str, ...]]
    magnifications: tuple[str, ...]
    find: Callable[[Path], Found]


def report_copies(copies: Sequence[Path]) -> None:
    """Counts in the log the files that were left out as copies of others."""
    if copies:
        logger.warning("left out %d further copies of images, such as %s", len(copies), copies[0])


def patients(records: Iterable[Record]) -> set[str]:
    """The distinct patient ids."""
    return {record.patient_id for record in records}


class ImageDataset(Dataset):
    """(image, target, index) triples; the index says which record a prediction belongs to.

    Attributes:
        epoch: Set it before each pass: with another number, random transforms give other pictures.
    """

    def __init__(
        self,
        records: Sequence[Record],
        task: str,
        classes: Sequence[str],
        transform: Callable[[Image.Image], Tensor],
        seed: int = 0,
    ) -> None:
        """Keeps the records; files are opened one by one, when they are asked for.

        Args:
            records: In the order of the indices.
            task: A key of each record's `labels`.
            classes: The task's class names in the order of the targets.
            transform: From an RGB image to a (3, H, W) tensor. What it draws at random depends on `seed`, `epoch` and
                the index alone: not on how many workers or processes share the work, nor on what they did before.
            seed: Of the random transforms.
        """
        self.records, self.transform, self.seed, self.epoch = list(records), transform, seed, 0
        self.targets = [classes.index(record.labels[task]) for record in self.records]

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> tuple[Tensor, int, int]:
        picture = open_rgb(self.records[index].path)
        python_state = random.getstate()
        with torch.random.fork_rng(devices=[]):  # torchvision draws from torch, timm from Python
            random.seed(mix_seeds(self.seed, self.epoch, index))
            torch.manual_seed(mix_seeds(self.seed, self.epoch, index))
            image = self.transform(picture)
        random.setstate(python_state)
        return image, self.targets[index], index


def mix_seeds(*seeds: int) -> int:
    """One seed, of 32 bits, out of several."""
    return int(np.random.SeedSequence((len(seeds), *seeds)).generate_state(1)[0])
