"""Blocks in the backbones of small detectors of Ultralytics, torchvision and transformers, with random weights."""

import copy
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

from kfde_layers import CSFE, MFDF, insert, remove
from kfde_layers.testing import scatter_parameters
from tests.support.agreement import outputs_are_equal, relative_error, tensors_of
from tests.support.detectors import BRIEF, SIDE, import_ultralytics, trainer_of, write_data
from tests.support.networks import make_host

pytestmark = [pytest.mark.deployment, pytest.mark.slow]

TABLE = "Detectors"
TOLERANCE = 1e-4  # of the largest value: some 1e-6 are measured, and 0.1 and more without the blocks
X = torch.rand(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))


def put_blocks(model, points, **options):
    options = {"example_input": X[:1], "identity_start": True} | options
    return insert(model, dict(zip(points, (CSFE, MFDF), strict=True)), **options)


def scatter_blocks(model):
    """Give all blocks other weights than those of an identity."""
    for name, module in model.named_modules():
        if name.endswith(".kfde"):
            scatter_parameters(module)


def block_state(model):
    return {name: value.clone() for name, value in model.state_dict().items() if ".kfde." in name}


def largest_error(output, expected):
    return max(map(relative_error, tensors_of(output), tensors_of(expected)))


class Yolo(NamedTuple):
    config: str
    task: str
    points: tuple[str, str]


# the last stage of stride 16 of the backbone, and its last module
YOLOS = {
    "YOLOv8 detect": Yolo("yolov8n.yaml", "detect", ("model.6", "model.9")),
    "YOLO11 detect": Yolo("yolo11n.yaml", "detect", ("model.6", "model.10")),
    "YOLO12 detect": Yolo("yolo12n.yaml", "detect", ("model.6", "model.8")),
    "YOLOv8 segment": Yolo("yolov8n-seg.yaml", "segment", ("model.6", "model.9")),
    "YOLO11 pose": Yolo("yolo11n-pose.yaml", "pose", ("model.6", "model.10")),
    "YOLO11 classify": Yolo("yolo11n-cls.yaml", "classify", ("model.6", "model.9")),
}


def cell(column, hosts=YOLOS):
    cases = [pytest.param(host, marks=pytest.mark.cell(TABLE, row, column), id=row) for row, host in hosts.items()]
    return pytest.mark.parametrize("host", cases)


@pytest.fixture(scope="module")
def ultralytics(tmp_path_factory):
    return import_ultralytics(tmp_path_factory.mktemp("settings"))


@pytest.fixture(scope="module")
def train(ultralytics, tmp_path_factory):
    """Train a host for two steps with Ultralytics' own trainer; return the YOLO, and its blocks at the start."""

    def train(host, weights=None, **options):
        folder = tmp_path_factory.mktemp("yolo")
        yolo = ultralytics.YOLO(weights or host.config)
        start = {}

        def insert_blocks(model):
            start.update(block_state(put_blocks(model, host.points)))

        settings = BRIEF | {"optimizer": "AdamW", "lr0": 0.01, "warmup_epochs": 0, "deterministic": False} | options
        data = str(write_data(folder / "data", host.task))
        yolo.train(trainer=trainer_of(yolo, insert_blocks), data=data, project=str(folder), name="run", **settings)
        return yolo, start

    return functools.cache(train)


@pytest.fixture
def with_blocks(ultralytics):
    """Make the YOLO of a host, with blocks that are no identity."""

    def with_blocks(host):
        torch.manual_seed(0)
        yolo = ultralytics.YOLO(host.config)
        scatter_blocks(put_blocks(yolo.model.eval(), host.points))
        return yolo

    return with_blocks


@cell("starts equal")
@torch.no_grad()
def test_yolo_predicts_the_same_until_its_blocks_change(host, ultralytics):
    model = ultralytics.YOLO(host.config).model.eval()
    expected = model(X)
    put_blocks(model, host.points)
    assert outputs_are_equal(model(X), expected)
    scatter_blocks(model)
    assert not outputs_are_equal(model(X), expected)
    assert outputs_are_equal(remove(model)(X), expected)


