import argparse

import pytest
import torch
from breakhis.training.argument_types import number, torch_device


@pytest.mark.parametrize("text", ["cpu", "auto"])
def test_a_device_that_holds_numbers_is_taken(text):
    assert torch.ones(1, device=torch_device(text)).item() == 1


@pytest.mark.parametrize("text", ["meta", "cuda:99", "nonsense", "", "vulkan", "cpu:x"])
def test_any_other_device_is_refused_with_its_name(text):
    with pytest.raises(argparse.ArgumentTypeError, match=f"must be 'auto' or a device of this machine, got '{text}'"):
        torch_device(text)


@pytest.mark.parametrize("text", ["1000001", "-1", "1" + "0" * 30])
@pytest.mark.parametrize("kind", [int, float])
def test_a_number_has_limits_on_both_sides(kind, text):
    with pytest.raises(argparse.ArgumentTypeError, match=r"must be from 0 to 1000000, got "):
        number(kind, 0)(text)


@pytest.mark.parametrize("text", ["nan", "inf", "-inf", "1e400"])
def test_a_number_is_finite(text):
    with pytest.raises(argparse.ArgumentTypeError, match=r"must be from -5 to 1000000, got (nan|-?inf)"):
        number(float, -5)(text)


def test_the_limits_themselves_are_taken():
    assert [number(int, 3, 5)(text) for text in ("3", "5")] == [3, 5]
    assert (number(int, 0)("1000000"), number(float, 0)("1e6")) == (10**6, 1e6)
