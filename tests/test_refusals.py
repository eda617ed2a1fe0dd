"""One table of bad calls: each is refused by a message that names the argument, the wish and the value given."""

import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

from kfde_layers import CFE, CSFE, MFDF, SFE, insert, insertion_points, remove
from kfde_layers.functional import cfe, csfe, mfdf, sfe
from kfde_layers.layers import Blend

X = torch.linspace(-1, 2, 2 * 8 * 5 * 5).reshape(2, 8, 5, 5)
ONES, ZEROS = torch.ones(8), torch.zeros(8)
FC = {
    "fc1_weight": torch.ones(3, 8),
    "fc1_bias": torch.zeros(3),
    "fc2_weight": torch.ones(16, 3),
    "fc2_bias": torch.zeros(16),
}
BRANCHES = [torch.ones(8, 1, 1, 1), torch.ones(8, 1, 3, 3)]


class Row(NamedTuple):
    """A call, and how it is refused."""

    call: Callable[[], object]
    """The call."""
    error: type[Exception]
    """Type of the error."""
    message: str
    """Pattern that the message contains."""


def host() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 6, 3))


def atto(**options: Any) -> nn.Module:
    return timm.create_model("kfde_convnextv2_atto", device="meta", **options)


# Every argument of a kind, by the call that takes a value for it.
INTEGERS: dict[str, list[Callable[[Any], object]]] = {
    "channels": [CFE, CSFE, SFE, MFDF, lambda value: Blend(nn.Identity(), value)],
    "num_groups": [
        lambda value: CFE(8, num_groups=value) if value is not None else cfe(X, ONES, ZEROS, value),
        lambda value: csfe(X, ONES, ZEROS, value),
    ],
    "correction": [lambda value: SFE(8, correction=value), lambda value: sfe(X, correction=value)],
    "kernel_sizes": [lambda value: MFDF(8, kernel_sizes=(3, value))],
    "dilation": [lambda value: MFDF(8, (3, 5), dilation=(1, value)), lambda value: make_mfdf(dilation=[value, 1])],
    "rd_channels": [lambda value: MFDF(8, rd_channels=value) if value is not None else MFDF(8, dilation=[None] * 4)],
    "kfde_stages": [lambda value: atto(kfde_stages=(value,))],
}
BAD_INTEGERS: list[tuple[object, type[Exception], str]] = [
    ("8", TypeError, "an int, got '8' of type str"),
    (8.0, TypeError, "an int, got 8.0 of type float"),
    (True, TypeError, "an int, got True of type bool"),
    (np.float32(3), TypeError, "an int, got .* of type float32"),
    (torch.tensor(2.5), TypeError, "an int, got tensor"),
    (-1, ValueError, "at least [01], got -1"),
    (2**31, ValueError, "at most 2147483647, got 2147483648"),
    (10**30, ValueError, "at most 2147483647, got 10000"),
]

NUMBERS: dict[str, list[Callable[[Any], object]]] = {
    "threshold": [lambda value: CFE(8, threshold=value), lambda value: csfe(X, ONES, ZEROS, 2, threshold=value)],
    "eps": [lambda value: CSFE(8, eps=value), lambda value: cfe(X, ONES, ZEROS, 2, eps=value)],
    "lambd": [lambda value: SFE(8, lambd=value), lambda value: csfe(X, ONES, ZEROS, 2, lambd=value)],
    "beta": [lambda value: CSFE(8, beta=value), lambda value: sfe(X, beta=value)],
    "rd_ratio": [lambda value: MFDF(8, rd_ratio=value)],
}
BAD_NUMBERS: list[tuple[object, type[Exception], str]] = [
    ("0.5", TypeError, "be a number, got '0.5' of type str"),
    (None, TypeError, "be a number, got None of type NoneType"),
    (0.5j, TypeError, "be a number, got 0.5j of type complex"),
    (False, TypeError, "be a number, got False of type bool"),
    (float("nan"), ValueError, ".*, got nan"),
    (float("-inf"), ValueError, ".*, got -inf"),
    (10**400, ValueError, ".*, got 10000"),
]

