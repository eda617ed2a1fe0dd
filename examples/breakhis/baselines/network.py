"""What the networks have in common: timm's interface, and the layers of Keras."""

from typing import Any

from timm.layers import SelectAdaptivePool2d, variance_scaling_
from torch import Tensor, nn

from breakhis.baselines.checks import check_choice, check_int, check_share


class Network(nn.Module):
    """A network with timm's interface: a feature map, a vector that describes it, and a linear classifier.

    A subclass makes its layers, then calls `reset_classifier`. It defines `forward_features`, from the image to the
    map, and `describe`, from the map to the vector.

    Args:
        num_features: Channels of the feature map.
        head_hidden_size: Length of the vector.
        drop_rate: Share of the values that dropout sets to 0; the subclass says where.

    Raises:
        ValueError: `drop_rate` is not a number from 0 to below 1.
    """

    pools: tuple[str, ...] = ("avg", "max", "avgmax")
    """Values of `global_pool`; also "" for a network that returns the feature map, without a classifier."""

    def __init__(self, num_features: int, head_hidden_size: int, drop_rate: float) -> None:
        super().__init__()
        self.num_features, self.head_hidden_size = num_features, head_hidden_size
        self.drop_rate = check_share("drop_rate", drop_rate)

    def get_classifier(self) -> nn.Module:
        """Return the classifier."""
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier, and the pooling unless it is None.

        Args:
            num_classes: Number of classes; 0: no classifier, so that the network returns the vector.
            global_pool: One of `pools`, or "".

        Raises:
            TypeError: `num_classes` is not an integer.
            ValueError: An argument is outside its range, or there are classes without pooling.
        """
        self.num_classes = check_int("num_classes", num_classes, minimum=0)
        if global_pool is not None:
            name = check_choice("global_pool", global_pool, (*self.pools, ""))
            self.global_pool = self.make_pool(name) if name else nn.Identity()
        if num_classes and isinstance(self.global_pool, nn.Identity):
            raise ValueError(f"num_classes must be 0 with global_pool '', got {num_classes}")
        self.fc = nn.Linear(self.head_hidden_size, num_classes) if num_classes else nn.Identity()

    def make_pool(self, name: str) -> nn.Module:
        """Make the module that pools a feature map to a vector."""
        return SelectAdaptivePool2d(pool_type=name, flatten=True)

    def forward_features(self, x: Tensor) -> Tensor:
        """Compute the feature map, (B, num_features, h, w), of images, (B, C, H, W)."""
        raise NotImplementedError

    def describe(self, x: Tensor) -> Tensor:
        """Turn the feature map into the vector, (B, head_hidden_size)."""
        raise NotImplementedError

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Classify a feature map; with `pre_logits`, return the vector before the classifier."""
        if isinstance(self.global_pool, nn.Identity):
            return x
        x = self.describe(x)
        return x if pre_logits else self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        """Classify images, (B, C, H, W); return the logits, (B, num_classes)."""
        return self.forward_head(self.forward_features(x))


KERAS_NORM: dict[str, Any] = {"eps": 1e-3, "momentum": 0.01}
"""Options of Keras' batch norm. Its momentum of 0.99 is torch's 0.01."""


def init_like_keras(module: nn.Module) -> None:
    """Draw the weights of a convolution or linear layer like Keras' "he_normal", and set its biases to 0.

    The weights are normal with variance 2 / fan-in, and cut off at two standard deviations.
    """
    if isinstance(module, nn.Conv2d | nn.Linear):
        variance_scaling_(module.weight, scale=2.0, mode="fan_in", distribution="truncated_normal")
        if module.bias is not None:
            nn.init.zeros_(module.bias)
