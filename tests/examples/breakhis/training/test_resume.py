"""What a run must find in its folder to go on; the runs themselves are in tests/examples/test_resume.py."""

import json
from types import SimpleNamespace

import pytest
import torch
from breakhis.training.resume import begin, find_finished, identify, make_way

FLAGS = {"lr": 0.1, "seeds": [0], "num_workers": 2}
ROWS = [
    {"file": f"{name}.png", "patient": name, "case": name, "split": part, "sha256": digest}
    for name, part, digest in (("a", "train", "11"), ("b", "val", "22"), ("c", "test", "33"))
]


@pytest.fixture
def begun(tmp_path):
    """The folder of a run that was killed after an epoch."""
    begin(tmp_path / "out", FLAGS, ROWS, resume=False)
    (tmp_path / "out" / "state.pt").touch()
    return tmp_path / "out"


def test_a_run_goes_on_with_the_same_flags_and_images(begun):
    assert find_finished(begun, FLAGS, ROWS) is None
    assert find_finished(begun, FLAGS | {"num_workers": 0}, ROWS) is None  # it changes no result
    (begun / "metrics.json").write_text(json.dumps({"auc": 0.5}))
    assert find_finished(begun, FLAGS, ROWS) == {"auc": 0.5}


def test_a_run_starts_in_an_empty_folder_or_after_a_kill_before_its_first_epoch(tmp_path):
    assert find_finished(tmp_path / "none", FLAGS, ROWS) is None
    begin(tmp_path, FLAGS, ROWS, resume=False)
    (tmp_path / "split.csv").unlink()
    assert find_finished(tmp_path, FLAGS, ROWS) is None


def changed(name: str, /, **changes: str) -> list[dict[str, str]]:
    """Return the rows with changes to one."""
    return [row | changes if row["file"] == name else row for row in ROWS]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (changed("c.png", sha256="34"), "c.png: sha256 was '33', now '34'"),
        (changed("a.png", split="test"), "a.png: split was 'train', now 'test'"),
        (changed("a.png", patient="z"), "a.png: patient was 'a', now 'z'"),
        (changed("b.png", file="d.png"), "b.png is missing; d.png is new"),
        (ROWS[1:], "a.png is missing"),
        ([], "a.png is missing; b.png is missing; c.png is missing"),
        (
            [*ROWS, *(row | {"file": f"{row['file']}2"} for row in 2 * ROWS)],
            "a.png2 is new; b.png2 is new; c.png2 is new",
        ),
    ],
)
def test_other_images_are_refused_by_name(begun, rows, message):
    wanted = f"--resume must find the images that {begun} .*split.csv lists them: "
    with pytest.raises(ValueError, match=f"{wanted}{message}"):
        find_finished(begun, FLAGS, rows)


def test_other_flags_are_refused(begun):
    with pytest.raises(ValueError, match=rf"flags that {begun} was started with: lr was 0.1, now 0.2$"):
        find_finished(begun, FLAGS | {"lr": 0.2}, ROWS)


@pytest.mark.parametrize("leftover", ["state.pt", "metrics.json", "best", "last"])
@pytest.mark.parametrize("missing", ["config.yaml", "split.csv"])
def test_results_without_the_file_that_says_what_they_are_of_are_refused(begun, missing, leftover):
    (begun / "state.pt").unlink()
    (begun / leftover).mkdir() if leftover in ("best", "last") else (begun / leftover).write_text("{}")
    (begun / missing).unlink()
    with pytest.raises(ValueError, match=rf"--resume must find {missing} next to {leftover}, got none in {begun}: "):
        find_finished(begun, FLAGS, ROWS)


@pytest.mark.parametrize("content", [b"", b"[1]", b"{", b"\xff\xfe", b"a: !!python/name:os.system ''"])
def test_broken_flags_are_refused_by_name(begun, content):
    (begun / "config.yaml").write_bytes(content)
    with pytest.raises(ValueError, match=r"config.yaml must be a mapping in YAML, got "):
        find_finished(begun, FLAGS, ROWS)


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"a,b\n1,2\n", b"file,split\n" + b"x" * 200_000])
def test_a_broken_division_is_refused_by_name(begun, content):
    (begun / "split.csv").write_bytes(content)
    with pytest.raises(ValueError, match=r"split.csv must be a table that|split.csv lists them: a.png is new"):
        find_finished(begun, FLAGS, ROWS)


@pytest.mark.parametrize("content", ["", "[]", "{"])
def test_broken_metrics_are_refused_by_name(begun, content):
    (begun / "metrics.json").write_text(content)
    with pytest.raises(ValueError, match=r"metrics.json must be a mapping in JSON, got "):
        find_finished(begun, FLAGS, ROWS)


def test_a_run_that_starts_again_removes_what_was_there(begun):
    for name in ("best", "last"):
        (begun / name).mkdir()
    (begun / "metrics.json").touch()
    begin(begun, FLAGS | {"lr": 0.2}, ROWS[:2], resume=False)
    assert sorted(path.name for path in begun.iterdir()) == ["config.yaml", "split.csv"]
    assert find_finished(begun, FLAGS | {"lr": 0.2}, ROWS[:2]) is None


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("metrics.json", "no finished run, got {} with metrics.json: --resume keeps it, --overwrite replaces it"),
        ("state.pt", "no unfinished run, got {} with state.pt: --resume goes on with it, --overwrite replaces it"),
    ],
)
def test_a_run_is_not_replaced_without_being_asked_for(tmp_path, name, message):
    earlier = tmp_path / "earlier"
    earlier.mkdir()
    (earlier / name).touch()
    with pytest.raises(ValueError, match=message.format(earlier)):
        make_way([tmp_path / "none", tmp_path, earlier], overwrite=False)


@pytest.mark.parametrize("name", ["config.yaml", "split.csv", "best", "results.json"])
def test_a_run_without_a_complete_epoch_is_not_refused(tmp_path, name):
    (tmp_path / name).touch()
    make_way([tmp_path / "none", tmp_path], overwrite=False)
    assert [path.name for path in tmp_path.iterdir()] == [name]  # removed as the new run begins, not before


def test_all_runs_that_are_replaced_are_unfinished_from_the_start(tmp_path):
    folders = [tmp_path / name for name in "abc"]
    for folder in folders:
        folder.mkdir()
    for folder in folders[:2]:
        (folder / "metrics.json").touch()
    (folders[2] / "state.pt").touch()
    make_way(folders, overwrite=True)
    assert not [*tmp_path.rglob("metrics.json"), *tmp_path.rglob("state.pt")]


def test_the_identity_of_a_run_is_everything_that_its_weights_depend_on(monkeypatch):
    def make(rows=ROWS, device="cpu", processes=1, **flags):
        accelerator = SimpleNamespace(device=torch.device(device), num_processes=processes)
        return identify(FLAGS | flags, rows, accelerator)

    same = make()
    assert same == make()
    for changes in ({"lr": 0.2}, {"rows": changed("c.png", sha256="34")}, {"device": "cuda"}, {"processes": 2}):
        assert make(**changes) != same
    on_gpu = make(device="cuda")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 63)
    assert {key for key, value in make().items() if value != same[key]} == {"threads (OMP_NUM_THREADS)"}
    assert make(device="cuda") == on_gpu  # the threads of the CPU do not compute the weights there
