"""Train timm models on breast-cancer histopathology, and score them on patients that they have never seen.

    python examples/train_breakhis.py --synthetic --output-dir OUT
    python examples/train_breakhis.py --data-dir BreaKHis_v1 --magnification 200X --task subtype --output-dir OUT
    python examples/train_breakhis.py --data-dir BreaKHis_v1 --folds all --magnification all --ablation --output-dir OUT

Several processes: `accelerate launch --num_processes 2 examples/train_breakhis.py ...`.
"""

from collections.abc import Sequence
from typing import Any

from breakhis.commands import one_line_errors, run_script
from breakhis.training.options import parse_args


@one_line_errors
def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Run the script; return the `metrics.json` of each run."""
    args = parse_args(argv)
    from breakhis.runner import leave_processes, run  # late: PyTorch takes seconds, which `--help` need not wait for

    results = run(args)
    leave_processes()
    return results


if __name__ == "__main__":
    run_script(main)
