"""Insert KFDE blocks into a ResNet of timm.

    python examples/insert_into_resnet.py

`insertion_points` lists the modules after which a block fits. With `identity_start=True` the blocks are blended out at
first, so that a pretrained network starts unchanged and learns how much of each block it uses.
"""

import timm
import torch

from kfde_layers import CSFE, MFDF, insert, insertion_points


def count_parameters(model: torch.nn.Module) -> int:
    """Return the number of parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def main() -> None:
    """Run the example."""
    model = timm.create_model("resnet18").eval()  # with pretrained=True it starts from ImageNet weights
    images = torch.randn(2, 3, 96, 96)
    with torch.inference_mode():
        before = model(images)
    parameters = count_parameters(model)

    for name, point in insertion_points(model).items():
        print(f"{name}: {point.channels} channels, {point.layout}, 1/{point.reduction} of the image's side")
    insert(model, {"layer3": CSFE, "layer4": MFDF}, identity_start=True)
    print(f"parameters: {parameters:,}, with blocks {count_parameters(model):,}")

    with torch.inference_mode():
        after = model(images)
    print(f"largest change of the outputs: {(after - before).abs().max():g}")


if __name__ == "__main__":
    main()
