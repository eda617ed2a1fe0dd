import torch
from breakhis.data.records import ImageDataset, Record, mix_seeds
from PIL import Image
from torchvision.transforms import ColorJitter, Compose, PILToTensor


def test_random_transforms_depend_only_on_seed_epoch_and_index(tmp_path):
    records = []
    for index in range(3):
        path = tmp_path / f"{index}.png"
        Image.new("RGB", (40, 40), (90, 120, 150)).save(path)
        records.append(Record(path, {"binary": "a"}, "p", "p"))
    transform = Compose([ColorJitter(0.5, 0.5, 0.5), PILToTensor()])

    def transformed(index: int, epoch: int = 0, seed: int = 0) -> torch.Tensor:
        data = ImageDataset(records, "binary", ["a"], transform, seed)
        data.epoch = epoch
        return data[index][0]

    torch.manual_seed(1)
    first = transformed(0)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert torch.equal(transformed(0), first)
    assert torch.equal(torch.get_rng_state(), state)  # drop path draws the same numbers as without the data set
    changed = [transformed(1), transformed(2), transformed(0, epoch=1), transformed(0, seed=1)]
    assert all(not torch.equal(first, image) for image in changed)
    assert len({mix_seeds(*seeds) for seeds in ((0, 1), (1, 0), (0, 0), (1,), (0,))}) == 5
