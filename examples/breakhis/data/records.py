"""Describe images without opening them, and load them for PyTorch."""

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

from breakhis.data.images import open_rgb
from breakhis.names import printable

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Record:
    """One image."""

    path: Path
    """The file."""
    labels: dict[str, str]
    """Class name by task."""
    patient_id: str
    """The patient."""
    case_id: str
    """The case, equal to the patient or coarser: patient ids that may belong to one person share a case."""
    magnification: str = ""
    """The magnification, such as "40X"; "" if the data set has one magnification only."""

    def group(self, group_by: str) -> str:
        """Return the id that must stay on one side of a split over "patient", "case" or "image"."""
        return {"patient": self.patient_id, "case": self.case_id, "image": str(self.path)}[group_by]


class Contents(NamedTuple):
    """The images in a data directory."""

    records: list[Record]
    """The images of the data set, in an order that does not depend on the file system."""
    misnamed: dict[Path, str]
    """Images whose name does not follow the data set's rules, each with the reason."""


def report_copies(copies: Sequence[Path]) -> None:
    """Say in the log how many files were left out as copies of others."""
    if copies:
        logger.warning("left out %d further copies of images, such as %s", len(copies), printable(copies[0]))


def patients(records: Iterable[Record]) -> set[str]:
    """Return the distinct patient ids."""
    return {record.patient_id for record in records}


def cases(records: Iterable[Record]) -> set[str]:
    """Return the ids of all cases."""
    return {record.case_id for record in records}


class ImageDataset(Dataset):
    """Triples (image, target, index); the index is that of the record.

    Attributes:
        epoch: Number of the epoch, to be set before each pass. Random transforms depend on it.
    """

    def __init__(
        self,
        records: Sequence[Record],
        task: str,
        classes: Sequence[str],
        transform: Callable[[Image.Image], Tensor],
        seed: int = 0,
    ) -> None:
        """Keep the records; each file is opened when its image is needed.

        Args:
            records: The images in the order of the indices.
            task: A key of each record's `labels`.
            classes: The task's class names in the order of the targets.
            transform: From an RGB image to a (3, H, W) tensor. Its random numbers depend only on `seed`, `epoch` and
                the index: not on the number of workers or processes, and not on the images before.
            seed: Seed of the random transforms.
        """
        self.records, self.transform, self.seed, self.epoch = list(records), transform, seed, 0
        self.targets = [classes.index(record.labels[task]) for record in self.records]

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> tuple[Tensor, int, int]:
        image = open_rgb(self.records[index].path)
        python_state = random.getstate()
        with torch.random.fork_rng(devices=[]):  # torchvision draws from torch, timm from Python
            random.seed(mix_seeds(self.seed, self.epoch, index))
            torch.manual_seed(mix_seeds(self.seed, self.epoch, index))
            tensor = self.transform(image)
        random.setstate(python_state)
        return tensor, self.targets[index], index


def mix_seeds(*seeds: int) -> int:
    """Combine several seeds into one of 32 bits."""
    return int(np.random.SeedSequence((len(seeds), *seeds)).generate_state(1)[0])