MAPS: list[Callable[[Any], object]] = [
    CFE(8),
    SFE(8),
    CSFE(8),
    CSFE(8, arrangement="sfe_cfe", impl="reference"),
    MFDF(8),
    MFDF(8, norm_layer=nn.BatchNorm2d),
    Blend(nn.Identity(), 8),
    lambda x: cfe(x, ONES, ZEROS, 2),
    lambda x: csfe(x, ONES, ZEROS, 2),
    lambda x: make_mfdf(x=x),
    MFDF(8).branch_weights,
    CFE(8).gate,
]
BAD_MAPS: list[tuple[Callable[[], object], type[Exception], str]] = [
    (lambda: [1.0], TypeError, "a torch.Tensor, got list"),
    (lambda: X.numpy(), TypeError, "a torch.Tensor, got ndarray"),
    (lambda: X.long(), TypeError, "a floating-point tensor .*, got torch.int64"),
    (lambda: X.to(torch.complex64), TypeError, "a floating-point tensor .*, got torch.complex64"),
    (lambda: X.to_sparse(), TypeError, "a dense tensor of layout torch.strided, got layout torch.sparse_coo"),
    (lambda: X[0], ValueError, r"shape \(N, C, H, W\), got 3 dimensions: \(8, 5, 5\)"),
    (lambda: X[None], ValueError, r"shape \(N, C, H, W\), got 5 dimensions: \(1, 2, 8, 5, 5\)"),
]
BAD_CHANNELS = (lambda: X[:, :6], ValueError, r"8 channels in dimension 1, got 6: \(2, 6, 5, 5\)")

PARAMETERS: dict[str, tuple[Tensor, Callable[[Any], object]]] = {
    "weight": (ONES, lambda value: cfe(X, value, ZEROS, 2)),
    "bias": (ZEROS, lambda value: csfe(X, ONES, value, 2)),
    **{name: (tensor, lambda value, name=name: make_mfdf(**{name: value})) for name, tensor in FC.items()},
    "branch_weights[1]": (BRANCHES[1], lambda value: make_mfdf(branch_weights=[BRANCHES[0], value])),
    "branch_biases[0]": (ZEROS, lambda value: make_mfdf(branch_biases=[value, ZEROS])),
}
BAD_PARAMETERS: list[tuple[Callable[[Tensor], object], type[Exception], str]] = [
    (lambda tensor: None, TypeError, "a torch.Tensor, got NoneType"),
    (lambda tensor: tensor.tolist(), TypeError, "a torch.Tensor, got list"),
    (lambda tensor: tensor.int(), TypeError, "a floating-point tensor .*, got torch.int32"),
    (lambda tensor: tensor[None], ValueError, r"shape \(.*\), got .*\(1, "),
]

CHOICES: dict[str, list[Callable[[Any], object]]] = {
    "impl": [
        *(lambda value, layer=layer: layer(8, impl=value) for layer in (CFE, SFE, CSFE, MFDF)),
        lambda value: sfe(X, impl=value),
        lambda value: make_mfdf(impl=value),
    ],
    "arrangement": [
        lambda value: CSFE(8, arrangement=value),
        lambda value: csfe(X, ONES, ZEROS, 2, arrangement=value),
    ],
    "fusion": [lambda value: CSFE(8, fusion=value), lambda value: csfe(X, ONES, ZEROS, 2, fusion=value)],
}
BAD_CHOICES = ["", "AUTO", "cfe-sfe", None, 1]


def make_mfdf(**changes: Any) -> Tensor:
    return mfdf(**({"x": X, "branch_weights": BRANCHES, "branch_biases": None} | FC | changes))


def rows() -> Iterator[Row]:
    for name, calls in INTEGERS.items():
        for call in calls:
            for value, error, wish in BAD_INTEGERS:
                yield Row(lambda call=call, value=value: call(value), error, f"{name} must be {wish}")
    for name, calls in NUMBERS.items():
        for call in calls:
            for value, error, wish in BAD_NUMBERS:
                yield Row(lambda call=call, value=value: call(value), error, f"{name} must {wish}")
    for call in MAPS:
        for make, error, wish in BAD_MAPS if isinstance(call, SFE) else [*BAD_MAPS, BAD_CHANNELS]:
            verb = "have" if error is ValueError else "be"
            yield Row(lambda call=call, make=make: call(make()), error, f"x must {verb} {wish}")
    for name, (tensor, call) in PARAMETERS.items():
        for change, error, wish in BAD_PARAMETERS:
            verb = "have" if error is ValueError else "be"
            message = f"{re.escape(name)} must {verb} {wish}"
            yield Row(lambda call=call, change=change, tensor=tensor: call(change(tensor)), error, message)
    for name, calls in CHOICES.items():
        for call in calls:
            for value in BAD_CHOICES:
                message = f"{name} must be one of '.*', got {value!r}"
                yield Row(lambda call=call, value=value: call(value), ValueError, message)


