"""Divides images into training, validation and test sets.

Patients, not images, are what a diagnosis must generalise over: two fields of one slide share the stain, the lamp and
the tumour. The patient protocol keeps each patient on one side, the official protocol does so but for one slide that
the data set files twice, and the image protocol, which exists only because published tables use it, does not.
"""

import logging
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sklearn.model_selection import GroupKFold, KFold, StratifiedGroupKFold, StratifiedKFold

from breakhis.records import Record

logger = logging.getLogger(__name__)

PROTOCOLS = ("patient", "official", "image")
VALIDATION_FOLDS = 5  # one fifth of the training patients is held out to choose the checkpoint
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
        protocol: What a score must be named with, such as "image protocol (patients leak)".
        fold: Which of several such splits it is, such as "fold 0 of 5".
    """

    train: list[Record]
    val: list[Record]
    test: list[Record]
    protocol: str
    fold: str

    def parts(self) -> dict[str, list[Record]]:
        """The three lists by name, "train", "val" and "test"."""
        return {"train": self.train, "val": self.val, "test": self.test}


def leaks(split: Split, group_by: str) -> list[str]:
    """The groups that stand in more than one part of a split, sorted.

    Args:
        split: The split.
        group_by: "patient", "case" or "image".
    """
    counts = Counter(key for part in split.parts().values() for key in {record.group(group_by) for record in part})
    return sorted(key for key, count in counts.items() if count > 1)


def absent_classes(records: Sequence[Record], task: str, classes: Sequence[str]) -> list[str]:
    """The classes of a task that no image has, in the task's order."""
    present = {record.labels[task] for record in records}
    return [name for name in classes if name not in present]


def fold_split(records: Sequence[Record], task: str, group_by: str, num_folds: int, fold: int, seed: int) -> Split:
    """Takes one fold of a stratified k-fold over groups as test; validation comes out of the rest.

    Validation never takes the last training images of a class; where that cannot be avoided it stays empty.

    Args:
        records: Images of at least as many groups as folds.
        task: Its classes are what is balanced over the folds.
        group_by: What stays on one side: "patient", "case", or "image", which lets patients leak and warns of it.
        num_folds: Number of folds, at least 2.
        fold: Which fold is the test set, from 0.
        seed: Shuffles the groups.

    Returns:
        The split; no group is in two of its lists.

    Raises:
        ValueError: There are fewer groups than folds, or `fold` is not below the number of folds.
    """
    groups = {record.group(group_by) for record in records}
    if len(groups) < num_folds:
        raise ValueError(
            f"num_folds must be at most the number of {group_by}s, {len(groups)}, got {num_folds}; "
            f"they are {', '.join(sorted(groups))}"
        )
    if not 0 <= fold < num_folds:
        raise ValueError(f"fold must be from 0 to {num_folds - 1}, got {fold}")
    if group_by == "image":
        logger.warning(LEAK_WARNING)
    protocol = "image protocol (patients leak)" if group_by == "image" else f"{group_by} protocol"
    rest, test = _folds(records, task, group_by, num_folds, seed)[fold]
    train, val = _carve_validation(rest, task, group_by, seed)
    split = Split(train, val, test, protocol, f"fold {fold} of {num_folds}")
    if found := leaks(split, group_by):  # a fault of this program, which must not become a number
        raise RuntimeError(f"the split puts {group_by}s on two sides: {', '.join(found)}")
    return split


def official_split(records: Sequence[Record], task: str, group_by: str, fold_file: Path, seed: int) -> Split:
    """Takes training and test images as the data set's authors list them; validation comes out of the former.

    The authors file slide 14-13412 under two types and put it on both sides in folds 1, 3 and 5: reported, not mended,
    because this protocol is worth something only as theirs.

    Args:
        records: Images of BreakHis.
        task: Its classes are what validation is balanced over.
        group_by: What stays out of training when it is in validation: "patient" or "case".
        fold_file: `dsfold<n>.txt`, rows `file|magnification|fold|train or test`.
        seed: Shuffles the training patients before validation is held out.

    Returns:
        The split. An image that the file does not list is in none of its lists, with a warning that counts them.

    Raises:
        ValueError: A row of the file has another form, or no image is listed for training or for test.
    """
    sides = read_fold_file(fold_file)
    found = {side: [r for r in records if sides.get(r.path.stem) == side] for side in ("train", "test")}
    for side, part in found.items():
        if not part:
            raise ValueError(f"{fold_file} must list images of the data set for {side}, got none")
    unlisted = len(records) - len(found["train"]) - len(found["test"])
    if unlisted:
        logger.warning("WARNING: left out %d images that %s does not list", unlisted, fold_file.name)
    train, val = _carve_validation(found["train"], task, group_by, seed)
    split = Split(train, val, found["test"], "official protocol", fold_file.stem)
    for key in leaks(split, group_by):
        logger.warning("WARNING: %s puts %s %s into both training and test", fold_file.name, group_by, key)
    return split


def read_fold_file(path: Path) -> dict[str, str]:
    """Reads a list of the data set's authors: "train" or "test" by file name without suffix.

    Raises:
        ValueError: A row has another form than `file|magnification|fold|train or test`, or a file is on both sides.
    """
    sides: dict[str, str] = {}
    for number, row in enumerate(path.read_text().splitlines(), start=1):
        fields = row.strip().split("|")
        if len(fields) != 4 or fields[3] not in ("train", "test"):
            raise ValueError(f"{path} line {number} must be file|magnification|fold|train or test, got {row!r}")
        name = Path(fields[0]).stem
        if sides.setdefault(name, fields[3]) != fields[3]:
            raise ValueError(f"{path} line {number} must not put {name} on both sides, got {row!r}")
    return sides


def _folds(
    records: Sequence[Record], task: str, group_by: str, num_folds: int, seed: int
) -> list[tuple[list[Record], list[Record]]]:
    """(rest, held out) for each fold, with whole groups on either side and neither side empty."""
    labels = [record.labels[task] for record in records]
    by_image = group_by == "image"
    groups = None if by_image else [record.group(group_by) for record in records]
    stratified = (StratifiedKFold if by_image else StratifiedGroupKFold)(num_folds, shuffle=True, random_state=seed)
    plain = (KFold if by_image else GroupKFold)(num_folds, shuffle=True, random_state=seed)
    found = []
    if max(Counter(labels).values()) >= num_folds:  # scikit-learn refuses to stratify otherwise
        with warnings.catch_warnings():
            # Said better, and with the names of the classes, by the report on absent classes.
            warnings.filterwarnings("ignore", message="The least populated class in y", category=UserWarning)
            found = list(stratified.split(records, labels, groups))
    # Where few images are balanced over many classes, scikit-learn's greedy search can leave a fold without any.
    if not found or not all(len(held) for _, held in found):
        logger.warning("WARNING: too few images to balance the classes over %d folds: not stratified", num_folds)
        found = list(plain.split(records, labels, groups))
    return [([records[i] for i in rest], [records[i] for i in held]) for rest, held in found]


def _carve_validation(
    records: Sequence[Record], task: str, group_by: str, seed: int
) -> tuple[list[Record], list[Record]]:
    """(train, val): the first fold over groups that leaves every class in train, or everything and nothing."""
    present = {record.labels[task] for record in records}
    num_folds = min(VALIDATION_FOLDS, len({record.group(group_by) for record in records}))
    if num_folds >= 2:
        for train, val in _folds(records, task, group_by, num_folds, seed):
            if {record.labels[task] for record in train} == present:
                return train, val
    return list(records), []
