"""Plant each fault in a copy of the repository, and check that the tests that mirror its file see it in time.

python -m tests.faults                     # all of them
python -m tests.faults ops/cfe insertion   # those in files whose path contains one of these
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.faults import ROOT, Fault, load_faults

FOLDERS = ("kfde_layers", "examples", "tests", "benchmarks", "docs")


def replay(fault: Fault, copy: Path, limit: float) -> str:
    """Plant a fault in the copy, run its tests, and take it out again; return what happened."""
    path = copy / fault.file
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace(fault.right, fault.wrong), encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-n", "0", "-p", "no:cacheprovider", *fault.tests]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(copy), str(copy / "examples")])}
    if fault.interpreted:
        environment["TRITON_INTERPRET"] = "1"
    begin = time.monotonic()
    try:
        code = subprocess.run(command, cwd=copy, env=environment, capture_output=True, timeout=limit).returncode
    except subprocess.TimeoutExpired:
        return f"not seen within {limit:.0f} s"
    finally:
        path.write_text(text, encoding="utf-8")
    seconds = time.monotonic() - begin
    return {0: "MISSED", 1: "seen"}.get(code, f"pytest ended with {code}") + f" after {seconds:.0f} s"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", help="parts of paths; without any, every file")
    parser.add_argument("--limit", type=float, default=60.0, help="seconds for the tests of a fault")
    args = parser.parse_args()
    faults = [fault for fault in load_faults() if not args.files or any(part in fault.file for part in args.files)]
    unseen = 0
    with tempfile.TemporaryDirectory() as folder:
        for name in FOLDERS:
            shutil.copytree(ROOT / name, Path(folder) / name, ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("pyproject.toml", "README.md", "mkdocs.yml"):
            shutil.copy(ROOT / name, folder)
        for fault in faults:
            result = replay(fault, Path(folder), args.limit)
            unseen += not result.startswith("seen")
            print(f"{result}: {fault.file}: {fault.right.strip()!r} -> {fault.wrong.strip()!r}", flush=True)
    print(f"{len(faults) - unseen} of {len(faults)} faults were seen")
    sys.exit(unseen > 0)


if __name__ == "__main__":
    main()