SINGLE = [
    Row(lambda: CFE(0), ValueError, "channels must be at least 1, got 0"),
    Row(lambda: CFE(7), ValueError, "channels must be even, since CFE crosses two halves of them, got 7"),
    Row(lambda: CFE(8, num_groups=3), ValueError, "num_groups must divide channels = 8, got 3"),
    Row(lambda: CSFE(8, num_groups=0), ValueError, "num_groups must be at least 1, got 0"),
    Row(lambda: CFE(8, threshold=0), ValueError, "threshold must lie strictly between 0 and 1, got 0"),
    Row(lambda: CFE(8, threshold=np.float32(1)), ValueError, "threshold must lie strictly between 0 and 1, got 1.0"),
    Row(lambda: CFE(8, eps=0), ValueError, "eps must be positive and finite, got 0"),
    Row(lambda: CFE(8, eps=1e-50), ValueError, "eps must be from 1.18e-38 to 3.4e.38, as float32 has it, got 1e-50"),
    Row(lambda: SFE(8, lambd=-1), ValueError, "lambd must be positive and finite, got -1"),
    Row(lambda: SFE(8, lambd=1e39), ValueError, "lambd must be from 1.18e-38 to 3.4e.38, as float32 has it, got 1e"),
    Row(lambda: SFE(8, beta=-1e39), ValueError, "beta must be from -3.4e.38 to 3.4e.38, as float32 has it, got -1e"),
    Row(lambda: MFDF(8, kernel_sizes="35"), TypeError, "kernel_sizes must be a sequence of odd ints, got '35'"),
    Row(lambda: MFDF(8, kernel_sizes={3: 5}), TypeError, "kernel_sizes must be a sequence of odd ints, got {3: 5}"),
    Row(lambda: MFDF(8, kernel_sizes=np.ones((2, 2))), TypeError, "kernel_sizes must be a sequence of odd ints"),
    Row(lambda: MFDF(8, kernel_sizes=[3, 4]), ValueError, "kernel_sizes must be odd, so .*, got 4"),
    Row(lambda: MFDF(8, kernel_sizes=[]), ValueError, "kernel_sizes must have at least one entry, got none"),
    Row(lambda: MFDF(8, dilation=np.array([1, 2])), ValueError, "dilation must be an int or have 4 entries"),
    Row(lambda: MFDF(8, dilation=1.0), TypeError, "dilation must be a sequence of ints, or an int, got 1.0"),
    Row(lambda: MFDF(8, groups="dense"), ValueError, "groups must be an int or 'depthwise', got 'dense'"),
    Row(lambda: MFDF(8, groups=3), ValueError, "groups must divide channels = 8, got 3"),
    Row(lambda: MFDF(8, bias=1), TypeError, "bias must be a bool, got 1 of type int"),
    Row(lambda: MFDF(8, norm_layer="bn"), TypeError, "norm_layer must be a class or function .*, got 'bn'"),
    Row(lambda: MFDF(8, act_layer=nn.ReLU()), TypeError, r"act_layer must be a class or function .*, got ReLU\(\)"),
    Row(lambda: MFDF(8, norm_layer=lambda channels: None), TypeError, "norm_layer must make a module, got None"),
    Row(lambda: MFDF(8, act_layer=lambda: torch.relu), TypeError, "act_layer must make a module, got <built-in"),
    Row(lambda: MFDF(8, rd_ratio=0), ValueError, "rd_ratio must be positive and finite, got 0"),
    Row(lambda: MFDF(8, groups=1, impl="fused"), NotImplementedError, "needs depthwise branches .*, got groups=1"),
    *(
        Row(
            lambda layer=layer, dtype=dtype: layer(8, dtype=dtype),
            TypeError,
            f"dtype must be None or one of .* {dtype}",
        )
        for layer in (CFE, CSFE, MFDF, lambda channels, dtype: Blend(nn.Identity(), channels, dtype=dtype))
        for dtype in (torch.int64, torch.complex64, torch.float8_e5m2, "float32")
    ),
    Row(lambda: Blend(CSFE, 8), TypeError, "block must be a Module, got"),
    Row(lambda: Blend(nn.AdaptiveAvgPool2d(1), 8)(X), ValueError, "the output of block must have shape"),
    Row(lambda: Blend(nn.Flatten(), 8)(X), ValueError, "the output of block must have shape"),
    Row(lambda: cfe(X, torch.ones(6), ZEROS, 2), ValueError, r"bias must have shape \(6,\), got \(8,\)"),
    Row(lambda: cfe(X, ONES.to("meta"), ZEROS, 2), ValueError, "weight must be on the device of x, cpu, got meta"),
    Row(lambda: make_mfdf(branch_weights=X), TypeError, "branch_weights must be a sequence of tensors, got shape"),
    Row(lambda: make_mfdf(branch_weights=[]), ValueError, "branch_weights must have at least one entry, got none"),
    Row(lambda: make_mfdf(branch_biases=[ZEROS]), ValueError, "branch_biases must be None or have 2 entries, got 1"),
    Row(lambda: make_mfdf(dilation=[1]), ValueError, r"dilation must be an int or have 2 entries, .*, got \[1\]"),
    Row(lambda: make_mfdf(groups=5), ValueError, "groups must divide channels = 8, got 5"),
    Row(lambda: atto(csfe=dict(bogus=1)), TypeError, "csfe must hold arguments of CSFE"),
    Row(lambda: atto(mfdf=dict(bogus=1)), TypeError, "mfdf must hold arguments of MFDF"),
    Row(lambda: atto(csfe=1), TypeError, "csfe must be a bool or a dict of layer options, got 1 of type int"),
    Row(lambda: atto(mfdf="yes"), TypeError, "mfdf must be a bool or a dict of layer options, got 'yes' of type str"),
    Row(lambda: atto(kfde_stages=3), TypeError, "kfde_stages must be a sequence of stages, such as"),
    Row(lambda: atto(kfde_stages=(4,)), ValueError, "kfde_stages must lie in 0 ... 3, got 4"),
    Row(lambda: atto(identity_start=1), TypeError, "identity_start must be a bool, got 1 of type int"),
    Row(lambda: atto(mfdf=dict(norm_layer="bn9")), ValueError, r"mfdf\['norm_layer'\] must be .*, got 'bn9'"),
    Row(lambda: insert(3, {}), TypeError, "model must be a Module, got 3 of type int"),
    Row(lambda: insert(host(), ["0"]), TypeError, "blocks must be a dict from module names to blocks, got"),
    Row(lambda: insert(host(), {0: CSFE}), TypeError, "each key of blocks must be a str, got 0 of type int"),
    Row(lambda: insert(host(), {"0": 3}), TypeError, "the block at '0' must be a module, a function"),
    Row(lambda: insert(host(), {"7": CSFE}), ValueError, "cannot insert at '7': the model has no submodule"),
    Row(lambda: insert(host(), {"0": nn.Flatten}), (TypeError, ValueError), "the block at '0' "),
    Row(lambda: insert(host(), {"0": nn.Sigmoid().double}), (TypeError, ValueError), "the block at '0' "),
    Row(
        lambda: insert(host(), {"0": CSFE}, identity_start="yes"), TypeError, "identity_start must be a bool, got 'yes'"
    ),
    Row(lambda: insert(host(), {"0": CSFE}, example_input=[1]), TypeError, "example_input must be a Tensor, got"),
    Row(lambda: insert(host(), {"0": CSFE}, example_input=X[0]), ValueError, "example_input must have shape"),
    Row(lambda: insertion_points(host, example_input=X), TypeError, "model must be a Module, got"),
    Row(lambda: insertion_points(host(), example_input=X), ValueError, "the model does not run on an input of shape"),
    Row(lambda: insertion_points(nn.Flatten()), ValueError, "example_input is needed"),
    Row(lambda: insertion_points(torch.jit.script(host())), ValueError, "model must not be scripted yet"),
    Row(lambda: remove(host(), 3), TypeError, "names must be a list of module names or None, got 3"),
    Row(lambda: remove(host(), "0"), TypeError, r"names must be a list .*, got the string '0': did you mean \['0'\]"),
    Row(lambda: remove(host(), ["0"]), ValueError, "names must be modules into which a block was inserted .*, got '0'"),
]

ROWS = [*rows(), *SINGLE]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.message)
@pytest.mark.filterwarnings("ignore:Sparse:UserWarning")
def test_a_bad_call_is_refused_by_name(row):
    with pytest.raises(row.error, match=row.message):
        row.call()


def test_the_table_is_long():
    assert len(ROWS) >= 250
