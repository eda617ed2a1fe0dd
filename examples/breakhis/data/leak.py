"""Let a known share of the tested cases into training, to measure what that does to a score of the same images."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from random import Random

from breakhis.data.records import Record
from breakhis.data.splits import Split


def halve_tested_cases(split: Split) -> tuple[Split, list[Record]]:
    """Test every second image of each case, by file name, from the first one on.

    Args:
        split: A split that has each case on one side.

    Returns:
        The split with half of its test images, and the other half.
    """
    images: dict[str, list[Record]] = defaultdict(list)
    for record in split.test:
        images[record.case_id].append(record)
    ordered = [sorted(case, key=lambda record: record.path.name) for case in images.values()]
    tested = {record.path for case in ordered for record in case[::2]}
    kept = [record for record in split.test if record.path in tested]
    others = [record for record in split.test if record.path not in tested]
    return replace(split, test=kept, protocol=f"{split.protocol}, half of each tested case"), others


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
