"""The layers, one per file: an `nn.Module` each, which owns parameters and calls an operation."""

from kfde_layers.layers.blend import Blend
from kfde_layers.layers.cfe import CFE
from kfde_layers.layers.csfe import CSFE
from kfde_layers.layers.mfdf import MFDF
from kfde_layers.layers.sfe import SFE

__all__ = ["CFE", "CSFE", "MFDF", "SFE", "Blend"]
