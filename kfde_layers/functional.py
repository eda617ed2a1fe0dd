"""The layers without their parameters, as `torch.nn.functional` is to `torch.nn`."""

from kfde_layers.ops.cfe import cfe
from kfde_layers.ops.csfe import csfe
from kfde_layers.ops.mfdf import mfdf
from kfde_layers.ops.sfe import sfe

__all__ = ["cfe", "csfe", "mfdf", "sfe"]
