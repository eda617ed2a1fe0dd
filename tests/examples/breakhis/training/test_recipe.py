from argparse import Namespace
from itertools import pairwise

import pytest
import timm
import torch
from breakhis.data.records import ImageDataset, Record, mix_seeds
from breakhis.training.engine import train_one_epoch
from breakhis.training.recipe import Loss, freeze_backbone, make_mixup, make_optimizer, make_scheduler, set_train
from PIL import Image
from torch.nn import functional as F
from torchvision.transforms import ColorJitter, Compose, PILToTensor

import kfde_layers


def test_the_loss_is_cross_entropy():
    logits, targets = torch.randn(6, 3), torch.tensor([0, 0, 0, 1, 1, 2])
    plain = Loss(targets.tolist(), 3, class_weights=False, smoothing=0.0)
    torch.testing.assert_close(plain(logits, targets), F.cross_entropy(logits, targets))
    soft = F.one_hot(targets, 3).float()
    torch.testing.assert_close(plain(logits, soft), F.cross_entropy(logits, targets))


def test_class_weights_give_each_class_the_same_share_of_an_epoch():
    targets = torch.tensor([0, 0, 0, 1, 1, 3])  # class 2 of 4 has no image
    loss = Loss(targets.tolist(), 4, class_weights=True, smoothing=0.0)
    torch.testing.assert_close(loss.weight, torch.tensor([6 / 9, 6 / 6, 0, 6 / 3]))
    assert loss.weight[targets].mean() == pytest.approx(1)
    logits = torch.randn(6, 4)
    each = F.cross_entropy(logits, targets, reduction="none")
    wanted = torch.stack([each[:3].mean(), each[3:5].mean(), each[5]]).mean()
    torch.testing.assert_close(loss(logits, targets), wanted)
    # Halves of a batch, as two processes have them, have the batch's loss as their mean.
    torch.testing.assert_close((loss(logits[:3], targets[:3]) + loss(logits[3:], targets[3:])) / 2, wanted)


def test_smoothing_reaches_class_targets_and_leaves_mixed_ones_to_mixup():
    logits, targets = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    smooth = Loss(targets.tolist(), 3, class_weights=False, smoothing=0.1)
    torch.testing.assert_close(smooth(logits, targets), F.cross_entropy(logits, targets, label_smoothing=0.1))
    mixed = torch.full((4, 3), 1 / 3)
    torch.testing.assert_close(smooth(logits, mixed), F.cross_entropy(logits, mixed))


def test_a_frozen_backbone_leaves_kfde_and_the_classifier():
    model = timm.create_model("kfde_convnextv2_atto", num_classes=2)
    freeze_backbone(model)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if ".kfde." in name or name.startswith("head.fc.")}

    resnet = kfde_layers.insert(timm.create_model("resnet18", num_classes=2), {"layer4": kfde_layers.CSFE})
    freeze_backbone(resnet)
    trained = {name for name, parameter in resnet.named_parameters() if parameter.requires_grad}
    assert trained == {"layer4.kfde.cfe.weight", "layer4.kfde.cfe.bias", "fc.weight", "fc.bias"}


def test_frozen_batch_norms_keep_their_statistics():
    model = timm.create_model("resnet18", num_classes=2)
    set_train(model)
    assert all(module.training for module in model.modules())
    freeze_backbone(model)
    set_train(model)
    before = model.bn1.running_mean.clone()
    model(torch.randn(2, 3, 64, 64))
    assert torch.equal(model.bn1.running_mean, before)
    assert model.training


def flags(**changes) -> Namespace:
    defaults = {"lr": 1.0, "weight_decay": 0.1, "layer_decay": 1, "epochs": 4, "warmup_epochs": 1, "smoothing": 0.1}
    return Namespace(**defaults | {"mixup": 0, "cutmix": 0} | changes)


