"""The LightningModule of the page on training, against the plain loop."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from tests.support.pages import DOCS, python_blocks, run_block
from tests.support.training import CLASSES, MODELS, SMALL, STEPS, batch, build, build_reference, optimize

# Lightning 2.6 inspects data loaders with functions that PyTorch has deprecated.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated:FutureWarning"),
]
PAGE = DOCS / "training.md"


@pytest.fixture(scope="module")
def classifier_class() -> type[nn.Module]:
    """Run the class of the page, and return it."""
    pytest.importorskip("lightning", reason="Lightning is not installed")
    (block,) = (block for block in python_blocks(PAGE) if "import lightning" in block)
    definition, training = block.split("\nquiet = ")
    assert "trainer.fit" in training
    return run_block(definition, PAGE, {"torch": torch, "F": F})["Classifier"]


def fit(classifier: nn.Module, name: str, dtype: torch.dtype, precision: str) -> torch.Tensor:
    import lightning
    from lightning.fabric.utilities.warnings import PossibleUserWarning

    losses = []

    class Recorder(lightning.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            losses.append(outputs["loss"].detach())

    with warnings.catch_warnings():
        # Advice on speed, which depends on the number of cores and on whether there is an unused GPU.
        warnings.simplefilter("ignore", PossibleUserWarning)
        trainer = lightning.Trainer(
            accelerator="cpu",
            max_epochs=STEPS,
            precision=precision,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[Recorder()],
        )
        trainer.fit(classifier, DataLoader(TensorDataset(*batch(name, dtype)), batch_size=CLASSES))
    return torch.stack(losses)


def train_plainly(classifier: nn.Module, name: str, model: nn.Module) -> torch.Tensor:
    return optimize(model, classifier(model).configure_optimizers(), *batch(name))


@pytest.mark.parametrize("name", [*SMALL, *MODELS])
@pytest.mark.cell("Training engines", "Lightning")
def test_the_module_of_the_page_trains_like_the_plain_loop(name, classifier_class):
    trained, model = build(name), build(name)
    losses = fit(classifier_class(trained), name, torch.float64, "64-true")
    assert torch.equal(losses, train_plainly(classifier_class, name, model))
    for (key, parameter), expected in zip(trained.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(parameter, expected), key


@pytest.mark.parametrize("name", [*SMALL, *MODELS])
@pytest.mark.cell("Training engines", "Lightning")
def test_mixed_precision_follows_the_exact_loss_curve(name, classifier_class):
    losses = fit(classifier_class(build(name, torch.float32)), name, torch.float32, "bf16-mixed")
    exact = train_plainly(classifier_class, name, build_reference(name))
    tolerance = torch.finfo(torch.bfloat16).eps / 2 * float(exact[0])
    torch.testing.assert_close(losses.double(), exact, rtol=0, atol=tolerance)
