"""What is timed on one shape: the layers in every form, and their peers."""

from collections.abc import Callable
from typing import NamedTuple

import textbook
import torch
from checks import same_parameters
from timm.layers import EcaModule, SEModule
from timm.layers.cbam import CbamModule
from timm.layers.selective_kernel import SelectiveKernel
from torch import nn

import kfde_layers
from kfde_layers.testing import scatter_parameters

LAYERS: dict[str, tuple[Callable[..., nn.Module], Callable[[int], nn.Module]]] = {
    "CFE": (kfde_layers.CFE, textbook.CFE),
    "SFE": (kfde_layers.SFE, textbook.SFE),
    "CSFE": (kfde_layers.CSFE, textbook.CSFE),
    "MFDF": (kfde_layers.MFDF, textbook.MFDF),
}
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
    """One line of the tables."""

    subject: str  # the layer, or "peer"
    name: str
    module: nn.Module
    plain: nn.Module | None  # the textbook form of what the candidate claims to compute


def candidates(channels: int, device: str, dtype: torch.dtype, compiled: bool) -> list[Candidate]:
    """Every module to time; all forms of a layer have the same parameters."""
    found: list[Candidate] = []
    for subject, (make, make_plain) in LAYERS.items():
        plain = make_plain(channels).to(device, dtype)
        scatter_parameters(plain, deviation=0.1)
        forms = {"textbook": plain}
        for impl in IMPLS:
            forms[impl] = make(channels, impl=impl).to(device, dtype)
            same_parameters(plain, forms[impl])
        if compiled and subject in COMPILED:
            for name in ("textbook", "auto"):
                forms[f"{name} compiled"] = torch.compile(forms[name], dynamic=False)
        # In 16 bits the textbook form rounds its own gates shut: there it is a clock, and claims nothing.
        exact = {name for name in forms if not name.startswith("textbook") or dtype is torch.float32}
        found += [Candidate(subject, name, form, plain if name in exact else None) for name, form in forms.items()]
    return found + [Candidate("peer", name, make(channels).to(device, dtype), None) for name, make in PEERS.items()]
