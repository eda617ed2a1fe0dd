"""Explain the answers of a model: Grad-CAM, and the gates and branch weights of its KFDE layers."""

import copy
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from pytorch_grad_cam import GradCAM
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from torch import Tensor, nn

from kfde_layers import CFE, CSFE, MFDF, insertion_points, remove


class CamTarget(NamedTuple):
    """The module whose output Grad-CAM uses."""

    name: str
    """Name of the module in the model."""
    layout: str
    """Order of the output's dimensions: "NCHW", "NHWC" or, for tokens, "NLC"."""


def cam_target(model: nn.Module) -> CamTarget:
    """Find the last feature map of a timm model; after it the position in the image is lost.

    In a plain vision transformer it is the input of the last block's attention: after the attention, the class token
    no longer depends on the other tokens.

    Raises:
        ValueError: The model has no such map.
    """
    names = [info["module"] for info in getattr(model, "feature_info", [])]
    plain = remove(copy.deepcopy(model))  # a module with an inserted block is no point any more
    modules, points = dict(plain.named_modules()), insertion_points(plain)
    for name in reversed(names):
        if name in points and points[name].layout != "NLC":  # tokens are handled below
            return CamTarget(name, points[name].layout)
        if hasattr(modules.get(name), "kfde"):  # a stage of a kfde_* model, which has the map
            return CamTarget(name, "NCHW")
    if hasattr(model, "num_prefix_tokens") and hasattr(getattr(model, "patch_embed", None), "grid_size"):
        return CamTarget(f"blocks.{len(model.blocks) - 1}.norm1", "NLC")
    raise ValueError(
        "model must have a module in its feature_info that returns a feature map, (N, C, H, W) or (N, H, W, C), "
        f"got a {type(model).__name__} with {', '.join(names) or 'none'}"
    )


@torch.enable_grad()
def grad_cam(model: nn.Module, inputs: Tensor, targets: Iterable[int]) -> np.ndarray:
    r"""Compute Grad-CAM: the parts of an image that raise the logit of a class.

    \[ \mathrm{CAM}_{ij} = \max\Big(0, \sum_c w_c A_{cij}\Big), \qquad
       w_c = \frac{1}{HW} \sum_{ij} \frac{\partial s}{\partial A_{cij}} \]

    with A the last feature map and s the logit of the class in `targets`. The unit is that of the logit, so that maps
    of different images and models can be compared.
    Source: Selvaraju et al. (2017), ICCV. Differs from the paper: it is not enlarged to the image, which would feign a
    precision that the map does not have; computed by the library `grad-cam`.

    Args:
        model: A timm classifier; it is not changed.
        inputs: Normalised images, (N, 3, H, W), on any device.
        targets: The class to explain for each image.

    Returns:
        A value for each cell of the feature map, (N, h, w), at least 0; all 0 if no part raises the logit. The cells
        divide the input evenly.

    Raises:
        ValueError: The model has no feature map.
    """
    name, layout = cam_target(model)
    model = copy.deepcopy(model).requires_grad_(False)  # the library adds hooks, changes the mode and clears gradients
    module = model.get_submodule(name)
    cam = GradCAM(model, [module], reshape_transform=partial(_channels_first, model, layout))
    module.register_forward_hook(lambda module, args, output: output.clone())  # later modules may overwrite the map
    inputs = inputs.detach().to(_device(model)).requires_grad_()  # with frozen weights, the inputs start the graph
    classes = [ClassifierOutputTarget(int(target)) for target in targets]
    cam(inputs, classes)  # the maps that it returns are enlarged, and each is stretched to 0..1
    kept = cam.activations_and_grads
    activations, gradients = (tensors[0].cpu().numpy() for tensors in (kept.activations, kept.gradients))
    return np.maximum(cam.get_cam_image(inputs, module, classes, activations, gradients), 0)


def _channels_first(model: nn.Module, layout: str, x: Tensor) -> Tensor:
    """Return the map, (N, C, H, W)."""
    if layout == "NCHW":
        return x
    if layout == "NLC":
        x = x[:, model.num_prefix_tokens :].unflatten(1, model.patch_embed.grid_size)
    return x.permute(0, 3, 1, 2)


