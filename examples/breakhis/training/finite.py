"""Refuse weights and scores that are not finite.

The largest of several NaN is the first one, so that NaN would look like a confident answer for the first class.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor


def check_weights(weights: Mapping[str, Tensor], path: Path) -> None:
    """Refuse weights that are not finite.

    Args:
        weights: Tensors by name.
        path: The file that they were read from.

    Raises:
        ValueError: A tensor holds NaN, infinity or numbers of 8 bits with which PyTorch does not compute; the message
            names the file and the first such tensor.
    """
    for name, tensor in weights.items():
        try:
            wrong = tensor[~tensor.isfinite()]
        except NotImplementedError as error:
            wish = "must hold weights that PyTorch computes with"
            raise ValueError(f"{path} {wish}, got {tensor.dtype} in {name}") from error
        if len(wrong):
            raise ValueError(f"{path} must hold finite weights, got {wrong[0].item()} in {name}")


def check_scores(scores: Tensor, files: Sequence[Path | str], checkpoint: Path | str) -> None:
    """Refuse scores that are not finite.

    Args:
        scores: Logits or probabilities, (N, classes).
        files: The N image files.
        checkpoint: The folder or the name of the model that computed the scores.

    Raises:
        FloatingPointError: A score is NaN or infinite; the message names the checkpoint and the first such image.
    """
    for row in (~scores.isfinite()).any(1).nonzero().flatten().tolist()[:1]:
        raise FloatingPointError(
            f"scores must be finite, got {scores[row].tolist()} from {checkpoint} for the image {files[row]}"
        )
