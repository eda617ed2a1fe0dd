"""An object that must never be unpickled."""

from pathlib import Path


class CreatesAFile:
    """Pickled, it creates the file `executed` in the working directory when it is loaded."""

    def __reduce__(self):
        return (Path.touch, (Path("executed"),))
