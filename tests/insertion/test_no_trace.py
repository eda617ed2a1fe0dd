"""Networks that change in their own forward pass are as before after `insertion_points`, `insert` and refusals."""

import random
import weakref
from collections import Counter, OrderedDict, defaultdict, deque
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from kfde_layers import CSFE, SFE, insert, insertion_points, remove
from kfde_layers.insertion import running
from kfde_layers.testing import random_tensor

X = random_tensor(1, 3, 16, 16, dtype=torch.float32)


class Changing(nn.Module):
    """A network whose forward pass changes one thing of it."""

    def __init__(self, change):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.end = nn.Conv2d(8, 8, 1)
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("position", torch.ones(1, 8, 4, 4))
        self.register_buffer("absent", None)
        self.calls, self.seen = 0, {"keys": ["first"]}
        self.others = [self.count, self.conv.weight]
        self.scale, self.grid = torch.ones(2), np.zeros(3)
        self.grid_of = {"tuple": (np.ones(2), [torch.zeros(2)])}
        self.names, self.last = {"conv", "end"}, deque([1, 2], maxlen=2)
        self.counts, self.defaults = Counter(["conv", "conv"]), defaultdict(list)
        self.frozen = Frozen(kind="network")
        self.notes, self.history = SimpleNamespace(calls=0, of={"conv": [0]}), History()
        self.torch_generator, self.python_generator = torch.Generator().manual_seed(1), random.Random(1)
        self.numpy_generators = [np.random.default_rng(1), np.random.RandomState(1)]
        self.change = change

    def forward(self, x):
        self.change(self)
        return self.end(self.conv(x))


class Frozen(dict):
    """A mapping that refuses every write, as the configurations of some libraries do."""

    def refuse(self, *args, **kwargs):
        raise TypeError("this mapping cannot be changed")

    clear = update = __setitem__ = refuse


@dataclass
class History:
    """What a network remembers of its calls."""

    last: float = 0.0
    all: list[float] = field(default_factory=list)


class Hidden:
    """An object that is no tensor."""


def _resize(model):
    model.position.data = nn.functional.interpolate(model.position, scale_factor=2)


def _activation(model):
    """Return a map that depends on a parameter, as an average of activations does."""
    return nn.functional.conv2d(torch.ones(1, 3, 4, 4), model.conv.weight, padding=1)


def _replace_parameter(model):
    model.conv.bias = nn.Parameter(model.conv.bias + 1)


CHANGES = {
    "a buffer in place": lambda model: model.count.add_(1),
    "a buffer anew": lambda model: setattr(model, "count", model.count + 1),
    "a buffer that grows": _resize,
    "a buffer that becomes another dtype": lambda model: setattr(model.count, "data", model.count.double() + 1),
    "a buffer that is created": lambda model: model.register_buffer("created", torch.ones(2), persistent=False),
    "a buffer that was None": lambda model: setattr(model, "absent", torch.ones(3)),
    "a buffer that is deleted": lambda model: model._buffers.pop("count", None),
    "a parameter anew": _replace_parameter,
    "a parameter in place": lambda model: model.conv.weight.data.clamp_(max=0.01),
    "a parameter at each call anew": lambda model: model.conv.weight.data.mul_(0.9),
    "a parameter that grows at each call": lambda model: model.end.bias.detach().add_(1),
    "a parameter that counts its writes": lambda model: model.end.bias.detach().fill_(0.5),
    "a buffer by another name": lambda model: model.others[0].add_(1),
    "a parameter by another name": lambda model: model.others[1].data.clamp_(max=0.01),
    "a module that is created": lambda model: setattr(model, "late", nn.Identity()),
    "a counter": lambda model: setattr(model, "calls", model.calls + 1),
    "an attribute that is created": lambda model: setattr(model, "cache", Hidden()),
    "an attribute that is deleted": lambda model: model.__dict__.pop("calls", None),
    "a plain tensor in place": lambda model: model.scale.mul_(2),
    "a plain tensor that grows": lambda model: setattr(model.scale, "data", torch.zeros(5)),
    "an array in place": lambda model: model.grid.__iadd__(1),
    "an array in a tuple": lambda model: model.grid_of["tuple"][0].__iadd__(1),
    "a tensor deep in a mapping": lambda model: model.grid_of["tuple"][1][0].add_(1),
    "a list that grows": lambda model: model.seen["keys"].append("next"),
    "a key that is created": lambda model: model.seen.update({len(model.seen): "next"}),
    "a key that is deleted": lambda model: model.seen.pop("keys", None),
    "a set that grows": lambda model: model.names.add(len(model.names)),
    "a queue that moves on": lambda model: model.last.append(model.last[-1] + 1),
    "an activation in a buffer": lambda model: model.position.copy_(_activation(model)),
    "an activation in a plain tensor": lambda model: model.scale.copy_(_activation(model)[0, :2, 0, 0]),
    "an array that grows": lambda model: model.grid.resize(6, refcheck=False),
    "a count": lambda model: model.counts.update(["conv"]),
    "a mapping with defaults": lambda model: model.defaults["conv"].append(1),
    "an entry of a namespace": lambda model: setattr(model.notes, "calls", model.notes.calls + 1),
    "a list in a namespace": lambda model: model.notes.of["conv"].append(1),
    "an entry that a namespace gets": lambda model: setattr(model.notes, "late", 1),
    "a field of a dataclass": lambda model: setattr(model.history, "last", model.history.last + 0.5),
    "a list in a dataclass": lambda model: model.history.all.append(1.0),
    "numbers of its own generator of torch": lambda model: torch.rand(3, generator=model.torch_generator),
    "numbers of its own generator of Python": lambda model: model.python_generator.random(),
    "numbers of its own generator of NumPy": lambda model: model.numpy_generators[0].random(),
    "numbers of its own older generator of NumPy": lambda model: model.numpy_generators[1].rand(),
    "the mode of a child": lambda model: model.end.train(not model.end.training),
    "random numbers of torch": lambda model: torch.rand(3),
    "random numbers of Python": lambda model: random.random(),
    "random numbers of NumPy": lambda model: np.random.rand(3),
}


