"""The timm models; importing this package registers them."""

from kfde_layers.models.kfde_convnextv2 import KFDEConvNeXt

__all__ = ["KFDEConvNeXt"]
