"""Read JSON and YAML files that hold one mapping. What is wrong with a file is said in one sentence that names it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file.

    Raises:
        OSError: The file cannot be opened.
        ValueError: It is no UTF-8, no JSON or no mapping.
    """
    return _read(path, json.loads, "JSON")


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file; tags that would make objects of Python are refused.

    Raises:
        OSError: The file cannot be opened.
        ValueError: It is no UTF-8, no YAML or no mapping.
    """
    return _read(path, parse_yaml, "YAML")


def parse_yaml(text: str) -> Any:
    """Parse YAML of plain values.

    Raises:
        ValueError: The text is no YAML, or has a tag of Python.
    """
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error


def _read(path: Path, parse: Callable[[str], Any], language: str) -> dict[str, Any]:
    try:
        value = parse(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # a RecursionError for brackets that are nested a thousand times
        raise ValueError(f"{path} must be a mapping in {language}, got text that cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} must be a mapping in {language}, got {value!r:.60}")
    return value
