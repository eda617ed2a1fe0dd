import math

import pytest
import torch
from breakhis.training.finite import check_scores, check_weights


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_weights_that_are_not_finite_name_the_file_and_the_first_tensor(value, dtype, tmp_path):
    weights = {"a": torch.ones(3, dtype=dtype), "b": torch.ones(2, 5, dtype=dtype), "c": torch.tensor(value)}
    weights["b"][1, 3] = value
    with pytest.raises(ValueError, match=rf"w.pth must hold finite weights, got {value} in b$"):
        check_weights(weights, tmp_path / "w.pth")


def test_any_finite_weights_pass(tmp_path):
    values = {"count": torch.tensor(2**62), "mask": torch.tensor([True]), "none": torch.ones(0), "z": torch.tensor(1j)}
    check_weights(values | {"large": torch.tensor(3e38)}, tmp_path)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_scores_that_are_not_finite_name_the_checkpoint_and_the_first_image(value):
    scores = torch.zeros(5, 3)
    check_scores(scores, list("abcde"), "o/best")
    scores[3, 2] = scores[4, 0] = value
    with pytest.raises(FloatingPointError, match=rf"finite, got \[0.0, 0.0, {value}\] from o/best for the image d$"):
        check_scores(scores, list("abcde"), "o/best")


def test_no_image_has_no_score():
    check_scores(torch.zeros(0, 2), [], "o/best")


def test_numbers_of_eight_bits_are_refused(tmp_path):
    weights = {"a": torch.zeros(2), "b": torch.zeros(2).to(torch.float8_e4m3fn)}
    with pytest.raises(ValueError, match=r"must hold weights that PyTorch computes with, got torch.float8_e4m3fn in b"):
        check_weights(weights, tmp_path)
