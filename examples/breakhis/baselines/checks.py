"""Refuse wrong arguments of the networks. The message names the argument, what it must be, and what it was."""

from collections.abc import Sequence
from typing import Any


def check_int(name: str, value: Any, minimum: int) -> int:
    """Return an integer of at least `minimum`.

    Raises:
        TypeError: The value is not an integer; in Python, true and false would count as such.
        ValueError: It is below the minimum.
    """
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value}")
    return value


def check_choice(name: str, value: Any, choices: Sequence[Any]) -> Any:
    """Return a value that is one of the choices.

    Raises:
        ValueError: It is none of them.
    """
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
    return value


def check_share(name: str, value: Any) -> float:
    """Return a number from 0 to below 1, such as the share of dropped values.

    Raises:
        ValueError: It is none.
    """
    if not isinstance(value, int | float) or not 0 <= value < 1:
        raise ValueError(f"{name} must be a number from 0 to below 1, got {value!r}")
    return value
