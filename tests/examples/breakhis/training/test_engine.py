import pytest
import torch
from accelerate import Accelerator
from breakhis.training.engine import Trainer, train_one_epoch
from torch.nn import functional as F
from torch.utils.data import DataLoader


class FixedRate:
    """A scheduler that keeps the learning rate."""

    def step_update(self, update):
        pass


def test_a_loss_that_is_not_finite_names_the_step_and_the_files():
    accelerator = Accelerator(cpu=True)
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    images = torch.ones(6, 2)
    images[3] = torch.nan
    batches = [(images[i : i + 2], torch.zeros(2, dtype=torch.long), torch.arange(i, i + 2)) for i in (0, 2, 4)]
    trainer = Trainer(model, optimizer, FixedRate(), F.cross_entropy)
    names = [f"image{i}.png" for i in range(6)]
    with pytest.raises(FloatingPointError, match=r"finite, got nan in epoch 5, step 2: image2.png, image3.png"):
        train_one_epoch(accelerator, trainer, batches, 4, names)
    assert torch.isfinite(model.weight).all()  # the step was not taken


def test_a_gradient_that_is_not_finite_does_not_reach_the_weights():
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batches = [(torch.zeros(2, 2), torch.zeros(2, dtype=torch.long), torch.arange(2))]

    def loss_fn(logits, targets):
        return (logits - logits.detach()).abs().sqrt().sum()  # 0, with an infinite slope

    trainer = Trainer(model, optimizer, FixedRate(), loss_fn)
    with pytest.raises(FloatingPointError, match="gradient must be finite, got norm nan in epoch 1, step 1: a, b"):
        train_one_epoch(Accelerator(cpu=True), trainer, batches, 0, ["a", "b"])
    assert torch.isfinite(model.weight).all()


def test_the_last_update_of_an_epoch_takes_the_rest_of_the_batches():
    updates = []

    class Recorder:
        def step_update(self, update):
            updates.append(update)

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = torch.nn.Linear(2, 2)
    loader = DataLoader([(torch.ones(2), 0, index) for index in range(5)], batch_size=1)
    loader = accelerator.prepare(loader)  # knows the last batch, whose gradients are not kept for a sixth
    optimizer = accelerator.prepare(torch.optim.SGD(model.parameters(), lr=0.1))
    trainer = Trainer(model, optimizer, Recorder(), F.cross_entropy)
    for epoch in (0, 4):
        train_one_epoch(accelerator, trainer, loader, epoch, list("abcde"))
    assert updates == [1, 2, 3, 13, 14, 15]
