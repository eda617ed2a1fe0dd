import math
from argparse import Namespace
from itertools import pairwise

import pytest
import timm
import torch
from breakhis.training.recipe import Loss, freeze_backbone, make_mixup, make_optimizer, make_scheduler, set_train
from torch.nn import functional as F

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
    losses = F.cross_entropy(logits, targets, reduction="none")
    expected = torch.stack([losses[:3].mean(), losses[3:5].mean(), losses[5]]).mean()
    torch.testing.assert_close(loss(logits, targets), expected)
    # The mean over the halves of a batch, which two processes have, is the loss of the batch.
    torch.testing.assert_close((loss(logits[:3], targets[:3]) + loss(logits[3:], targets[3:])) / 2, expected)


def test_class_targets_are_smoothed_and_mixed_ones_are_not():
    logits, targets = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    smooth = Loss(targets.tolist(), 3, class_weights=False, smoothing=0.1)
    torch.testing.assert_close(smooth(logits, targets), F.cross_entropy(logits, targets, label_smoothing=0.1))
    mixed = torch.tensor([[0.7, 0.3, 0.0], [0.0, 0.4, 0.6], [0.1, 0.1, 0.8], [1.0, 0.0, 0.0]])
    torch.testing.assert_close(smooth(logits, mixed), F.cross_entropy(logits, mixed))


def test_only_kfde_and_the_classifier_of_a_frozen_backbone_train():
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


def make_flags(**changes) -> Namespace:
    """Make the flags of a run that concern the recipe."""
    defaults = {"lr": 1.0, "weight_decay": 0.1, "layer_decay": 1, "epochs": 4, "warmup_epochs": 1, "smoothing": 0.1}
    defaults |= {"opt": "adamw", "mixup": 0, "cutmix": 0, "min_lr": 0, "gauss_error": None}
    return Namespace(**defaults | changes)


def test_the_optimiser_is_the_one_that_the_flag_names():
    model = timm.create_model("resnet18", num_classes=2)
    assert isinstance(make_optimizer(make_flags(), model), torch.optim.AdamW)
    sgd = make_optimizer(make_flags(opt="sgd"), model)
    assert isinstance(sgd, torch.optim.SGD)
    assert (sgd.defaults["momentum"], sgd.defaults["nesterov"]) == (0.9, True)


def test_layer_decay_does_not_change_kfde_and_the_head():
    model = timm.create_model("kfde_convnextv2_atto", num_classes=2)
    groups = make_optimizer(make_flags(layer_decay=0.5), model).param_groups
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    named = dict(model.named_parameters())
    assert scale[id(named["head.fc.weight"])] == scale[id(named["stages.3.kfde.csfe.cfe.weight"])] == 1
    assert scale[id(named["stem.0.weight"])] < 0.1
    decays = {group["weight_decay"] for group in groups}
    assert decays == {0.0, 0.1}
    plain = make_optimizer(make_flags(), model).param_groups
    assert all(group.get("lr_scale", 1) == 1 for group in plain)


def test_warm_up_then_cosine_to_zero():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = make_scheduler(make_flags(), optimizer, updates_per_epoch=10)
    rates = []
    for update in range(41):
        scheduler.step_update(update)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates[0] == pytest.approx(0.01)
    assert rates[5] == pytest.approx(0.505)
    assert max(rates) == rates[10] == pytest.approx(1)
    assert all(after < before for before, after in pairwise(rates[10:]))
    assert rates[40] == pytest.approx(0, abs=1e-6)


def rates(scheduler, count: int) -> list[float]:
    """Return the rate after each number of updates below `count`."""
    values = []
    for update in range(count):
        scheduler.step_update(update)
        values.append(scheduler.optimizer.param_groups[0]["lr"])
    return values


def test_warm_up_then_the_gauss_error_function_to_the_last_rate():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    flags = make_flags(gauss_error=[-2, 4], min_lr=0.1)
    values = rates(make_scheduler(flags, optimizer, updates_per_epoch=10), 41)
    assert values[0] == pytest.approx(0.01)
    assert values[5] == pytest.approx(0.505)
    assert values[10] == pytest.approx(0.1 + 0.9 * (1 + math.erf(2)) / 2)
    assert values[20] == pytest.approx(0.55)  # a third of 30 updates: erf(0)
    assert values[30] == pytest.approx(0.1 + 0.9 * (1 - math.erf(2)) / 2)
    assert values[40] == pytest.approx(0.1)


def test_the_cosine_ends_at_the_last_rate():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    values = rates(make_scheduler(make_flags(min_lr=0.1), optimizer, updates_per_epoch=10), 41)
    assert values[25] == pytest.approx(0.55)
    assert values[40] == pytest.approx(0.1)


def test_mixup_is_off_without_its_flag():
    assert make_mixup(make_flags(), 2) is None
    images, targets = torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 0, 1])
    mixed, soft = make_mixup(make_flags(mixup=1.0), 2)(images.clone(), targets)
    assert soft.shape == (4, 2)
    torch.testing.assert_close(soft.sum(dim=1), torch.ones(4))
    assert not torch.equal(mixed, images)
