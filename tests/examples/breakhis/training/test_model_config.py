import copy
import json
import re

import pytest
import timm
from breakhis.training import model_config
from breakhis.training.model_config import read_config
from PIL import Image
from timm.data import create_transform, resolve_data_config

CONFIG = {
    "architecture": "test_vit",
    "num_classes": 3,
    "label_names": ["a", "b", "c"],
    "pretrained_cfg": {
        "input_size": [3, 64, 96],
        "mean": [0.1, 0.2, 0.3],
        "std": [1, 1.5, 2],
        "crop_pct": 0.9,
        "crop_mode": "center",
        "interpolation": "bicubic",
    },
}
NAN, INFINITY = float("nan"), float("inf")


def write(folder, **changes):
    """Write a configuration with other entries; an entry of None is left out."""
    config = copy.deepcopy(CONFIG)
    for name, value in changes.items():
        inner = config["pretrained_cfg"] if name in config["pretrained_cfg"] else config
        inner[name] = value
        if value is None:
            del inner[name]
    path = folder / "config.json"
    path.write_text(json.dumps(config))
    return path


def test_a_good_configuration_is_returned(tmp_path):
    assert read_config(write(tmp_path)) == CONFIG
    assert timm.is_model(CONFIG["architecture"])


def test_what_timm_has_a_default_for_may_be_missing(tmp_path):
    config = read_config(write(tmp_path, crop_pct=None, crop_mode=None, interpolation=None))
    assert config["pretrained_cfg"].keys() == {"input_size", "mean", "std"}


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        *(("interpolation", word) for word in model_config.WORDS["interpolation"]),
        *(("crop_mode", word) for word in model_config.WORDS["crop_mode"]),
        *(("crop_pct", share) for share in (0.5, 1, 1.0)),
    ],
)
def test_what_is_taken_makes_an_input_of_the_models_size(entry, value, tmp_path):
    config = read_config(write(tmp_path, **{entry: value}))["pretrained_cfg"]
    assert config[entry] == value
    transform = create_transform(**resolve_data_config({}, pretrained_cfg=config), is_training=False)
    assert transform(Image.new("RGB", (70, 50))).shape == (3, 64, 96)


def test_a_file_that_is_nested_deeply_is_looked_through(tmp_path):
    path = write(tmp_path)
    depth = 800
    path.write_text(json.dumps(CONFIG)[:-1] + f', "model_args": {"[" * depth}NaN{"]" * depth}}}')
    with pytest.raises(ValueError, match=r"config.json must have finite numbers, got nan in model_args$"):
        read_config(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "nonesuch"}, "must name a model that timm knows, got architecture 'nonesuch'"),
        ({"architecture": None}, "must have architecture of type str, got None"),
        ({"architecture": ["test_vit"]}, r"must have architecture of type str, got \['test_vit'\]"),
        ({"num_classes": "3"}, "must have num_classes of type int, got '3'"),
        ({"num_classes": 2}, r"must have 2 different label_names, as num_classes says, got \['a', 'b', 'c'\]"),
        ({"num_classes": 0, "label_names": []}, "must have num_classes of at least 1, got 0"),
        ({"label_names": None}, "must have label_names of type list, got None"),
        ({"label_names": ["a", "b"]}, "must have 3 different label_names"),
        ({"label_names": ["a", "b", "a"]}, "must have 3 different label_names"),
        ({"label_names": ["a", "b", 7]}, "must have 3 different label_names"),
        ({"label_names": ["a", "b", ["c"]]}, "must have 3 different label_names"),
        ({"pretrained_cfg": []}, r"must have pretrained_cfg of type dict, got \[\]"),
        ({"mean": [0.1, 0.2]}, r"must have mean of 3 numbers, got \[0.1, 0.2\]"),
        ({"mean": None}, "must have mean of 3 numbers, got None"),
        ({"mean": [0.1, 0.2, NAN]}, "must have finite numbers, got nan in pretrained_cfg$"),
        ({"mean": [True, 0.2, 0.3]}, r"must have mean of 3 numbers, got \[True, 0.2, 0.3\]"),
        ({"mean": [0.1, "0.2", 0.3]}, "must have mean of 3 numbers, got"),
        ({"mean": [0.1, 0.2, 1e300]}, "must have mean of 3 numbers, got"),
        ({"mean": True}, "must have mean of 3 numbers, got True"),
        ({"std": [0, 1, 1]}, r"must have std of 3 positive numbers, got \[0, 1, 1\]"),
        ({"std": [1, INFINITY, 1]}, "must have finite numbers, got inf in pretrained_cfg$"),
        ({"std": [1, True, 1]}, r"must have std of 3 positive numbers, got \[1, True, 1\]"),
        ({"std": [1, 1, -1]}, r"must have std of 3 positive numbers, got \[1, 1, -1\]"),
        *(
            ({"crop_pct": value}, rf"must have crop_pct from 0.5 to 1, got {re.escape(repr(value))}$")
            for value in (0, 0.0, -0.5, 1e-9, 0.49, 1.01, 10**40, True, False, "all", "0.9", "", [0.9], {})
        ),
        ({"crop_pct": NAN}, "must have finite numbers, got nan in pretrained_cfg$"),
        *(
            (
                {"interpolation": value},
                rf"must have interpolation of bicubic, .*, nearest, got {re.escape(repr(value))}$",
            )
            for value in ("magic", "random", "BICUBIC", "", 3, True, ["bicubic"], {})
        ),
        *(
            ({"crop_mode": value}, rf"must have crop_mode of border, center, squash, got {re.escape(repr(value))}$")
            for value in ("magic", "Center", "", 0, False, ["center"], {})
        ),
        ({"num_classes": True, "label_names": ["a"]}, "must have num_classes of type int, got True"),
        ({"num_classes": 3.0}, "must have num_classes of type int, got 3.0"),
        ({"num_classes": NAN}, "must have finite numbers, got nan in num_classes$"),
        ({"model_args": {"mlp": [{"ratio": -INFINITY}]}}, "must have finite numbers, got -inf in model_args$"),
        ({"num_features": INFINITY}, "must have finite numbers, got inf in num_features$"),
        ({"label_names": ["a", "b", "c\0"]}, r"must have label_names that a CSV file can hold, got .*'c\\x00'"),
        ({"label_names": ["a", "\ud800", "c"]}, r"must have label_names that a CSV file can hold, got .*ud800"),
        ({"label_names": ["a", "b", True]}, "must have 3 different label_names"),
        ({"architecture": True}, "must have architecture of type str, got True"),
        ({"input_size": 8}, "must have input_size .3, height, width., from 32 px to 4096 px, got 8"),
        ({"input_size": [3, 8, 8]}, r"to 4096 px, got \[3, 8, 8\]"),
        ({"input_size": [1, 64, 64]}, r"to 4096 px, got \[1, 64, 64\]"),
        ({"input_size": [3, 64.5, 64]}, r"to 4096 px, got \[3, 64.5, 64\]"),
        ({"input_size": [3, 64.0, 64]}, r"to 4096 px, got \[3, 64.0, 64\]"),
        ({"input_size": [3, 64, True]}, r"to 4096 px, got \[3, 64, True\]"),
        ({"input_size": [3, 64, "64"]}, r"to 4096 px, got \[3, 64, '64'\]"),
        ({"input_size": [3, 64, 10**7]}, r"to 4096 px, got \[3, 64, 10000000\]"),
    ],
)
def test_a_wrong_entry_is_named_with_its_value(changes, message, tmp_path):
    with pytest.raises(ValueError, match=f"config.json {message}|config.json must have input_size .*{message}"):
        read_config(write(tmp_path, **changes))
