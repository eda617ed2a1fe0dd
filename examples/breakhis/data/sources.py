"""Data sets and protocols: what the command line must know, without the libraries that read images."""

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from breakhis.data.records import Contents

BENIGN = ("A", "F", "PT", "TA")
MALIGNANT = ("DC", "LC", "MC", "PC")
PROTOCOLS = ("patient", "official", "image")
TESTED_CASES = ("whole", "halved", "leaked")


class Source(NamedTuple):
    """A data set that can be trained on."""

    name: str
    """Its name on the command line."""
    classes: dict[str, tuple[str, ...]]
    """Class names by task, in the order of a model's outputs."""
    magnifications: tuple[str, ...]
    """All magnifications; empty if the records have none."""

    def find(self, data_dir: Path) -> "Contents":
        """Find the images in a directory.

        Raises:
            ValueError: There is none.
        """
        from breakhis.data.idc import find_idc
        from breakhis.data.naming import find_breakhis

        return {"breakhis": find_breakhis, "idc": find_idc}[self.name](data_dir)


BREAKHIS = Source(
    name="breakhis",
    classes={"binary": ("benign", "malignant"), "subtype": BENIGN + MALIGNANT},
    magnifications=("40X", "100X", "200X", "400X"),
)
IDC = Source(name="idc", classes={"binary": ("other", "carcinoma")}, magnifications=())
SOURCES = {source.name: source for source in (BREAKHIS, IDC)}
