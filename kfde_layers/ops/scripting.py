"""Operators that TorchScript and torch.fx record, and that run the functions of these pages."""

from collections.abc import Callable

import torch
from torch import Tensor


def define_operator(schema: str, function: Callable[..., Tensor]) -> None:
    """Define an operator of the package that runs `function`, whose steps autograd differentiates.

    A transform of `torch.func` must see these steps too: it has no rule for the operator as a whole. So the function
    also runs before the first transform does.

    Args:
        schema: As `torch.library.define` takes it, without the package's namespace.
        function: Takes the arguments of the schema by position.
    """
    name, arguments = schema.split("(", maxsplit=1)
    torch.library.define(f"kfde::{name}", f"({arguments}")
    for key in ("CompositeImplicitAutograd", "FuncTorchDynamicLayerFrontMode"):
        torch.library.impl(f"kfde::{name}", key, function)