def test_layer_decay_spares_kfde_and_the_head():
    model = timm.create_model("kfde_convnextv2_atto", num_classes=2)
    groups = make_optimizer(flags(layer_decay=0.5), model).param_groups
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    named = dict(model.named_parameters())
    assert scale[id(named["head.fc.weight"])] == scale[id(named["stages.3.kfde.csfe.cfe.weight"])] == 1
    assert scale[id(named["stem.0.weight"])] < 0.1
    decays = {group["weight_decay"] for group in groups}
    assert decays == {0.0, 0.1}
    plain = make_optimizer(flags(), model).param_groups
    assert all(group.get("lr_scale", 1) == 1 for group in plain)


def test_warm_up_then_cosine_to_zero():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = make_scheduler(flags(), optimizer, updates_per_epoch=10)
    rates = []
    for update in range(41):
        scheduler.step_update(update)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates[0] == pytest.approx(0.01)
    assert rates[5] == pytest.approx(0.505)
    assert max(rates) == rates[10] == pytest.approx(1)
    assert all(after < before for before, after in pairwise(rates[10:]))
    assert rates[40] == pytest.approx(0, abs=1e-6)


def test_mixup_is_there_where_it_is_wanted():
    assert make_mixup(flags(), 2) is None
    images, targets = torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 0, 1])
    mixed, soft = make_mixup(flags(mixup=1.0), 2)(images.clone(), targets)
    assert soft.shape == (4, 2)
    torch.testing.assert_close(soft.sum(dim=1), torch.ones(4))
    assert not torch.equal(mixed, images)


def test_random_pictures_depend_on_seed_epoch_and_index_alone(tmp_path):
    records = []
    for index in range(3):
        path = tmp_path / f"{index}.png"
        Image.new("RGB", (40, 40), (90, 120, 150)).save(path)
        records.append(Record(path, {"binary": "a"}, "p", "p"))
    transform = Compose([ColorJitter(0.5, 0.5, 0.5), PILToTensor()])

    def picture(index: int, epoch: int = 0, seed: int = 0) -> torch.Tensor:
        data = ImageDataset(records, "binary", ["a"], transform, seed)
        data.epoch = epoch
        return data[index][0]

    torch.manual_seed(1)
    first = picture(0)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert torch.equal(picture(0), first)
    assert torch.equal(torch.get_rng_state(), state)  # what drop path draws next stays what it was
    others = [picture(1), picture(2), picture(0, epoch=1), picture(0, seed=1)]
    assert all(not torch.equal(first, other) for other in others)
    assert len({mix_seeds(*seeds) for seeds in ((0, 1), (1, 0), (0, 0), (1,), (0,))}) == 5


def test_a_loss_that_is_no_number_names_the_step_and_the_files():
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    images = torch.ones(6, 2)
    images[3] = torch.nan
    batches = [(images[i : i + 2], torch.zeros(2, dtype=torch.long), torch.arange(i, i + 2)) for i in (0, 2, 4)]
    scheduler = make_scheduler(flags(), optimizer, updates_per_epoch=3)
    names = [f"image{i}.png" for i in range(6)]
    with pytest.raises(FloatingPointError, match=r"finite, got nan in epoch 5, step 2: image2.png, image3.png"):
        train_one_epoch(accelerator, model, batches, F.cross_entropy, optimizer, scheduler, 4, names)
    assert torch.isfinite(model.weight).all()  # the step was not taken


def test_a_gradient_that_is_no_number_stops_before_it_reaches_the_weights():
    from accelerate import Accelerator

    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batches = [(torch.zeros(2, 2), torch.zeros(2, dtype=torch.long), torch.arange(2))]
    scheduler = make_scheduler(flags(), optimizer, updates_per_epoch=1)

    def loss_fn(logits, targets):
        return (logits - logits.detach()).abs().sqrt().sum()  # 0, with an infinite slope

    with pytest.raises(FloatingPointError, match="gradient must be finite, got norm nan in epoch 1, step 1: a, b"):
        train_one_epoch(Accelerator(cpu=True), model, batches, loss_fn, optimizer, scheduler, 0, ["a", "b"])
    assert torch.isfinite(model.weight).all()