@cell("trains")
def test_yolo_trains_every_parameter_of_its_blocks(host, train):
    yolo, start = train(host)
    trained = block_state(yolo.trainer.model)
    assert list(trained) == list(start) != []
    for name, value in trained.items():
        assert value.isfinite().all(), name
        assert not torch.equal(value, start[name]), name


@cell("checkpoint")
@torch.no_grad()
def test_a_checkpoint_of_yolo_holds_its_blocks(host, train, ultralytics, tmp_path):
    yolo, start = train(host)
    average = copy.deepcopy(yolo.trainer.ema.ema).half().float().eval()  # as it is saved
    yolo.save(tmp_path / "saved.pt")
    for path in (yolo.trainer.last, yolo.trainer.best, tmp_path / "saved.pt"):
        loaded = ultralytics.YOLO(path).model.eval()
        assert list(block_state(loaded)) == list(start)
        assert outputs_are_equal(loaded(X), average(X))
        assert not outputs_are_equal(remove(loaded)(X), average(X))


@pytest.mark.cell(TABLE, "YOLO11 detect", "checkpoint")
def test_training_goes_on_with_the_blocks_of_a_checkpoint(train, ultralytics):
    host = YOLOS["YOLO11 detect"]
    yolo, start = train(host)
    loaded = block_state(ultralytics.YOLO(yolo.trainer.last).model)
    continued, fresh = train(host, yolo.trainer.last, lr0=0.0)  # which changes no parameter
    assert list(fresh) == list(start)
    for name, value in block_state(continued.trainer.model).items():
        assert torch.equal(value, loaded[name]), name


@cell("fused")
@torch.no_grad()
def test_fuse_keeps_the_blocks_of_yolo(host, with_blocks):
    yolo = with_blocks(host)
    expected = tensors_of(yolo.model(X))
    yolo.fuse()
    assert yolo.model.is_fused()
    assert largest_error(yolo.model(X), expected) < TOLERANCE
    assert largest_error(remove(yolo.model)(X), expected) > 100 * TOLERANCE


@pytest.mark.parametrize("part", ["conv", "bn"])
@pytest.mark.cell(TABLE, "YOLO11 detect", "fused")
def test_a_part_that_fuse_takes_away_gets_no_block(part, ultralytics):
    model = ultralytics.YOLO("yolo11n.yaml").model
    with pytest.raises(ValueError, match=f"cannot insert at 'model.5.{part}': the model merges this module"):
        insert(model, {f"model.5.{part}": CSFE}, example_input=X[:1])


@cell("ONNX")
@pytest.mark.filterwarnings("ignore:You are using the legacy TorchScript-based ONNX export:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The feature will be removed. Please remove usage:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:Converting a tensor to a Python (boolean|integer) might cause the trace to be")
@torch.no_grad()
def test_the_onnx_file_that_yolo_exports_gives_its_numbers(host, with_blocks, monkeypatch, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed")
    monkeypatch.chdir(tmp_path)
    yolo = with_blocks(host)
    path = yolo.export(format="onnx", imgsz=SIDE, dynamic=True, simplify=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for shape in ((1, 3, SIDE, SIDE), (3, 3, 96, 160)):
        x = torch.rand(shape, generator=torch.Generator().manual_seed(1))
        outputs = session.run(None, {"images": x.numpy()})
        expected = tensors_of(yolo.model(x))[: len(outputs)]  # after which come what the losses use
        assert len(outputs) == (2 if host.task == "segment" else 1)
        assert max(map(relative_error, outputs, expected)) < TOLERANCE


def faster_rcnn():
    detection = pytest.importorskip("torchvision.models.detection", reason="torchvision is not installed")
    return detection.fasterrcnn_mobilenet_v3_large_320_fpn(
        weights=None, weights_backbone=None, num_classes=3, min_size=SIDE, box_score_thresh=0
    )


def retinanet():
    detection = pytest.importorskip("torchvision.models.detection", reason="torchvision is not installed")
    backbone = detection.backbone_utils.resnet_fpn_backbone(backbone_name="resnet18", weights=None, trainable_layers=5)
    return detection.RetinaNet(backbone, num_classes=3, min_size=SIDE, score_thresh=0)


def torchvision_loss(model):
    target = {"boxes": torch.tensor([[16.0, 16, 48, 48]]), "labels": torch.tensor([1])}
    return sum(model(list(X), [target] * len(X)).values())


SMALL_RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16, 24, 32], "depths": [1] * 4, "layer_type": "basic"}
SMALL_DETR = {"d_model": 32, "num_queries": 5, "num_labels": 2, "decoder_layers": 2, "decoder_attention_heads": 2}


