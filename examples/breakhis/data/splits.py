"""Divide images into training, validation and test sets.

A diagnosis must generalise to new patients, not only to new images: two images of one slide share the stain, the lamp
and the tumour. The patient protocol keeps each patient on one side. The official protocol does so too, except for one
slide that the data set files twice. The image protocol does not; it exists only because published tables use it.
"""

import logging
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sklearn.model_selection import GroupKFold, KFold, StratifiedGroupKFold, StratifiedKFold

from breakhis.data.records import Record, cases
from breakhis.names import printable

logger = logging.getLogger(__name__)

VALIDATION_FOLDS = 5  # one fifth of the training patients is held out to choose the checkpoint
LEAK_WARNING = (
    "WARNING: --protocol image leaks patients between training and test: images of one slide are on both sides, and "
    "the score is inflated. Use it only for comparison with published tables."
)


@dataclass(frozen=True)
class Split:
    """Three disjoint lists of images."""

    train: list[Record]
    """Images to fit the weights on."""
    val: list[Record]
    """Images to choose the checkpoint on; empty if there are too few images."""
    test: list[Record]
    """Images to report scores of, once."""
    protocol: str
    """Name of the protocol, which every score is shown with, such as "image protocol (patients leak)"."""
    fold: str
    """Name of the fold, such as "fold 0 of 5"."""

    def parts(self) -> dict[str, list[Record]]:
        """Return the three lists by name, "train", "val" and "test"."""
        return {"train": self.train, "val": self.val, "test": self.test}


def leaks(split: Split, group_by: str) -> list[str]:
    """List the groups that are in more than one part of a split, sorted.

    Args:
        split: The split to check.
        group_by: "patient", "case" or "image".
    """
    counts = Counter(key for part in split.parts().values() for key in {record.group(group_by) for record in part})
    return sorted(key for key, count in counts.items() if count > 1)


def shared_cases(split: Split) -> list[Record]:
    """List the test images of cases that are in training or validation too: the score is not of new cases alone."""
    seen = cases([*split.train, *split.val])
    return [record for record in split.test if record.case_id in seen]


def absent_classes(records: Sequence[Record], task: str, classes: Sequence[str]) -> list[str]:
    """List the classes that no image has, in their order."""
    present = {record.labels[task] for record in records}
    return [name for name in classes if name not in present]


def fold_split(records: Sequence[Record], task: str, group_by: str, num_folds: int, fold: int, seed: int) -> Split:
    """Take one fold of a stratified k-fold over groups as test, and validation from the rest.

    Validation never takes the last training images of a class; if that cannot be avoided, it stays empty.

    Args:
        records: The images. They must have at least as many groups as there are folds.
        task: The task whose classes are balanced over the folds.
        group_by: The group that stays on one side: "patient", "case", or "image", which warns that patients leak.
        num_folds: Number of folds, at least 2.
        fold: Number of the fold that is the test set, from 0.
        seed: Seed that shuffles the groups.

    Returns:
        The split; no group is in two of its lists.

    Raises:
        ValueError: There are fewer groups than folds, or `fold` is not below the number of folds.
    """
    groups = {record.group(group_by) for record in records}
    if len(groups) < num_folds:
        raise ValueError(
            f"num_folds must be at most the number of {group_by}s, {len(groups)}, got {num_folds}; "
            f"they are {', '.join(map(printable, sorted(groups)))}"
        )
    if not 0 <= fold < num_folds:
        raise ValueError(f"fold must be from 0 to {num_folds - 1}, got {fold}")
    if group_by == "image":
        logger.warning(LEAK_WARNING)
    protocol = "image protocol (patients leak)" if group_by == "image" else f"{group_by} protocol"
    rest, test = _folds(records, task, group_by, num_folds, seed)[fold]
    train, val = _carve_validation(rest, task, group_by, seed)
    split = Split(train, val, test, protocol, f"fold {fold} of {num_folds}")
    if leaking := leaks(split, group_by):  # a fault of this program, which must not lead to a score
        raise RuntimeError(f"the split puts {group_by}s on two sides: {', '.join(map(printable, leaking))}")
    return split


