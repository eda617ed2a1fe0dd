"""Who may import whom, read from the sources."""

import ast
import re
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# What the two families of fused implementations may import: never an operation, and never each other.
_SHARED = (
    "kfde_layers.fused.batching",
    "kfde_layers.fused.eager",
    "kfde_layers.fused.needed",
    "kfde_layers.fused.second_order",
    "kfde_layers.fused.transforms",
    "kfde_layers.ops.gate",
    "kfde_layers.ops.formats",
    "kfde_layers._impl",
)

# What each file or folder may import of this project, timm and Triton; the first entry that matches a path holds.
ALLOWED = {
    "kfde_layers/__init__.py": tuple(f"kfde_layers.{room}" for room in ("layers", "functional", "insertion", "models")),
    "kfde_layers/__main__.py": (
        *(f"kfde_layers.fused.{family}.auto" for family in ("csfe", "mfdf")),
        "kfde_layers",
        "kfde_layers._impl",
        "timm",
    ),
    "kfde_layers/models": (
        "kfde_layers.layers",
        "kfde_layers.models",
        "kfde_layers._checks",
        "kfde_layers._named",
        "timm",
    ),
    "kfde_layers/insertion": (
        "kfde_layers.layers",
        "kfde_layers.insertion",
        "kfde_layers._checks",
        "kfde_layers._named",
        "timm",
    ),
    "kfde_layers/layers": (
        "kfde_layers.layers",
        "kfde_layers.ops",
        "kfde_layers.fused.csfe.options",
        "kfde_layers._impl",
        "kfde_layers._checks",
    ),
    "kfde_layers/functional.py": tuple(f"kfde_layers.ops.{page}" for page in ("cfe", "sfe", "csfe", "mfdf")),
    "kfde_layers/ops/gate.py": (),
    "kfde_layers/ops/formats.py": ("kfde_layers._impl",),
    "kfde_layers/ops": (
        *(f"kfde_layers.fused.csfe.{module}" for module in ("auto", "operator", "options")),
        *(f"kfde_layers.fused.mfdf.{module}" for module in ("auto", "operator")),
        "kfde_layers.fused.eager",
        "kfde_layers.ops",
        "kfde_layers._impl",
        "kfde_layers._checks",
    ),
    # Kernels never import ops: a fast implementation must not depend on the equations that judge it.
    "kfde_layers/fused/csfe/cuda": (
        "kfde_layers.fused.csfe.cuda",
        "kfde_layers.fused.csfe.options",
        "kfde_layers.fused.maps",
        "triton",
    ),
    "kfde_layers/fused/mfdf/cuda": (
        "kfde_layers.fused.mfdf.cuda",
        "kfde_layers.fused.mfdf.asked",
        "kfde_layers.fused.maps",
        "triton",
    ),
    "kfde_layers/fused/csfe": ("kfde_layers.fused.csfe", *_SHARED),
    "kfde_layers/fused/mfdf": ("kfde_layers.fused.mfdf", *_SHARED),
    "kfde_layers/fused/maps.py": ("triton",),
    "kfde_layers/fused/eager.py": ("kfde_layers._impl",),
    "kfde_layers/fused": (),
    "kfde_layers/testing.py": (),
    "kfde_layers/_impl.py": (),
    "kfde_layers/_checks.py": (),
    "kfde_layers/_named.py": ("timm",),
}


# room of examples/breakhis -> what it may import of its neighbours
BREAKHIS = {
    "baselines": ("breakhis.baselines",),
    "data": ("breakhis.data", "breakhis.files", "breakhis.mappings", "breakhis.names"),
    "results": ("breakhis.results", "breakhis.data", "breakhis.files", "breakhis.mappings", "breakhis.names"),
    "training": (
        "breakhis.training",
        "breakhis.baselines",
        "breakhis.data",
        "breakhis.results.metrics",
        "breakhis.files",
        "breakhis.mappings",
        "breakhis.names",
    ),
    "chosen.py": ("breakhis.data", "breakhis.names"),
    "runner.py": ("breakhis",),
    "commands.py": ("breakhis.names",),
    "files.py": (),
    "mappings.py": (),
    "names.py": (),
    "__init__.py": (),
}


