import io

import pytest
from breakhis.data.metered import MeteredFile


class Stating(io.BytesIO):
    """Notes the sizes that are asked for."""

    sizes: list[int]

    def read(self, size: int | None = -1) -> bytes:
        self.sizes = [*getattr(self, "sizes", []), -1 if size is None else size]
        return super().read(size)


def test_all_reads_together_are_limited():
    file = MeteredFile(io.BytesIO(bytes(100)), 50, ValueError("too much"))
    assert [len(file.read(20)) for _ in range(2)] == [20, 20]
    file.seek(0)
    assert file.tell() == 0
    with pytest.raises(ValueError, match="too much"):
        file.read(11)
    file.seek(0)
    file.left = 30
    assert len(file.read(30)) == 30
    with pytest.raises(ValueError, match="too much"):
        file.read(1)


@pytest.mark.parametrize("size", [10**12, -1])
def test_no_more_than_the_limit_is_asked_for(size):
    inner = Stating(bytes(1000))
    with pytest.raises(ValueError, match="too much"):
        MeteredFile(inner, 50, ValueError("too much")).read(size)
    assert inner.sizes == [51]
    assert MeteredFile(Stating(bytes(50)), 50, ValueError("too much")).read(size) == bytes(50)