def official_split(records: Sequence[Record], task: str, group_by: str, fold_file: Path, seed: int) -> Split:
    """Take training and test images from a list of the data set's authors, and validation from the training images.

    The authors file slide 14-13412 under two types and put it on both sides in folds 1, 3 and 5. This is reported and
    not repaired, because only the authors' own protocol can be compared with their results.

    Args:
        records: Images of BreakHis.
        task: The task whose classes are balanced between training and validation.
        group_by: The group that is not in both training and validation: "patient" or "case".
        fold_file: `dsfold<n>.txt`, with rows `file|magnification|fold|train or test`.
        seed: Seed that shuffles the training patients before validation is taken.

    Returns:
        The split. Images that the file does not list are left out, and a warning counts them.

    Raises:
        ValueError: A row of the file is malformed, or no image is listed for training or for test.
    """
    sides = read_fold_file(fold_file)
    listed = {side: [r for r in records if sides.get(r.path.stem) == side] for side in ("train", "test")}
    for side, part in listed.items():
        if not part:
            raise ValueError(f"{fold_file} must list images of the data set for {side}, got none")
    unlisted = len(records) - len(listed["train"]) - len(listed["test"])
    if unlisted:
        logger.warning("WARNING: left out %d images that %s does not list", unlisted, printable(fold_file.name))
    train, val = _carve_validation(listed["train"], task, group_by, seed)
    split = Split(train, val, listed["test"], "official protocol", fold_file.stem)
    for key in leaks(split, group_by):
        where = printable(fold_file.name)
        logger.warning("WARNING: %s puts %s %s into both training and test", where, group_by, printable(key))
    return split


def read_fold_file(path: Path) -> dict[str, str]:
    """Read a list of the data set's authors: "train" or "test" by file name without suffix.

    Raises:
        ValueError: A row is not `file|magnification|fold|train or test`, or a file is on both sides.
    """
    sides: dict[str, str] = {}
    # A byte that is no UTF-8 is refused in its row.
    for number, row in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        fields = row.strip().split("|")
        if len(fields) != 4 or fields[3] not in ("train", "test"):
            raise ValueError(f"{path} line {number} must be file|magnification|fold|train or test, got {row!r}")
        name = Path(fields[0]).stem
        if sides.setdefault(name, fields[3]) != fields[3]:
            raise ValueError(f"{path} line {number} must not put {printable(name)} on both sides, got {row!r}")
    return sides


def _folds(
    records: Sequence[Record], task: str, group_by: str, num_folds: int, seed: int
) -> list[tuple[list[Record], list[Record]]]:
    """Return (rest, held out) for each fold. Each group is on one side, and no side is empty."""
    labels = [record.labels[task] for record in records]
    by_image = group_by == "image"
    groups = None if by_image else [record.group(group_by) for record in records]
    stratified = (StratifiedKFold if by_image else StratifiedGroupKFold)(num_folds, shuffle=True, random_state=seed)
    plain = (KFold if by_image else GroupKFold)(num_folds, shuffle=True, random_state=seed)
    folds = []
    if max(Counter(labels).values()) >= num_folds:  # scikit-learn refuses to stratify otherwise
        with warnings.catch_warnings():
            # The report on absent classes says it better, with their names.
            warnings.filterwarnings("ignore", message="The least populated class in y", category=UserWarning)
            folds = list(stratified.split(records, labels, groups))
    # With few images and many classes, scikit-learn's greedy search can leave a fold empty.
    if not folds or not all(len(held) for _, held in folds):
        logger.warning("WARNING: too few images to balance the classes over %d folds: not stratified", num_folds)
        folds = list(plain.split(records, labels, groups))
    return [([records[i] for i in rest], [records[i] for i in held]) for rest, held in folds]


def _carve_validation(
    records: Sequence[Record], task: str, group_by: str, seed: int
) -> tuple[list[Record], list[Record]]:
    """Return (train, val): the first fold over groups that leaves every class in train, or all images and none."""
    present = {record.labels[task] for record in records}
    num_folds = min(VALIDATION_FOLDS, len({record.group(group_by) for record in records}))
    if num_folds >= 2:
        for train, val in _folds(records, task, group_by, num_folds, seed):
            if {record.labels[task] for record in train} == present:
                return train, val
    return list(records), []
