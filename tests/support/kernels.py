"""Record the launches of Triton kernels, and compile them without a GPU.

A test file that imports this module first skips itself where Triton is not installed.
"""

import itertools
import os
import re
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel
from triton.runtime import JITFunction

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
TARGETS = (80, 90, 100)  # compute capabilities: A100, H100, B200

needs_interpreter = pytest.mark.skipif(not INTERPRETED, reason="compiled kernels do not see what a test replaces")
needs_compiler = pytest.mark.skipif(INTERPRETED, reason="under TRITON_INTERPRET=1 there is nothing to compile")
# For all tests of a file that runs kernels, interpreted or on a GPU.
runs_kernels = [
    pytest.mark.skipif(
        not INTERPRETED and not torch.cuda.is_available(), reason="needs a GPU, or TRITON_INTERPRET=1 from the start"
    ),
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning"),  # in older Tritons
]
sigmoid_may_overflow = pytest.mark.filterwarnings("ignore:overflow encountered in exp2:RuntimeWarning")

LARGE, SMALL = (64, 96, 56, 56), (32, 768, 7, 7)  # shapes of maps to compile for

# Every pair of shape, layout and dtype, since all triples would compile twice as much. The small map takes another path
# through the kernels.
each_build = pytest.mark.parametrize(
    ("shape", "layout", "dtype", "targets"),
    [
        (LARGE, "nhwc", torch.bfloat16, TARGETS),
        (LARGE, "nchw", torch.float32, TARGETS),
        (SMALL, "nhwc", torch.float32, TARGETS),
        (SMALL, "nchw", torch.bfloat16, (90,)),
    ],
)

_TYPES = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}
_OPTIONS = ("num_warps", "num_stages", "num_ctas")


class Launch(NamedTuple):
    """One call of a kernel: `kernel[grid](*args, **options)`."""

    name: str
    """Name of the kernel."""
    kernel: JITFunction
    """The kernel itself."""
    grid: tuple[int, ...]
    """Numbers of programs."""
    arguments: dict[str, Any]
    """Arguments by the names of the kernel's parameters."""
    options: dict[str, int]
    """Options of the compiler."""


class Resources(NamedTuple):
    """Resources of a multiprocessor that one program needs."""

    registers: int
    """Registers per thread."""
    spills: int
    """Bytes of local memory per thread."""
    shared: int
    """Bytes of shared memory."""


class CompiledKernelRow(NamedTuple):
    """One row of the table of compiled kernels."""

    kernel: str
    """Name of the kernel."""
    target: str
    """GPU, as "sm_90"."""
    registers: int
    """Registers per thread."""
    spills: int
    """Bytes of local memory per thread."""
    shared: int
    """Bytes of shared memory."""


class _Recorder:
    def __init__(self, name: str, kernel: Any, launches: list[Launch], run: bool) -> None:
        self.name, self.kernel, self.launches, self.run = name, kernel, launches, run

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, **kwargs: Any) -> None:
            options = {key: kwargs[key] for key in _OPTIONS if key in kwargs}
            arguments = dict(zip(self.kernel.arg_names, args, strict=False))
            arguments |= {key: value for key, value in kwargs.items() if key not in options}
            self.launches.append(Launch(self.name, self.kernel, grid, arguments, options))
            if self.run:
                self.kernel[grid](*args, **kwargs)

        return launch

    def __getattr__(self, name: str) -> Any:  # every other attribute of the kernel
        return getattr(self.kernel, name)


@contextmanager
def recorded(module: ModuleType, *, run: bool = False) -> Iterator[list[Launch]]:
    """Collect the launches of the kernels of `module`. The kernels run only with `run`."""
    launches: list[Launch] = []
    kernels = {name: value for name, value in vars(module).items() if name.endswith("_kernel")}
    for name, kernel in kernels.items():
        setattr(module, name, _Recorder(name, kernel, launches, run))
    try:
        yield launches
    finally:
        for name, kernel in kernels.items():
            setattr(module, name, kernel)


def launches_of(launches: list[Launch], name: str) -> list[Launch]:
    """Return the launches of the kernel `name`, of which there must be some."""
    chosen = [launch for launch in launches if launch.name == name]
    assert chosen, f"{name} was not launched, but {[launch.name for launch in launches]}"
    return chosen


def the_launch_of(launches: list[Launch], name: str) -> Launch:
    """Return the one launch of the kernel `name`."""
    (launch,) = launches_of(launches, name)
    return launch


def compile_launch(launch: Launch, capability: int) -> CompiledKernel:
    """Compile the kernel as the launch would on a GPU of that compute capability, specialised to the arguments."""
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1):
            signature[parameter.name] = "constexpr"
            constants[parameter.name] = value
            continue
        if isinstance(value, Tensor):
            signature[parameter.name] = _TYPES[value.dtype]
            aligned = value.storage_offset() * value.element_size() % 16 == 0  # the allocator aligns the rest
        elif isinstance(value, bool):
            signature[parameter.name], aligned = "u1", False
        elif isinstance(value, int):
            signature[parameter.name], aligned = "i32" if value < 2**31 else "i64", value % 16 == 0
        else:
            signature[parameter.name], aligned = "fp32", False
        if aligned:
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=launch.options)


def resources(compiled: CompiledKernel, folder: Path) -> Resources:
    """Return what a compiled kernel needs of a multiprocessor; write a file into `folder` for that."""
    usage = _cuobjdump("--dump-resource-usage", compiled, folder)
    counts = {name: int(count) for name, count in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return Resources(counts["REG"], counts["STACK"] + counts["LOCAL"], compiled.metadata.shared)


def sass(compiled: CompiledKernel, folder: Path) -> str:
    """Return the machine instructions of a compiled kernel; write a file into `folder` for that."""
    return _cuobjdump("--dump-sass", compiled, folder)


def _cuobjdump(option: str, compiled: CompiledKernel, folder: Path) -> str:
    path = folder / "kernel.cubin"
    path.write_bytes(compiled.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    return subprocess.run([tool, option, path], check=True, capture_output=True, text=True).stdout


def compiled_kernels(
    module: ModuleType, launch: Callable[[], object], folder: Path, targets: tuple[int, ...] = TARGETS
) -> list[CompiledKernelRow]:
    """Compile every kernel that `launch()`, a call of the launchers of `module`, would run. Return a row for each.

    Tensors on the "meta" device are enough.
    """
    with recorded(module) as launches:
        launch()
    return [
        CompiledKernelRow(
            recorded_launch.name, f"sm_{target}", *resources(compile_launch(recorded_launch, target), folder)
        )
        for recorded_launch, target in itertools.product(launches, targets)
    ]
