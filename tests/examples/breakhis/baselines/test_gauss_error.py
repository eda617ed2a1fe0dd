import math

import pytest
import torch
from breakhis.baselines.gauss_error import GaussErrorScheduler


def make_optimizer(*rates: float) -> torch.optim.Optimizer:
    return torch.optim.SGD([{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": rate} for rate in rates])


def rates(optimizer: torch.optim.Optimizer) -> list[float]:
    return [group["lr"] for group in optimizer.param_groups]


def rate_after(epoch: float, **options) -> float:
    """Return the share of a rate of 1 that is left after an epoch of 300."""
    optimizer = make_optimizer(1.0)
    GaussErrorScheduler(optimizer, 300, **options).step(epoch)
    return rates(optimizer)[0]


@pytest.mark.parametrize(
    ("epoch", "rate"), [(0, 0.01), (75, 0.009832), (150, 0.00505), (225, 0.000268), (300, 0.0001), (900, 0.0001)]
)
def test_the_rates_of_bhcnet(epoch, rate):
    optimizer = make_optimizer(0.01)
    scheduler = GaussErrorScheduler(optimizer, 300, alpha=-3, beta=3, lr_min=1e-4)
    assert rates(optimizer) == [pytest.approx(0.01, abs=5e-7)]
    scheduler.step(epoch)
    assert rates(optimizer) == [pytest.approx(rate, abs=5e-7)]


def test_alpha_stays_at_the_first_rate_and_beta_at_the_last():
    middle = rate_after(150)
    assert middle == pytest.approx(0.5)
    assert rate_after(150, alpha=-5) > middle > rate_after(150, beta=5)
    assert rate_after(100, alpha=-1, beta=2) == pytest.approx(0.5)  # erf(0) after a third


def test_a_warm_up_is_linear_and_comes_before_the_curve():
    optimizer = make_optimizer(1.0)
    scheduler = GaussErrorScheduler(optimizer, 20, alpha=-1, beta=1, warmup_t=10, warmup_lr_init=0.2, t_in_epochs=False)
    assert rates(optimizer) == [pytest.approx(0.2)]
    last = (1 - math.erf(1)) / 2
    for update, expected in [(5, 0.6), (10, (1 + math.erf(1)) / 2), (20, 0.5), (30, last), (99, last)]:
        scheduler.step_update(update)
        assert rates(optimizer) == [pytest.approx(expected)]
    scheduler.step(0)  # it counts updates, not epochs
    assert rates(optimizer) == [pytest.approx(last)]


def test_each_group_of_parameters_keeps_its_own_rate():
    optimizer = make_optimizer(1.0, 0.5)
    optimizer.param_groups[1]["lr_scale"] = 0.1
    GaussErrorScheduler(optimizer, 10).step(5)
    assert rates(optimizer) == [pytest.approx(0.5), pytest.approx(0.025)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"t_initial": 0}, "t_initial must be positive, got 0"),
        ({"alpha": 1}, "alpha must be below 0 and beta above it, got 1 and 3"),
        ({"beta": math.nan}, "alpha must be below 0 and beta above it, got -3 and nan"),
    ],
)
def test_wrong_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        GaussErrorScheduler(make_optimizer(1.0), **{"t_initial": 10, **options})
