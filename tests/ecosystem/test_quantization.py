"""Layers and trained networks in int8: errors of outputs and scores, each beside those of the bare network."""

import functools
import os
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch._inductor import config as inductor
from torch._inductor.utils import run_and_get_code

from kfde_layers import CFE, CSFE, MFDF, SFE, insert
from kfde_layers.testing import scatter_parameters
from tests.support.quantised import METHODS, onnx_runtime, pt2e, quiet

TABLE = "Deployment"
DATA = Path(os.environ.get("KFDE_DATA", Path(__file__).parents[2].parent / "shared" / "data")) / "idc"
CHANNELS, SIDE, USUAL_MEAN = 32, 64, 0.3
LAYERS = {"CFE": CFE, "SFE": SFE, "CSFE": CSFE, "MFDF": MFDF}
GATES = (CFE, SFE, CSFE)
KFDE = "kfde_convnextv2_atto"
STATIC = ("PT2E with X86InductorQuantizer", "ONNX Runtime, static")

pytestmark = [pytest.mark.deployment, pytest.mark.slow, *quiet]


def cells(*columns):
    """Each method on each column, as the cell of its row."""
    return pytest.mark.parametrize(
        ("column", "method"),
        [
            pytest.param(column, name, id=f"{column}-{name}", marks=pytest.mark.cell(TABLE, f"int8: {name}", column))
            for name in METHODS
            for column in columns
        ],
    )