def _text(value):
    """Return the text of a value, or the state of a generator of random numbers.

    The order of a set is Python's to choose: it may change when the set is filled again.
    """
    if isinstance(value, torch.Generator):
        return str(value.get_state().tolist())
    if isinstance(value, random.Random):
        return str(value.getstate())
    if isinstance(value, np.random.Generator):
        return str(value.bit_generator.state)
    if isinstance(value, np.random.RandomState):
        return str(value.get_state(legacy=False))
    if isinstance(value, list):
        return str(list(map(_text, value)))
    return repr(sorted(value, key=repr) if isinstance(value, set) else value)


def state_of(model):
    """Return everything that a forward pass may change, in a form that can be compared."""
    modules = {}
    for name, module in model.named_modules():
        tensors = {**module._parameters, **module._buffers}
        values = {
            key: None if tensor is None else (id(tensor), tensor.requires_grad, tensor.is_leaf, tensor.tolist())
            for key, tensor in tensors.items()
        }
        attributes = {key: _text(value) for key, value in module.__dict__.items() if not key.startswith("_")}
        modules[name] = (values, attributes, list(module._modules), len(module._forward_hooks))
    return modules, torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("change", CHANGES)
def test_a_network_that_changes_itself_is_left_as_it_was(change, mode):
    model, shrinking = Changing(CHANGES[change]).train(mode), nn.Conv2d(8, 4, 1)
    before = state_of(model)
    insertion_points(model, example_input=X)
    assert state_of(model) == before
    with pytest.raises(ValueError, match="must keep the shape"):
        insert(model, {"conv": shrinking}, example_input=X)
    assert state_of(model) == before
    remove(insert(model, {"conv": CSFE, "end": SFE}, example_input=X))
    assert state_of(model) == before


@pytest.mark.parametrize("change", [change for change in CHANGES if not change.startswith("random")])
def test_the_changes_are_seen(change):
    model = Changing(CHANGES[change])
    before = state_of(model)
    model(X)
    assert state_of(model) != before


