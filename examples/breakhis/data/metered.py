"""A file of which only a limited number of bytes can be read, against files that state huge sizes."""

from typing import BinaryIO


class MeteredFile:
    """A binary file whose `read` refuses, before it takes memory, to go beyond a number of bytes in total.

    Attributes:
        left: Bytes that may still be read; a caller may raise it when it knows that more are wanted.
    """

    def __init__(self, file: BinaryIO, limit: int, refusal: ValueError) -> None:
        """Wrap a file.

        Args:
            file: The file; seeking in it is free.
            limit: The first value of `left`.
            refusal: The error of reading too much.
        """
        self._file, self.left, self._refusal = file, limit, refusal

    def read(self, size: int = -1) -> bytes:
        """Read `size` bytes, or fewer at the end of the file; a negative size reads the rest of the file."""
        if not 0 <= size <= self.left:
            # The file may end before `size`. One byte more than allowed is enough to tell.
            chunk = self._file.read(self.left + 1)
            if len(chunk) > self.left:
                raise self._refusal
        else:
            chunk = self._file.read(size)
        self.left -= len(chunk)
        return chunk

    def seek(self, offset: int, whence: int = 0) -> int:
        """Go to a position."""
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        """Return the position."""
        return self._file.tell()

    def fileno(self) -> int:
        """Return the descriptor; a library in C that reads through it is not metered."""
        return self._file.fileno()