def imports(path: Path, within: Callable[[ast.Module], Iterable[ast.AST]] = ast.walk) -> set[str]:
    names = set()
    for node in within(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def outside_functions(node: ast.AST) -> Iterable[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.FunctionDef):
            yield child
            yield from outside_functions(child)


def strangers(
    path: Path, allowed: tuple[str, ...], packages: tuple[str, ...] = ("kfde_layers", "timm", "triton", "ultralytics")
) -> set[str]:
    governed = {name for name in imports(path) if name.split(".")[0] in packages}
    return {name for name in governed if not any(f"{name}.".startswith(f"{prefix}.") for prefix in allowed)}


def rule_for(path: Path) -> str:
    inside = path.relative_to(ROOT).as_posix()
    return next((rule for rule in ALLOWED if inside == rule or inside.startswith(f"{rule}/")), inside)


PACKAGE = sorted((ROOT / "kfde_layers").rglob("*.py"))


def name_of(path: Path) -> str:
    return path.relative_to(ROOT / "kfde_layers").as_posix()


@pytest.mark.parametrize("path", PACKAGE, ids=name_of)
def test_each_file_imports_only_what_it_may(path):
    rule = rule_for(path)
    assert rule in ALLOWED, f"{rule} has no rule"
    assert not strangers(path, ALLOWED[rule])


@pytest.mark.parametrize("path", [path for path in PACKAGE if "cuda" not in path.parts], ids=name_of)
def test_kernels_are_imported_at_use_only(path):
    assert not kernels_in(imports(path, outside_functions))
    assert path.name == "operator.py" or not kernels_in(imports(path))


def kernels_in(names: set[str]) -> set[str]:
    return {name for name in names if ".cuda." in f"{name}."}


def test_an_import_of_kernels_outside_functions_is_seen(tmp_path):
    late, early = (
        "def run():\n    from kfde_layers.fused.csfe.cuda import launch\n",
        "import kfde_layers.fused.csfe.cuda\n",
    )
    for number, (code, seen) in enumerate([(late, False), (early, True), (late + early, True)]):
        path = tmp_path / f"{number}.py"
        path.write_text(code)
        assert bool(kernels_in(imports(path, outside_functions))) == seen


@pytest.mark.parametrize("path", PACKAGE, ids=name_of)
def test_no_file_is_long(path):
    assert len(path.read_text().splitlines()) <= 300


def code_lines(function: ast.FunctionDef) -> int:
    """Return the lines of a function without its docstring."""
    lines = function.end_lineno - function.lineno + 1
    if ast.get_docstring(function) is not None:
        lines -= function.body[0].end_lineno - function.body[0].lineno + 1
    return lines


def long_functions(path: Path) -> set[str]:
    """Return the functions of more than 60 lines, except kernels, launchers and the tables of tests."""
    return {
        function.name
        for function in ast.walk(ast.parse(path.read_text()))
        if isinstance(function, ast.FunctionDef)
        and code_lines(function) > 60
        and not (function.name.endswith("_kernel") or function.name.startswith("launch_"))
    }


@pytest.mark.parametrize("folder", ["kfde_layers", "examples", "benchmarks"])
def test_no_function_is_long(folder):
    functions = {path: names for path in sorted((ROOT / folder).rglob("*.py")) if (names := long_functions(path))}
    assert not functions


def test_a_long_function_is_seen(tmp_path):
    body = '    """Text."""\n' + "    x = 1\n" * 60
    (tmp_path / "functions.py").write_text(f"def long():\n{body}\n\ndef short():\n{body[:-11]}\n")
    assert long_functions(tmp_path / "functions.py") == {"long"}


@pytest.mark.parametrize("folder", ["examples", "benchmarks"])
def test_examples_and_benchmarks_use_public_names_only(folder):
    paths = sorted((ROOT / folder).rglob("*.py"))
    assert paths
    public = (
        "kfde_layers.functional",
        "kfde_layers.insert",
        "kfde_layers.insertion_points",
        "kfde_layers.layers",
        "kfde_layers.remove",
        "kfde_layers.testing",
    )
    public += tuple(f"kfde_layers.{layer}" for layer in ("CFE", "SFE", "CSFE", "MFDF", "__version__"))
    for path in paths:
        inside = ("kfde_layers.fused.csfe",) if path.name == "bench_calls.py" else ()  # it times what is in a call
        private = {name for name in strangers(path, (*public, *inside, "timm", "triton")) if name != "kfde_layers"}
        assert not private, path


@pytest.mark.parametrize("path", sorted((ROOT / "examples/breakhis").rglob("*.py")), ids=lambda path: path.name)
def test_the_breakhis_example_keeps_to_its_rooms(path):
    room = path.relative_to(ROOT / "examples/breakhis").parts[0]
    assert room in BREAKHIS, f"{room} has no rule"
    assert not strangers(path, BREAKHIS[room], ("breakhis",))


def imports_of_test_files(path: Path) -> set[str]:
    """Return the imported names that lead through a test file or a conftest file."""
    return {name for name in imports(path) if any(re.match(r"test_|conftest$", part) for part in name.split("."))}


def test_no_test_file_is_imported():
    for folder in ("benchmarks", "examples", "kfde_layers", "tests"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            assert not imports_of_test_files(path), path


def imports_of_other_tests(path: Path) -> set[str]:
    """Return the imported names that lie in `tests`, except in `tests.support`."""
    return {
        name for name in imports(path) if name.split(".")[0] == "tests" and not f"{name}.".startswith("tests.support.")
    }


def test_support_imports_no_test():
    paths = sorted((ROOT / "tests/support").rglob("*.py"))
    assert paths
    for path in paths:
        assert not imports_of_other_tests(path), path


def test_an_imported_test_is_seen(tmp_path):
    (tmp_path / "helper.py").write_text(
        "import tests.layers.test_cfe\nfrom tests import conftest, support\nfrom tests.support.inputs import draw\n"
        "from tests.layers import options\nimport torch.testing\n"
    )
    test_files = {"tests.layers.test_cfe", "tests.conftest"}
    assert imports_of_test_files(tmp_path / "helper.py") == test_files
    assert imports_of_other_tests(tmp_path / "helper.py") == {*test_files, "tests.layers.options"}


def test_a_forbidden_import_is_seen(tmp_path):
    imported = ("from timm.layers import Mlp", "from kfde_layers import models", "import torch", "import ultralytics")
    (tmp_path / "layer.py").write_text("\n".join(imported))
    forbidden = strangers(tmp_path / "layer.py", ALLOWED["kfde_layers/layers"])
    assert forbidden == {"timm.layers.Mlp", "kfde_layers.models", "ultralytics"}
    (tmp_path / "data.py").write_text("from breakhis.training import fit\nfrom breakhis.data.records import Record\n")
    assert strangers(tmp_path / "data.py", BREAKHIS["data"], ("breakhis",)) == {"breakhis.training.fit"}
