"""Let a known share of the tested cases into training, to measure what that does to a score of the same images."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from random import Random

from breakhis.data.records import Record
from breakhis.data.splits import Split


def halve_tested_cases(split: Split) -> tuple[Split, list[Record]]:
    """Test every second image of each case, by its number at the end of the file name, from the first one on.

    Images with the same number stay together: they can be the same field at two magnifications, or the same file under
    two types, as the data set has them of slide 14-13412.

    Args:
        split: A split that has each case on one side.

    Returns:
        The split with half of its test images, and the other half.
    """
    numbers: dict[str, set[str]] = defaultdict(set)
    for record in split.test:
        numbers[record.case_id].add(_number(record))
    tested = {case: set(sorted(found)[::2]) for case, found in numbers.items()}
    kept = [record for record in split.test if _number(record) in tested[record.case_id]]
    others = [record for record in split.test if _number(record) not in tested[record.case_id]]
    return replace(split, test=kept, protocol=f"{split.protocol}, half of each tested case"), others


def _number(record: Record) -> str:
    return record.path.stem.rpartition("-")[2]


def leak_tested_cases(split: Split, others: Sequence[Record], task: str, seed: int) -> Split:
    """Train on further images of the tested cases, in place of as many images of other cases.

    Each takes the place of a random image of its class, or of the class with the most images left, so that the number
    of training images and, as far as possible, their classes stay the same.

    Args:
        split: From `halve_tested_cases`.
        others: The half that it does not test.
        task: The task of the classes.
        seed: Seed of the choice.
    """
    train, places = list(split.train), defaultdict[str, list[int]](list)
    for index, record in enumerate(train):
        places[record.labels[task]].append(index)
    for indices in places.values():
        Random(seed).shuffle(indices)
    for record in others:
        if left := places[record.labels[task]] or max(places.values(), key=len):
            train[left.pop()] = record
    return replace(split, train=train, protocol=f"{split.protocol}, the other half in training (cases leak)")
