import argparse

import pytest
import torch
from breakhis.training.argument_types import torch_device


@pytest.mark.parametrize("text", ["cpu", "auto"])
def test_a_device_that_holds_numbers_is_taken(text):
    assert torch.ones(1, device=torch_device(text)).item() == 1


@pytest.mark.parametrize("text", ["meta", "cuda:99", "nonsense", "", "vulkan", "cpu:x"])
def test_any_other_device_is_refused_with_its_name(text):
    with pytest.raises(argparse.ArgumentTypeError, match=f"must be 'auto' or a device of this machine, got '{text}'"):
        torch_device(text)
