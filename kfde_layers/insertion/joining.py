"""How a block joins a module, and how it leaves again."""

from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from kfde_layers.insertion.adapters import Key, Tokens

CHILD = "kfde"  # the name under which a block joins its module

# Marks modules that hold a block; the name `kfde` alone also occurs in this package's own models.
_INSERTED = f"{CHILD}_inserted"


def join(
    module: nn.Module, block: nn.Module, key: Key | None, is_run: bool, patch_embed: nn.Module | None = None
) -> None:
    """Make a block a child of a module, which runs after it.

    Args:
        module: The module.
        block: Takes the output of the module, and returns another one of the same kind.
        key: Key of the map in the module's output; None if the output is the map.
        is_run: Whether the module runs a new child after all others, as `nn.Sequential` does. Else a hook runs it.
        patch_embed: Module that cuts images of any size, whose grid the block asks for.
    """
    module.add_module(CHILD, block)
    handles: list[RemovableHandle] = []
    if not is_run:
        hook = _run_child if key is None else _run_child_of_any
        handles.append(module.register_forward_hook(hook, prepend=True))  # before others: they see the block's output
    grids = [part.last_grid for part in block.modules() if isinstance(part, Tokens) and part.last_grid is not None]
    handles += [patch_embed.register_forward_hook(grid) for grid in grids if patch_embed is not None]
    # The handles are kept with the module so that both are pickled together: torch reserves the number of an unpickled
    # hook only if it unpickles the handle too.
    module.__dict__[_INSERTED] = handles


def leave(module: nn.Module) -> None:
    """Take the block out of a module."""
    for handle in module.__dict__.pop(_INSERTED):
        handle.remove()
    delattr(module, CHILD)


def holds_block(module: nn.Module) -> bool:
    """Return whether a block has joined the module."""
    return _INSERTED in module.__dict__


def _run_child(self: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
    # TorchScript compiles a hook like a method: it needs `self`, the attribute by name, and one type of output
    return self.kfde(output)  # pyright: ignore[reportCallIssue]


def _run_child_of_any(self: nn.Module, args: Any, output: Any) -> Any:
    return self.kfde(output)  # pyright: ignore[reportCallIssue]