class Talkative(OrderedDict):
    """A mapping that is more than its entries, and refuses to be updated."""

    def update(self, *args, **kwargs):
        raise TypeError("this mapping cannot be updated")


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_odd_attributes_do_not_keep_a_block_out(tmp_path):
    model = Changing(lambda model: model.talkative.__setitem__("key", 1))
    model.talkative = Talkative()
    model.__dict__["gone"] = weakref.proxy(nn.Identity())
    model.nested = torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)])
    model.sparse, model.unknown = torch.eye(3).to_sparse(), torch.full((3,), torch.nan).expand(2, 3)
    model.fake = FakeTensorMode().from_tensor(torch.zeros(3))
    model.objects, model.constant = np.array([None, {}]), np.zeros(2)
    model.constant.setflags(write=False)
    np.save(tmp_path / "map.npy", np.zeros(3))
    model.memory = np.load(tmp_path / "map.npy", mmap_mode="r+")
    model.own = [model.seen]
    model.own.append(model.own)
    written = (tmp_path / "map.npy").stat().st_mtime_ns
    insert(model, {"conv": CSFE}, example_input=X)
    assert type(model.conv.kfde) is CSFE
    assert model.talkative == {"key": 1}  # a mapping of another type is not looked into, and keeps what it got
    assert model.unknown._version == 0
    assert (tmp_path / "map.npy").stat().st_mtime_ns == written


def test_what_is_not_changed_is_not_written():
    model = Changing(lambda model: None)
    walk = iter(model.last)  # Python stops it if its queue is written
    insertion_points(model, example_input=X)
    with pytest.raises(ValueError, match="must keep the shape"):
        insert(model, {"conv": nn.Conv2d(8, 4, 1)}, example_input=X)
    assert list(walk) == [1, 2]


class Checkpointed(nn.Module):
    """Run the second half again in the backward pass, where batch norms would count it."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 1)
        self.second = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8))

    def forward(self, x):
        return checkpoint(self.second, self.first(x), use_reentrant=False)


def test_a_forward_pass_that_is_repeated_backward_leaves_no_trace():
    model = Checkpointed().train()
    before = state_of(model)
    remove(insert(model, {"first": SFE}, example_input=X))
    assert state_of(model) == before


def test_backward_hooks_and_gradients_of_the_model_see_nothing():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 1))
    calls = []
    model[2].register_full_backward_hook(lambda *args: calls.append("module"))
    model[2].register_full_backward_pre_hook(lambda *args: calls.append("module, before"))
    model[2].weight.register_hook(lambda gradient: calls.append("weight"))
    insert(model, {"1": SFE}, example_input=X)
    assert not calls
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def test_a_step_that_cannot_be_undone_keeps_no_other_from_being_undone(monkeypatch):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.BatchNorm2d(8)).train()

    def fail(state):
        raise RuntimeError("this one cannot be undone")

    monkeypatch.setattr(running.random, "setstate", fail)
    model[2].register_forward_hook(lambda module, args, output: module.running_var.add_(1))
    numbers = torch.get_rng_state(), str(np.random.get_state())
    with pytest.raises(RuntimeError, match="this one cannot be undone"):
        insertion_points(model, example_input=X)
    assert all(module.training for module in model.modules())
    assert [len(module._forward_hooks) for module in model] == [0, 0, 1]
    assert torch.equal(model[2].running_var, torch.ones(8))
    assert torch.equal(torch.get_rng_state(), numbers[0])
    assert str(np.random.get_state()) == numbers[1]


def test_tied_tensors_stay_tied_while_the_network_runs():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 1)
            self.second.weight = self.first.weight
            self.first.register_buffer("shift", torch.ones(1))
            self.second.register_buffer("shift", self.first.shift)
            self.first.weight.scale = 2.0  # an attribute of a parameter

        def forward(self, x):
            assert self.second.weight is self.first.weight
            assert self.second.shift is self.first.shift
            assert self.second.weight.scale == 2
            return self.first(x) + self.second(x)

    model = Tied()
    weight = model.first.weight
    insert(model, {"first": CSFE}, example_input=X)
    assert model.first.weight is model.second.weight is weight


def test_the_example_is_not_changed():
    class InPlace(nn.Module):
        def forward(self, x):
            return x.add_(1)

    x = X.clone()
    insertion_points(nn.Sequential(InPlace(), nn.Conv2d(3, 8, 3)), example_input=x)
    assert torch.equal(x, X)


def test_a_graph_that_holds_the_parameters_still_runs_backward():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.GELU(), nn.Conv2d(8, 8, 1))
    loss = model(X).square().sum()
    expected = torch.autograd.grad(loss, model[0].weight, retain_graph=True)[0]
    insert(model, {"1": CSFE}, example_input=X)
    loss.backward()
    assert torch.equal(model[0].weight.grad, expected)
