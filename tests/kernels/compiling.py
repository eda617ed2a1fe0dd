"""Compile the kernels of a launcher for GPUs that are not there, and read what the compiler made of them."""

import itertools
import re
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel
from triton.runtime import JITFunction

TARGETS = (80, 90, 100)  # compute capabilities: A100, H100, B200

_TYPES = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}
_OPTIONS = ("num_warps", "num_stages", "num_ctas")


class Launch(NamedTuple):
    """One call of a kernel: `kernel[grid](*args, **options)`."""

    name: str
    kernel: JITFunction
    grid: tuple[int, ...]
    arguments: dict[str, Any]  # by the names of the kernel's parameters
    options: dict[str, int]  # of the compiler


class Resources(NamedTuple):
    """What one program needs of a multiprocessor."""

    registers: int  # per thread
    spills: int  # bytes per thread of local memory
    shared: int  # bytes


class Row(NamedTuple):
    """A line of the table of kernels."""

    kernel: str
    target: str
    dtype: str
    registers: int
    spills: int
    shared: int


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

    def __getattr__(self, name: str) -> Any:  # whatever else is asked of a kernel
        return getattr(self.kernel, name)


@contextmanager
def recorded(module: ModuleType, *, run: bool = False) -> Iterator[list[Launch]]:
    """Collect the launches of the kernels of `module`, instead of running them or, with `run`, beside that."""
    launches: list[Launch] = []
    kernels = {name: value for name, value in vars(module).items() if name.endswith("_kernel")}
    for name, kernel in kernels.items():
        setattr(module, name, _Recorder(name, kernel, launches, run))
    try:
        yield launches
    finally:
        for name, kernel in kernels.items():
            setattr(module, name, kernel)


def compile_launch(launch: Launch, capability: int) -> CompiledKernel:
    """Compile the kernel as the launch would on a GPU of that compute capability, specialised to its arguments."""
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
    """Registers, spills and shared memory of a compiled kernel; `folder` takes a file."""
    usage = _cuobjdump("--dump-resource-usage", compiled, folder)
    counts = {name: int(count) for name, count in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return Resources(counts["REG"], counts["STACK"] + counts["LOCAL"], compiled.metadata.shared)


def sass(compiled: CompiledKernel, folder: Path) -> str:
    """The machine instructions of a compiled kernel; `folder` takes a file."""
    return _cuobjdump("--dump-sass", compiled, folder)


def _cuobjdump(option: str, compiled: CompiledKernel, folder: Path) -> str:
    path = folder / "kernel.cubin"
    path.write_bytes(compiled.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    return subprocess.run([tool, option, path], check=True, capture_output=True, text=True).stdout


def table(
    module: ModuleType,
    launch: Callable[[torch.dtype], object],
    folder: Path,
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float32),
    targets: tuple[int, ...] = TARGETS,
) -> list[Row]:
    """Resources of every kernel that `launch(dtype)`, a call of the launchers of `module`, would run.

    Tensors on the "meta" device are enough.
    """
    rows = []
    for dtype in dtypes:
        with recorded(module) as launches:
            launch(dtype)
        for found, target in itertools.product(launches, targets):
            used = resources(compile_launch(found, target), folder)
            rows.append(Row(found.name, f"sm_{target}", str(dtype).removeprefix("torch."), *used))
    return rows
