"""GLNET, which joins a description of the image with one of its regions: the timm model `glnet_resnet101`."""

from typing import Any

import torch
from einops import rearrange
from timm.models import DefaultCfg, register_model
from torch import Tensor, nn
from torch.nn import functional as F

from breakhis.baselines.checks import check_choice, check_int, check_share
from breakhis.baselines.trunk import TrunkNetwork, build_on_trunk, make_trunk, resnet_cfgs

__all__ = ["GLNet"]  # register_model adds the factory

_GRID = (3, 4)  # rows and columns; cuts fields of 700 x 460 px, and BACH's 2048 x 1536 px, into near squares


class GLNet(TrunkNetwork):
    r"""GLNET: a global vector of the feature map, and the maximum of a local vector over 3 x 4 regions.

    \[ \text{logits} = W\, (g \,\|\, l) + b, \qquad g = \mathrm{ReLU}(\mathrm{BN}(V\, \mathrm{mean}_{hw} f(x))), \qquad
       l = \max_{r}\, \mathrm{mean}_{p \in r}\, \mathrm{ReLU}(\mathrm{BN}(\mathrm{conv}_{1 \times 1}(f(x))))_p \]

    with f the trunk, r the 12 regions, p the positions in a region, and `||` the concatenation. Both vectors have 512
    numbers.

    Source: Khan, Zhao, Asif, Chen, Zhu (2024), The Journal of Supercomputing 80(6): 7316-7348, doi
    10.1007/s11227-023-05742-x.

    Fidelity: in the spirit of the paper. Known is only its abstract: a ResNet-101 with ImageNet weights and added
    convolution, regularisation and dense layers, a global descriptor, a local one of regions, and patches of "3x4".
    Unknown: all layers and widths, whether patches are cut from the image or from its map, how both are fused, the
    training and the split. That the grid has 3 rows and 4 columns is inferred from the shape of the images: a field of
    700 x 460 px has near-square regions. Regions of a square image are as wide as 3 and as high as 4.

    Args:
        backbone: A timm model whose last feature map is (B, C, h, w).
        hidden: Length of each of the two vectors.
        tiles: "map": regions of the map; "image": the image is cut into 12 tiles, each is enlarged to the size of the
            image and passes the same trunk, at 13 times the cost. The tiles are cut after the image is enlarged.
            Grad-CAM then shows what the global vector sees.
        region_drop_rate: Share of the channels that are dropped from the local map.
        in_chans: Channels of the image.
        num_classes: Number of classes; 0: no classifier.
        global_pool: Pooling of the global vector: "avg", "max" or "avgmax"; "": the network returns the map.
        drop_rate: Dropout of the global vector.

    Raises:
        TypeError: A count is not an integer.
        ValueError: An argument is outside its range.
    """

    def __init__(
        self,
        backbone: str = "resnet101",
        *,
        hidden: int = 512,
        tiles: str = "map",
        region_drop_rate: float = 0.2,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        drop_rate: float = 0.5,
    ) -> None:
        check_int("hidden", hidden, minimum=1)
        check_choice("tiles", tiles, ("map", "image"))
        check_share("region_drop_rate", region_drop_rate)
        super().__init__(make_trunk(backbone, in_chans), 2 * hidden, drop_rate)
        self.tiles = tiles
        # Grad-CAM needs a module that sees the map of the image alone: the trunk may see tiles as well.
        self.image_map = nn.Identity()
        self.feature_info.append({**self.feature_info[-1], "module": "image_map"})
        self.global_branch = nn.Sequential(
            nn.Linear(self.num_features, hidden, bias=False),
            nn.BatchNorm1d(hidden),
            nn.ReLU(),
            nn.Dropout(self.drop_rate),
        )
        self.local_branch = nn.Sequential(
            nn.Conv2d(self.num_features, hidden, 1, bias=False),
            nn.BatchNorm2d(hidden),
            nn.ReLU(),
            nn.Dropout2d(region_drop_rate),
            nn.AdaptiveAvgPool2d(_GRID),
        )
        self.reset_classifier(num_classes, global_pool)

    def forward_features(self, x: Tensor) -> Tensor:
        """Map (B, in_chans, H, W) to (B, C, H / 32, W / 32), rounded up."""
        return self.image_map(super().forward_features(x))

    def tile_maps(self, x: Tensor) -> Tensor:
        """Compute the maps of the image's tiles, laid out like the tiles: (B, C, 3 h, 4 w)."""
        rows, columns = _GRID
        height, width = x.shape[2:]
        x = F.interpolate(x, (rows * height, columns * width), mode="bilinear")
        tiles = rearrange(x, "b c (rows h) (columns w) -> (b rows columns) c h w", rows=rows, columns=columns)
        maps = super().forward_features(tiles)
        return rearrange(maps, "(b rows columns) c h w -> b c (rows h) (columns w)", rows=rows, columns=columns)

    def describe(self, x: Tensor, regions: Tensor | None = None) -> Tensor:
        """Turn the feature map, (B, C, h, w), into (B, 2 hidden).

        Args:
            x: The map.
            regions: The map that the regions are cut from; None: `x`.
        """
        local = self.local_branch(x if regions is None else regions)
        return torch.cat([self.global_branch(self.global_pool(x)), local.amax((2, 3))], dim=1)

    def forward_head(self, x: Tensor, pre_logits: bool = False, regions: Tensor | None = None) -> Tensor:
        """Classify a feature map; with `pre_logits`, return the vector before the classifier.

        Args:
            x: The map.
            pre_logits: Whether the classifier is left out.
            regions: With `tiles="image"`, the result of `tile_maps`.

        Raises:
            ValueError: `regions` is missing, or it is given with `tiles="map"`.
        """
        if isinstance(self.global_pool, nn.Identity):
            return x
        if (regions is None) != (self.tiles == "map"):
            given = None if regions is None else "a map"
            raise ValueError(f"regions must be given with tiles='image' alone, got {given} with {self.tiles!r}")
        x = self.describe(x, regions)
        return x if pre_logits else self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        """Classify images, (B, in_chans, H, W); return the logits, (B, num_classes)."""
        features = self.forward_features(x)
        if self.tiles == "map" or isinstance(self.global_pool, nn.Identity):
            return self.forward_head(features)
        return self.forward_head(features, regions=self.tile_maps(x))


# before the factory: register_model reads it when it decorates it
default_cfgs: dict[str, DefaultCfg] = resnet_cfgs("glnet_resnet101", "resnet101")


@register_model
def glnet_resnet101(pretrained: bool = False, **kwargs: Any) -> GLNet:
    """GLNET on ResNet-101; `pretrained` loads ImageNet weights into the ResNet."""
    return build_on_trunk(GLNet, "glnet_resnet101", pretrained, **kwargs)