class Decisions(NamedTuple):
    """Gates and branch weights of the KFDE layers for each of N images."""

    targets: np.ndarray
    """Class of each image, (N,)."""
    gates: dict[str, np.ndarray]
    """For each CFE by name, the share of a channel's positions whose gate is open, (N, C), from 0 to 1."""
    branches: dict[str, np.ndarray]
    """For each MFDF by name, the weight of each branch in each channel, (N, K, C); its sum over K is 1."""


@torch.no_grad()
def decisions(model: nn.Module, loader: Iterable[tuple[Tensor, Tensor, Tensor]]) -> Decisions:
    """Record the gates of every CFE and the branch weights of every MFDF, in one pass over images.

    Args:
        model: Any model; it is not changed. A model without such layers gives empty dicts.
        loader: At least one batch of (image, target, index), in any order.

    Returns:
        A row for each image, in the order of the indices.
    """
    model = copy.deepcopy(model).eval()  # only the copy gets hooks and another mode
    gates: dict[str, list[Tensor]] = {}
    branches: dict[str, list[Tensor]] = {}
    for name, module in model.named_modules():
        if isinstance(module, CSFE):
            _record(module, gates.setdefault(f"{name}.cfe", []), _csfe_gates)
        elif isinstance(module, CFE) and name not in gates:  # a CSFE may compute its CFE without calling it
            _record(module, gates.setdefault(name, []), _cfe_gates)
        elif isinstance(module, MFDF):
            _record(module, branches.setdefault(name, []), MFDF.branch_weights)
    targets, indices = [], []
    for inputs, target, index in loader:
        model(inputs.to(_device(model)))
        targets.append(target)
        indices.append(index)
    order = torch.cat(indices).argsort()
    return Decisions(
        torch.cat(targets)[order].numpy(),
        {name: torch.cat(rows)[order].numpy() for name, rows in gates.items()},
        {name: torch.cat(rows)[order].numpy() for name, rows in branches.items()},
    )


def by_class(values: np.ndarray, targets: np.ndarray, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Compute mean and standard deviation over the images of each class.

    Args:
        values: A row for each image, (N, ...), such as in `Decisions`.
        targets: Class of each image, (N,).
        num_classes: Number of classes; rows of an absent class are NaN.

    Returns:
        Means and standard deviations, (num_classes, ...).
    """
    means, deviations = (np.full((num_classes, *values.shape[1:]), np.nan) for _ in range(2))
    for target in np.unique(targets):
        rows = values[targets == target]
        means[target], deviations[target] = rows.mean(axis=0), rows.std(axis=0)
    return means, deviations


def intervals_by_class(
    values: np.ndarray, targets: np.ndarray, groups: Sequence[str], num_classes: int, resamples: int = 1000
) -> tuple[np.ndarray, np.ndarray]:
    """Bound the mean over the images of each class, with patients or cases drawn with replacement.

    They are drawn instead of images, because the images of one patient are alike.

    Args:
        values: A row for each image, (N, K).
        targets: Class of each image, (N,).
        groups: Patient or case of each image.
        num_classes: Number of classes.
        resamples: Number of draws.

    Returns:
        Quantiles 2.5 % and 97.5 % of the mean, (num_classes, K); NaN for a class of fewer than two groups.
    """
    low, high = (np.full((num_classes, values.shape[1]), np.nan) for _ in range(2))
    for target in np.unique(targets):
        rows = values[targets == target]
        _, group = np.unique(np.asarray(groups)[targets == target], return_inverse=True)
        members = np.eye(group.max() + 1)[group]  # (images, groups)
        count = members.shape[1]
        if count > 1:
            draws = np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), size=resamples)
            means = draws @ members.T @ rows / (draws @ members.sum(axis=0))[:, None]
            low[target], high[target] = np.quantile(means, [0.025, 0.975], axis=0)
    return low, high


def _record(module: nn.Module, rows: list[Tensor], decide: Callable[[nn.Module, Tensor], Tensor]) -> None:
    """Append to `rows` the result of `decide` on each input of a module."""
    module.register_forward_pre_hook(lambda module, args: rows.append(decide(module, args[0]).cpu()))


def _cfe_gates(cfe: CFE, x: Tensor) -> Tensor:
    _, is_open = cfe.gate(x)
    return is_open.float().mean((2, 3))


def _csfe_gates(csfe: CSFE, x: Tensor) -> Tensor:
    return _cfe_gates(csfe.cfe, csfe.sfe(x) if csfe.arrangement == "sfe_cfe" else x)


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
