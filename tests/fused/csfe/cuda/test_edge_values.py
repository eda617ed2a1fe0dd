"""The kernels where floating-point numbers are at their limits: large means, all magnitudes, thresholds, 16 bits."""

from contextlib import nullcontext

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from kfde_layers.fused.csfe.cuda import launch
from kfde_layers.fused.csfe.options import CsfeOptions
from kfde_layers.testing import random_affine, random_tensor
from tests.support.csfe_kernels import EPS, OPERATORS, check, one_launch_for_each_step
from tests.support.gates import AT_THRESHOLD, groups_of_one_value
from tests.support.inputs import LAYOUTS
from tests.support.kernels import DEVICE, recorded, runs_kernels, sigmoid_may_overflow, the_launch_of

pytestmark = [*runs_kernels, sigmoid_may_overflow, pytest.mark.usefixtures("guards")]


@pytest.mark.parametrize("way", ["as in use", "steps"])
def test_an_element_at_the_threshold_is_closed(way):
    x, weight = groups_of_one_value(device=DEVICE)
    for bias, expected in AT_THRESHOLD:
        with one_launch_for_each_step() if way == "steps" else nullcontext():
            y, *_ = launch.launch_forward(x, weight, torch.full_like(weight, bias), CsfeOptions(num_groups=2, eps=EPS))
        assert y[0, :, 0, 0].tolist() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("first", "last"), [(1.0, -1.0), (1.0, -1.0 - 2**-21), (1.0, -1.0 + 2**-21), (0.0, 0.0), (2e-7, 3e-7)]
)
def test_a_sum_of_gamma_near_zero_is_replaced(first, last):
    # A sum below 1e-6 becomes 1e-6 with the same sign. Then every gate is 0 or 1, and the rest can be compared exactly.
    # Where all of gamma is small, the gates lie between, and the constant sum must get no gradient.
    x = random_tensor(2, 2, 5, 7, seed=11)
    weight, bias = torch.tensor([first, last]), torch.tensor([0.5, -0.3])
    assert abs(float(weight.double().sum())) < 1e-6
    check("csfe", x, 1, affine=(weight, bias), margin=-1.0 if first == 0 else 1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("mean", [1e4, 1e6])  # float32 holds 1e6 to a step of 0.06
def test_survives_a_large_mean(mean, operator, layout):
    x = random_tensor(2, 6, 7, 9, seed=7, mean=mean, memory_format=LAYOUTS[layout])
    x[:, ::2] += 3 * random_tensor(2, 3, 1, 1, seed=8)  # the channels of a group differ
    check(operator, x, 2)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_large_mean_in_several_chunks(layout):
    x = random_tensor(1, 2, 71, 73, seed=9, mean=1e6, memory_format=LAYOUTS[layout])
    with recorded(launch, run=True) as launches:
        check("csfe", x, 1, ways=["steps"])
    assert the_launch_of(launches, "csfe_statistics_kernel").grid[1] > 2


@pytest.mark.parametrize("magnitude", [1e-15, 1e12, 1e15])
@pytest.mark.parametrize("operator", OPERATORS)
def test_survives_every_magnitude(operator, magnitude):
    check(operator, magnitude * random_tensor(2, 6, 7, 9, seed=7, mean=2.0), 2)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("parameters", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype, parameters, layout):
    affine = random_affine(10, seed=1, dtype=parameters)
    x = random_tensor(3, 10, 5, 7, seed=8, dtype=dtype, memory_format=LAYOUTS[layout])
    check("csfe", x, 2, affine=affine)
