"""The LightningModule that the page on training shows, against the plain loop."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from tests.ecosystem.training import CLASSES, MODELS, SMALL, STEPS, batch, build, build_reference, optimize

lightning = pytest.importorskip("lightning")
pytestmark = [
    # Lightning 2.6 looks at data loaders in a way that torch has deprecated.
    pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated:FutureWarning"),
    # Its advice on speed hangs on the machine: how many cores there are, and whether a GPU lies idle.
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
]
PAGE = Path(__file__).parents[2] / "docs/training.md"


@pytest.fixture(scope="module")
def shown() -> type[nn.Module]:
    """The class of the page, as it stands there."""
    (block,) = re.findall(r"^```python\n(import lightning\n.*?)^quiet = ", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    names = {"torch": torch, "F": F}
    exec(compile(block, str(PAGE), "exec"), names)
    return names["Classifier"]


class Recorder(lightning.Callback):
    def __init__(self) -> None:
        self.losses = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(outputs["loss"].detach())


def fit(classifier: nn.Module, name: str, dtype: torch.dtype, precision: str) -> torch.Tensor:
    recorder = Recorder()
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=STEPS,
        precision=precision,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[recorder],
    )
    trainer.fit(classifier, DataLoader(TensorDataset(*batch(name, dtype)), batch_size=CLASSES))
    return torch.stack(recorder.losses)


def plain(classifier: nn.Module, name: str, model: nn.Module) -> torch.Tensor:
    return optimize(model, classifier(model).configure_optimizers(), *batch(name))


@pytest.mark.parametrize("name", [*SMALL, *MODELS])
@pytest.mark.cell("Training engines", "Lightning")
def test_the_shown_module_trains_like_the_plain_loop(name, shown):
    trained, model = build(name), build(name)
    losses = fit(shown(trained), name, torch.float64, "64-true")
    assert torch.equal(losses, plain(shown, name, model))
    for (key, one), other in zip(trained.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(one, other), key


@pytest.mark.parametrize("name", [*SMALL, *MODELS])
@pytest.mark.cell("Training engines", "Lightning")
def test_mixed_precision_follows_the_exact_loss_curve(name, shown):
    losses = fit(shown(build(name, torch.float32)), name, torch.float32, "bf16-mixed")
    exact = plain(shown, name, build_reference(name))
    tolerance = torch.finfo(torch.bfloat16).eps / 2 * float(exact[0])
    torch.testing.assert_close(losses.double(), exact, rtol=0, atol=tolerance)
