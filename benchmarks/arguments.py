"""The parser that all commands start from."""

import argparse


def command_parser(name: str, description: str | None) -> argparse.ArgumentParser:
    """Make a parser without arguments for `python -m benchmarks.<name>`."""
    return argparse.ArgumentParser(
        f"python -m benchmarks.{name}", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
