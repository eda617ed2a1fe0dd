"""Use the installed wheel as a newcomer would."""

from importlib.metadata import requires
from pathlib import Path

import timm
import torch

import kfde_layers

package = Path(kfde_layers.__file__).parent
assert "site-packages" in package.parts, package
assert (package / "py.typed").exists()

needed = {requirement.split(">")[0] for requirement in requires("kfde-layers") or [] if "extra ==" not in requirement}
assert needed == {"torch", "timm", "einops", "numpy"}, needed

model = timm.create_model("kfde_convnextv2_atto", num_classes=8).eval()
assert model(torch.randn(2, 3, 64, 64)).shape == (2, 8)
resnet = kfde_layers.insert(timm.create_model("resnet18"), {"layer4": kfde_layers.CSFE})
assert resnet(torch.randn(2, 3, 64, 64)).shape == (2, 1000)
print(f"kfde-layers {kfde_layers.__version__} works from its wheel")