def detr(**backbone):
    library = pytest.importorskip("transformers", reason="transformers is not installed")
    if not backbone:
        config = library.ResNetConfig(**SMALL_RESNET, out_features=["stage4"])
        backbone = {"backbone_config": config, "use_timm_backbone": False}
    small = {"encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    return library.DetrForObjectDetection(library.DetrConfig(**backbone, **small, **SMALL_DETR))


def rt_detr():
    library = pytest.importorskip("transformers", reason="transformers is not installed")
    backbone = library.RTDetrResNetConfig(**SMALL_RESNET, out_features=["stage2", "stage3", "stage4"])
    widths = {"encoder_in_channels": [16, 24, 32], "decoder_in_channels": [32] * 3, "encoder_hidden_dim": 32}
    config = library.RTDetrConfig(backbone_config=backbone, encoder_attention_heads=2, **widths, **SMALL_DETR)
    return library.RTDetrForObjectDetection(config)


def transformers_loss(model):
    label = {"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.4, 0.4]])}
    return model(X, labels=[label] * len(X)).loss


class Host(NamedTuple):
    make: Callable[[], nn.Module]
    holder: str
    """Name of the module, which takes (N, C, H, W), into which blocks are inserted."""
    points: tuple[str, str]
    detect: Callable[[nn.Module], Any]
    loss: Callable[[nn.Module], torch.Tensor]


_torchvision = functools.partial(Host, detect=lambda model: model(list(X)), loss=torchvision_loss, holder="backbone")
_transformers = functools.partial(Host, detect=lambda model: model(X), loss=transformers_loss, holder="")
STAGES = "model.backbone.model.encoder.stages"
HOSTS = {
    "Faster R-CNN": _torchvision(faster_rcnn, points=("body.12", "body.15")),
    "RetinaNet": _torchvision(retinanet, points=("body.layer3", "body.layer4")),
    "DETR": _transformers(detr, points=(f"{STAGES}.2", f"{STAGES}.3")),
    "DETR on a timm backbone": _transformers(
        functools.partial(detr, backbone="resnet18", use_timm_backbone=True, use_pretrained_backbone=False),
        points=("model.backbone.model.layer3", "model.backbone.model.layer4"),
    ),
    "RT-DETR": _transformers(rt_detr, points=(f"{STAGES}.2", f"{STAGES}.3")),
}


def make_with_blocks(host):
    model = make_host(host.make)
    put_blocks(model.get_submodule(host.holder), host.points)
    return model


@cell("starts equal", HOSTS)
@torch.no_grad()
def test_detections_are_the_same_until_the_blocks_change(host):
    model = make_host(host.make)
    expected = host.detect(model)
    put_blocks(model.get_submodule(host.holder), host.points)
    assert outputs_are_equal(host.detect(model), expected)
    scatter_blocks(model)
    assert not outputs_are_equal(host.detect(model), expected)
    assert outputs_are_equal(host.detect(remove(model)), expected)


@cell("trains", HOSTS)
def test_the_detector_s_own_loss_trains_every_parameter_of_the_blocks(host):
    model = make_with_blocks(host).train()
    start = block_state(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(2):  # a blend of zero stops the block's gradients in the first step
        optimizer.zero_grad()
        host.loss(model).backward()
        optimizer.step()
    for name, value in block_state(model).items():
        assert value.isfinite().all(), name
        assert not torch.equal(value, start[name]), name


@cell("checkpoint", HOSTS)
@torch.no_grad()
def test_a_state_dict_brings_the_blocks_back(host, tmp_path):
    model = make_with_blocks(host)
    scatter_parameters(model, deviation=0.01)
    scatter_blocks(model)
    torch.save(model.state_dict(), tmp_path / "state.pt")
    fresh = make_with_blocks(host)
    assert not outputs_are_equal(host.detect(fresh), host.detect(model))
    fresh.load_state_dict(torch.load(tmp_path / "state.pt"))
    assert outputs_are_equal(host.detect(fresh), host.detect(model))