class ConvLinear(nn.Module):
    """A convolution and a linear layer over the channels: the bare module beside the layers."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.fc = nn.Linear(channels, channels)

    def forward(self, x):
        return self.fc(self.conv(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def draw_maps(seed, mean):
    return 1.5 * torch.randn(8, CHANNELS, 14, 14, generator=torch.Generator().manual_seed(seed)) + mean


def make(name):
    torch.manual_seed(0)
    layer = LAYERS.get(name, ConvLinear)(CHANNELS)
    if name in ("CFE", "CSFE", "MFDF"):
        scatter_parameters(layer, deviation=0.2)
    return nn.Sequential(layer).eval()  # X86InductorQuantizer knows parts by their name


@functools.cache
@torch.no_grad()
def error(method, name, folder, mean, **options):
    """Return the error of a quantised layer on a new map, as a root mean square relative to that of the output."""
    layer, x = make(name), draw_maps(0, mean)
    run = METHODS[method](layer, [draw_maps(seed, mean) for seed in range(1, 5)], folder, **options)
    y = layer(x)
    return float((run(x) - y).norm() / y.norm())


@cells(*LAYERS)
def test_a_layer_is_as_near_to_float_as_a_convolution(column, method, folder, record_property):
    of_layer, of_bare = (error(method, name, folder, USUAL_MEAN) for name in (column, "bare"))
    record_property("note", f"error of {column} {of_layer:.1%}, of a convolution {of_bare:.1%}")
    assert 1e-3 < of_bare < 0.05
    if column == "MFDF" or method in STATIC:
        assert 1e-5 < of_layer < 3 * of_bare
    else:  # it has no weights that are quantised
        assert of_layer < 1e-6


@pytest.mark.parametrize("method", STATIC)
@pytest.mark.parametrize("mean", [USUAL_MEAN, 30.0], ids=["usual", "large mean"])
@pytest.mark.parametrize("name", ["CFE", "SFE", "CSFE"])
def test_the_gates_can_stay_in_float(name, mean, method, folder):
    everything = error(method, name, folder, mean)
    gates_in_float = error(method, name, folder, mean, in_float=GATES)
    assert everything > 1e-3
    assert gates_in_float < 1e-6


@pytest.mark.parametrize("method", STATIC)
def test_a_network_with_its_gates_in_float_is_no_worse(method, folder):
    name = "inserted"
    exact, _, error_of_everything = in_int8(name, method, folder)
    with torch.no_grad():
        rounded = logits(METHODS[method](trained(name), calibration(), folder, in_float=GATES))
    error = relative_error_of_logits(rounded, logits(trained(name)))
    assert abs(area(rounded) - exact) < 0.005
    assert 0 < error < 1.5 * error_of_everything


@functools.cache
def patches():
    """Return 64 x 64 images and their classes, to train on and to test on, of different patients.

    They are patches of breast tissue with and without carcinoma where these are, else noise of two brightnesses.
    """
    if not DATA.is_dir():
        generator = torch.Generator().manual_seed(0)
        y = torch.arange(1280) % 2
        brightness = (2 * y - 1 + torch.randn(1280, generator=generator)) / 2
        x = brightness[:, None, None, None] + torch.randn(1280, 3, SIDE, SIDE, generator=generator)
        return x[:768], y[:768], x[768:], y[768:]
    image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")

    def load(patients, count):
        paths = [path for patient in patients for c in "01" for path in sorted((patient / c).glob("*.png"))[:count]]
        images = {path: np.array(image.open(path).convert("RGB")) for path in paths}
        images = {path: pixels for path, pixels in images.items() if pixels.shape == (50, 50, 3)}
        x = torch.from_numpy(np.stack(list(images.values()))).permute(0, 3, 1, 2) / 255
        y = torch.tensor([int(path.parent.name) for path in images])
        return F.interpolate((x - 0.6) / 0.25, SIDE, mode="bilinear"), y

    patients = sorted(DATA.iterdir())
    return *load(patients[:60], 10), *load(patients[60:120], 5)


@functools.cache
@torch.enable_grad()
def trained(name):
    """Return a small network after some steps."""
    torch.manual_seed(0)
    if name.endswith("atto"):
        model = timm.create_model(name, num_classes=2)
    else:
        model = timm.create_model("test_resnet", num_classes=2)
        model = insert(model, {"layer3": CSFE, "layer4": MFDF}) if name == "inserted" else model
    x, y, *_ = patches()
    steps, generator = 80, torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 1e-3 * min(1, (step + 1) / 10) * (1 - step / steps)
        batch = torch.randint(len(x), (32,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(model(x[batch]), y[batch]).backward()
        optimizer.step()
    return model.eval()


def calibration():
    return patches()[0][:256].split(64)


@torch.no_grad()
def logits(run):
    return torch.cat([torch.as_tensor(run(batch)) for batch in patches()[2].split(64)])


def area(scores):
    """Return the area under the ROC curve."""
    margin, y = scores[:, 1] - scores[:, 0], patches()[3]
    return float((margin[y == 1][:, None] > margin[y == 0]).float().mean())


@functools.cache
def in_int8(name, method, folder):
    """Return the area in float, the area in int8, and the error of the logits relative to their spread."""
    with torch.no_grad():
        quantised = METHODS[method](trained(name), calibration(), folder)
    exact, rounded = logits(trained(name)), logits(quantised)
    return area(exact), area(rounded), relative_error_of_logits(rounded, exact)


def relative_error_of_logits(rounded, exact):
    return float((rounded - exact).norm() / (exact - exact.mean(dim=0)).norm())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("quantised")


@cells("models", "inserted")
def test_a_trained_network_loses_no_more_than_the_bare_one(column, method, folder, record_property):
    ours, bare = ("inserted", "test_resnet") if column == "inserted" else (KFDE, "convnextv2_atto")
    exact, rounded, of_ours = in_int8(ours, method, folder)
    bare_exact, bare_rounded, of_bare = in_int8(bare, method, folder)
    scores = f"{exact:.3f} to {rounded:.3f}, bare {bare_exact:.3f} to {bare_rounded:.3f}"
    record_property("note", f"score of {column} {scores} ({'tissue' if DATA.is_dir() else 'drawn images'})")
    assert exact > 0.75  # of 0.5 by chance: there is a score to lose
    assert exact - rounded < max(bare_exact - bare_rounded, 0) + 0.01
    assert 0 < of_ours < 3 * of_bare + 0.01


@torch.no_grad()
@pytest.mark.parametrize(
    ("column", "name"),
    [
        pytest.param(column, name, id=column, marks=pytest.mark.cell(TABLE, f"int8: {STATIC[0]}", column))
        for column, name in {**{name: name for name in LAYERS}, "models": KFDE, "inserted": "inserted"}.items()
    ],
)
def test_inductor_compiles_what_pt2e_has_quantised(column, name):
    if name in LAYERS:
        module, x, images = make(name), draw_maps(0, USUAL_MEAN), [draw_maps(1, USUAL_MEAN)]
    else:
        module, x, images = trained(name), patches()[2][:64], calibration()
    quantised = pt2e(module, images, None)
    with inductor.patch(freezing=True):  # else the weights are quantised at each call
        y, codes = run_and_get_code(torch.compile(quantised), x)
    assert ("qconv" in "".join(codes)) == (name not in ("CFE", "SFE", "CSFE"))  # these have no convolutions
    assert float((y - quantised(x)).norm() / y.norm()) < 0.005


def test_scales_of_other_images_are_seen_in_the_error():
    with torch.no_grad():
        quantised = pt2e(trained("inserted"), [batch / 30 for batch in calibration()], None)
    exact = logits(trained("inserted"))
    assert relative_error_of_logits(logits(quantised), exact) > 0.3


@pytest.mark.parametrize("name", ["convnextv2_atto", KFDE])
def test_symbolic_shapes_of_onnx_runtime_stop_at_the_response_norm_of_timm(name, tmp_path):
    with pytest.raises(TypeError, match="'NoneType' has no len"), torch.no_grad():
        onnx_runtime(timm.create_model(name, depths=(1, 1, 1, 1)).eval(), calibration(), tmp_path, symbolic=True)
