"""Print what a bug report needs: versions, devices, what impl="auto" takes, and the registered models.

python -m kfde_layers
"""

import platform
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version

import timm
import torch
from torch import Tensor

import kfde_layers
from kfde_layers._impl import Impl, unsupported
from kfde_layers.fused.csfe.auto import auto_impl as auto_impl_of_csfe
from kfde_layers.fused.mfdf.auto import auto_impl as auto_impl_of_mfdf

LIBRARIES = ("torch", "timm", "einops", "numpy", "triton")
SHAPES = ((1, 64, 56, 56), (1, 512, 7, 7))  # of an early and of a late map in a network, for one image


def main() -> None:
    """Print the report."""
    print(f"kfde_layers {kfde_layers.__version__}")
    print(f"Python {platform.python_version()}, {platform.platform()}")
    print(", ".join(f"{name} {_version(name)}" for name in LIBRARIES))
    print("\ndevices")
    devices = [torch.device("cpu")]
    print(f"  cpu: {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")
    accelerator = torch.accelerator.current_accelerator()
    for index in range(torch.accelerator.device_count()):
        devices.append(torch.device(f"{accelerator}:{index}"))
        print(f"  {devices[-1]}: {_describe(devices[-1])}")
    if len(devices) == 1:
        print(f"  no other; CUDA of this PyTorch: {torch.version.cuda or 'none'}")
    print('\nwhat impl="auto" takes for a map (N, C, H, W)')
    for device in devices:
        for dtype in (torch.float32, torch.bfloat16):
            for shape in SHAPES:
                print(f"  {device} {str(dtype).removeprefix('torch.')} {shape}: {_choices(shape, device, dtype)}")
    print("\nmodels\n  " + "\n  ".join(timm.list_models("kfde_*")))


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "is not installed"


def _describe(device: torch.device) -> str:
    if device.type != "cuda":
        return "the fused implementations do not run there"
    properties = torch.cuda.get_device_properties(device)
    return f"{properties.name}, compute capability {properties.major}.{properties.minor}"


def _choices(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> str:
    """Say what each layer takes as it is by default, or why it cannot take the fused implementation."""
    x = torch.empty(shape, device=device, dtype=dtype)
    if reason := unsupported(x):
        return f"reference, since {reason}"
    kernels = [torch.empty(shape[1], 1, size, size) for size in (1, 3, 5, 7)]
    rules: dict[str, Callable[[Tensor], Impl]] = {
        "CFE, SFE, CSFE": lambda x: auto_impl_of_csfe(),
        "MFDF": lambda x: auto_impl_of_mfdf(x, kernels, (1, 1, 1, 1)),
    }
    return "; ".join(f"{layers} {rule(x)}" for layers, rule in rules.items())


if __name__ == "__main__":
    main()
