"""The modules that are measured on one shape: every implementation of each layer, and their peers."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from timm.layers import EcaModule, SEModule
from timm.layers.cbam import CbamModule
from timm.layers.selective_kernel import SelectiveKernel
from torch import nn

import kfde_layers
from benchmarks import textbook
from benchmarks.calls import copy_parameters
from kfde_layers.testing import scatter_parameters

LAYERS: dict[str, tuple[Callable[..., nn.Module], Callable[[int], nn.Module]]] = {
    "CFE": (kfde_layers.CFE, textbook.CFE),
    "SFE": (kfde_layers.SFE, textbook.SFE),
    "CSFE": (kfde_layers.CSFE, textbook.CSFE),
    "MFDF": (kfde_layers.MFDF, textbook.MFDF),
}
"""The layer and its textbook implementation."""
IMPLS = ("auto", "fused", "reference")
COMPILED = ("CSFE", "MFDF")  # compiling all four would take most of a run
PEERS: dict[str, Callable[[int], nn.Module]] = {
    "SE": SEModule,
    "ECA": EcaModule,
    "CBAM": CbamModule,
    "SK depthwise": lambda channels: SelectiveKernel(channels, groups=channels, split_input=False),
    "depthwise 7x7": lambda channels: nn.Conv2d(channels, channels, 7, padding=3, groups=channels),
}


class Candidate(NamedTuple):
    """A module to measure; one line of the tables."""

    subject: str
    """The layer, or "peer"."""
    name: str
    """The implementation or the peer."""
    module: nn.Module
    """The module itself."""
    plain: nn.Module | None
    """The textbook implementation that the results are compared with; None: nothing is compared."""


def candidates(channels: int, device: str, dtype: torch.dtype, compiled: bool) -> list[Candidate]:
    """Make every module to measure. All implementations of a layer have the same parameters.

    Args:
        channels: Number of channels of the input.
        device: "cpu" or "cuda".
        dtype: Dtype of the parameters.
        compiled: Whether to add compiled implementations.
    """
    modules: list[Candidate] = []
    for subject, (make, make_plain) in LAYERS.items():
        plain = make_plain(channels).to(device, dtype)
        scatter_parameters(plain, deviation=0.1)
        implementations = {"textbook": plain}
        for impl in IMPLS:
            implementations[impl] = make(channels, impl=impl).to(device, dtype)
            copy_parameters(plain, implementations[impl])
        if compiled and subject in COMPILED:
            for name in ("textbook", "auto"):
                implementations[f"{name} compiled"] = torch.compile(implementations[name], dynamic=False)
        for name, module in implementations.items():
            # In 16 bits the textbook implementation rounds its own gates shut: it is timed only, not compared.
            compared = dtype is torch.float32 or not name.startswith("textbook")
            modules.append(Candidate(subject, name, module, plain if compared else None))
    return modules + [Candidate("peer", name, make(channels).to(device, dtype), None) for name, make in PEERS.items()]
