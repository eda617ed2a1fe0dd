import copy
import json

import pytest
import timm
from breakhis.training.model_config import read_config

CONFIG = {
    "architecture": "test_vit",
    "num_classes": 3,
    "label_names": ["a", "b", "c"],
    "pretrained_cfg": {"input_size": [3, 64, 96], "mean": [0.1, 0.2, 0.3], "std": [1, 1.5, 2]},
}


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
        ({"mean": [0.1, 0.2, float("nan")]}, "must have mean of 3 numbers, got"),
        ({"std": [0, 1, 1]}, r"must have std of 3 positive numbers, got \[0, 1, 1\]"),
        ({"std": [1, float("inf"), 1]}, "must have std of 3 positive numbers"),
        ({"input_size": 8}, "must have input_size .3, height, width., from 32 px to 4096 px, got 8"),
        ({"input_size": [3, 8, 8]}, r"to 4096 px, got \[3, 8, 8\]"),
        ({"input_size": [1, 64, 64]}, r"to 4096 px, got \[1, 64, 64\]"),
        ({"input_size": [3, 64.5, 64]}, r"to 4096 px, got \[3, 64.5, 64\]"),
        ({"input_size": [3, 64, 10**7]}, r"to 4096 px, got \[3, 64, 10000000\]"),
    ],
)
def test_a_wrong_entry_is_named_with_its_value(changes, message, tmp_path):
    with pytest.raises(ValueError, match=f"config.json {message}|config.json must have input_size .*{message}"):
        read_config(write(tmp_path, **changes))
