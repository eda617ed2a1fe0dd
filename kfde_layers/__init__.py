"""Attention layers of KFDE (CFE, SFE, CSFE, MFDF) for PyTorch, and the timm models `kfde_convnextv2_*`."""

from kfde_layers import functional
from kfde_layers import models as models  # registers them with timm
from kfde_layers.insertion import insert, insertion_points, remove
from kfde_layers.layers import CFE, CSFE, MFDF, SFE

__version__ = "0.1.0"

__all__ = ["CFE", "CSFE", "MFDF", "SFE", "functional", "insert", "insertion_points", "remove"]
