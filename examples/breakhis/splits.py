"""Divides images into training, validation and test sets.

Patients, not images, are what a diagnosis must generalise over: two fields of one slide share the stain, the lamp and
the tumour. The patient protocol keeps each patient on one side; the image protocol does not, and exists only because
published tables use it.
"""

import logging
import math
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from sklearn.model_selection import GroupKFold, StratifiedGroupKFold, train_test_split

from breakhis.data import CLASSES, BreakHisImage

logger = logging.getLogger(__name__)

VALIDATION_FOLDS = 5  # one fifth of the training patients is held out to choose the checkpoint
IMAGE_TEST_SHARE = 0.3  # the 70/30 of the published tables
IMAGE_VALIDATION_SHARE = 0.15  # of the 70
LEAK_WARNING = (
    "WARNING: --protocol image leaks patients between training and test: images of one slide are on both sides, and "
    "the score is inflated. Use it only for comparison with published tables."
)


@dataclass(frozen=True)
class Split:
    """Three disjoint lists of images; `val` is empty where the data are too few to spare any.

    Attributes:
        train: Images to fit the weights on.
        val: Images to choose the checkpoint on.
        test: Images to report on, once.
        folds: Number of folds that `test` is one of; None for the image protocol.
    """

    train: list[BreakHisImage]
    val: list[BreakHisImage]
    test: list[BreakHisImage]
    folds: int | None

    def parts(self) -> dict[str, list[BreakHisImage]]:
        """The three lists by name, "train", "val" and "test"."""
        return {"train": self.train, "val": self.val, "test": self.test}


def patients(images: Sequence[BreakHisImage]) -> set[str]:
    """The distinct patient ids of some images."""
    return {image.patient_id for image in images}


def absent_classes(images: Sequence[BreakHisImage], task: str) -> list[str]:
    """The classes of a task that no image has, in the task's order."""
    present = {image.label(task) for image in images}
    return [name for name in CLASSES[task] if name not in present]


def patient_split(images: Sequence[BreakHisImage], task: str, folds: int, fold: int, seed: int) -> Split:
    """Splits by patient: test is one fold of a stratified k-fold over patients, validation comes out of the rest.

    With fewer patients than folds, the number of folds shrinks to the number of patients, with a warning. Validation
    never takes the last training patient of a class; where that cannot be avoided it stays empty.

    Args:
        images: Images of at least two patients.
        task: "binary" or "subtype"; its classes are what is balanced over the folds.
        folds: Number of folds wanted, at least 2.
        fold: Which fold is the test set, from 0.
        seed: Shuffles the patients.

    Returns:
        The split; no patient is in two of its lists.

    Raises:
        ValueError: There are fewer than two patients, or `fold` is not below the number of folds.
    """
    everyone = patients(images)
    if len(everyone) < 2:
        raise ValueError(
            f"protocol 'patient' needs at least 2 patients, one to train on and one to test on, got {len(everyone)}: "
            f"{', '.join(sorted(everyone))}"
        )
    if len(everyone) < folds:
        logger.warning("WARNING: --folds shrinks from %d to %d, the number of patients", folds, len(everyone))
        folds = len(everyone)
    if fold >= folds:
        raise ValueError(f"fold must be below the number of folds, {folds}, got {fold}")
    rest, test = _grouped_folds(images, task, folds, seed)[fold]
    train, val = _carve_validation(rest, task, seed)
    return Split(train, val, test, folds)


def _grouped_folds(
    images: Sequence[BreakHisImage], task: str, folds: int, seed: int
) -> list[tuple[list[BreakHisImage], list[BreakHisImage]]]:
    """(rest, held out) for each fold, with whole patients on either side and neither side empty."""
    labels = [image.label(task) for image in images]
    groups = [image.patient_id for image in images]
    found = []
    if max(Counter(labels).values()) >= folds:  # scikit-learn refuses to stratify otherwise
        with warnings.catch_warnings():
            # Said better, and with the names of the classes, by the report on absent classes.
            warnings.filterwarnings("ignore", message="The least populated class in y", category=UserWarning)
            found = list(StratifiedGroupKFold(folds, shuffle=True, random_state=seed).split(images, labels, groups))
    # Where few images are balanced over many classes, scikit-learn's greedy search can leave a fold without any.
    if not all(len(held) for _, held in found) or not found:
        logger.warning(
            "WARNING: too few images to balance the classes over %d folds, so they are not stratified", folds
        )
        found = list(GroupKFold(folds, shuffle=True, random_state=seed).split(images, labels, groups))
    return [([images[i] for i in rest], [images[i] for i in held]) for rest, held in found]


def _carve_validation(
    images: Sequence[BreakHisImage], task: str, seed: int
) -> tuple[list[BreakHisImage], list[BreakHisImage]]:
    """(train, val): the first fold over patients that leaves every class in train, or everything and nothing."""
    folds = min(VALIDATION_FOLDS, len(patients(images)))
    if folds >= 2:
        for train, val in _grouped_folds(images, task, folds, seed):
            if absent_classes(train, task) == absent_classes(images, task):
                return train, val
    return list(images), []


def image_split(images: Sequence[BreakHisImage], task: str, seed: int) -> Split:
    """Splits images at random, 70 % to 30 %, stratified by class, and lets patients leak; warns that it does.

    Args:
        images: At least two images.
        task: "binary" or "subtype".
        seed: Shuffles the images.

    Returns:
        The split; validation is carved out of the 70 %.

    Raises:
        ValueError: There are fewer than two images.
    """
    if len(images) < 2:
        raise ValueError(f"protocol 'image' needs at least 2 images, got {len(images)}")
    logger.warning(LEAK_WARNING)
    rest, test = _hold_out(images, task, IMAGE_TEST_SHARE, seed)
    train, val = _hold_out(rest, task, IMAGE_VALIDATION_SHARE, seed) if len(rest) > 1 else (rest, [])
    return Split(train, val, test, None)


def _hold_out(
    images: Sequence[BreakHisImage], task: str, share: float, seed: int
) -> tuple[list[BreakHisImage], list[BreakHisImage]]:
    """(kept, held out) at random; stratified by class as far as the number of images allows."""
    counts = Counter(image.label(task) for image in images)
    # A class of one image cannot be on both sides: it is kept, unless that would leave nothing to hold out.
    single = [image for image in images if counts[image.label(task)] == 1]
    common = [image for image in images if counts[image.label(task)] > 1]
    if not common:
        return train_test_split(images, test_size=share, random_state=seed)
    labels = [image.label(task) for image in common]
    places = min(math.ceil(share * len(common)), math.floor((1 - share) * len(common)))  # on the smaller side
    stratify = labels if len(set(labels)) <= places else None
    kept, held = train_test_split(common, test_size=share, random_state=seed, stratify=stratify)
    return single + kept, held
