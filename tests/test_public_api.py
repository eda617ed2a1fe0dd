import inspect

import kfde_layers
from kfde_layers import functional

SIGNATURES = {
    kfde_layers.CFE: "channels num_groups=None threshold=0.5 eps=1e-05 * impl='auto' device=None dtype=None",
    kfde_layers.SFE: "channels=None lambd=0.0001 beta=0.5 correction=0 * impl='auto' device=None dtype=None",
    kfde_layers.CSFE: "channels num_groups=None threshold=0.5 lambd=0.0001 beta=0.5 correction=0 eps=1e-05 "
    "arrangement='parallel' fusion='sum' * impl='auto' device=None dtype=None",
    kfde_layers.MFDF: "channels kernel_sizes=(1, 3, 5, 7) dilation=1 groups='depthwise' bias=True norm_layer=None "
    "act_layer=None rd_ratio=0.0625 rd_channels=None * impl='auto' device=None dtype=None",
    functional.cfe: "x weight bias num_groups threshold=0.5 eps=1e-05 * impl='auto'",
    functional.sfe: "x lambd=0.0001 beta=0.5 correction=0 * impl='auto'",
    functional.csfe: "x weight bias num_groups threshold=0.5 lambd=0.0001 beta=0.5 correction=0 eps=1e-05 "
    "arrangement='parallel' fusion='sum' * impl='auto'",
    functional.mfdf: "x branch_weights branch_biases fc1_weight fc1_bias fc2_weight fc2_bias dilation=1 "
    "groups='depthwise' * impl='auto'",
    kfde_layers.insert: "model blocks * example_input=None identity_start=False",
    kfde_layers.insertion_points: "model * example_input=None",
    kfde_layers.remove: "model names=None",
}


def signature_of(function) -> str:
    words = []
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and "*" not in words:
            words.append("*")
        default = "" if parameter.default is parameter.empty else f"={parameter.default!r}"
        words.append(parameter.name + default)
    return " ".join(words)


def test_names():
    assert kfde_layers.__all__ == ["CFE", "CSFE", "MFDF", "SFE", "functional", "insert", "insertion_points", "remove"]
    assert functional.__all__ == ["cfe", "csfe", "mfdf", "sfe"]
    assert kfde_layers.__version__.count(".") == 2


def test_signatures():
    for function, signature in SIGNATURES.items():
        assert signature_of(function) == signature, function


def test_every_public_name_is_documented():
    for function in SIGNATURES:
        text = inspect.getdoc(function)
        for section in ("Args:", "Raises:", "Examples:"):
            assert section in text, (function, section)
        for name in inspect.signature(function).parameters:
            assert f"    {name}:" in text, (function, name)
