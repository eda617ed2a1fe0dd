import argparse
import hashlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from breakhis.training.flags import make_parser
from breakhis.training.options import differences, expand, parse_args, recorded

from tests.support.flags import parse


def test_a_single_run_writes_into_the_output_directory(tmp_path):
    (run,) = expand(parse(tmp_path))
    assert (run.variant, run.magnification, run.fold, run.seed) == ("kfde_convnextv2_atto", "100X", 0, 0)
    assert run.output_dir == tmp_path / "out"


def test_every_variant_magnification_fold_and_seed_is_a_run(tmp_path):
    args = parse(
        tmp_path, "--ablation", "--magnification", "all", "--folds", "all", "--num-folds", "3", "--seeds", "1", "2"
    )
    runs = expand(args)
    assert len(runs) == 4 * 4 * 3 * 2
    assert len({run.output_dir for run in runs}) == len(runs)
    assert {run.variant: run.model_kwargs for run in runs} == {
        "baseline": {"csfe": False, "mfdf": False},
        "CSFE": {"mfdf": False},
        "MFDF": {"csfe": False},
        "KFDE": {},
    }
    assert {run.magnification for run in runs} == {"40X", "100X", "200X", "400X"}
    assert {run.fold for run in runs} == {0, 1, 2}
    assert {run.seed for run in runs} == {1, 2}
    assert str(runs[0].output_dir.relative_to(tmp_path)) == "out/runs/baseline-40X-fold0-seed1"


def test_flags_are_read_without_the_libraries_that_take_seconds():
    """In a process of its own, since this one has them all."""
    script = (
        "import sys\nimport train_breakhis\n"
        "for flags in (['--help'], ['--epoch', '3'], ['--synthetic', '--output-dir', 'x', '--lr', '-1']):\n"
        "    try:\n        train_breakhis.main(flags)\n"
        "    except SystemExit:\n        pass\n"
        "print(sorted({'torch', 'timm', 'numpy', 'sklearn', 'accelerate'} & sys.modules.keys()))"
    )
    examples = Path(__file__).parents[4] / "examples"
    run = subprocess.run([sys.executable, "-c", script], cwd=examples, capture_output=True, text=True, check=True)
    assert run.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("flags", [["--seed", "3", "--fold", "2"], ["--seeds", "3", "--folds", "2"]])
def test_one_seed_and_one_fold_may_be_named_in_the_singular(flags, tmp_path):
    (run,) = expand(parse(tmp_path, *flags))
    assert (run.seed, run.fold) == (3, 2)


def test_a_file_of_flags_is_read_like_the_command_line_which_overrides_it(tmp_path):
    flags = {"synthetic": True, "lr": 0.01, "epochs": 3, "class_weights": True, "strict": False, "seeds": [4, 5]}
    flags |= {
        "model_kwargs": {"output_stride": 8},
        "checkpoint_path": None,
        "variants": {"z": {}, "a": {"csfe": False}},
    }
    (tmp_path / "flags.yaml").write_text(yaml.safe_dump(flags, sort_keys=False) + "mixed_precision: no\n")
    argv = [
        "--config",
        str(tmp_path / "flags.yaml"),
        "--output-dir",
        str(tmp_path),
        "--epochs",
        "7",
        "--no-class-weights",
    ]
    args = parse_args(argv)
    assert list(args.variants) == ["z", "a"]  # the others are compared with the first
    assert (args.synthetic, args.lr, args.epochs, args.class_weights) == (True, 0.01, 7, False)
    assert args.mixed_precision == "no"  # YAML reads it as false
    assert (args.seeds, args.model_kwargs, args.checkpoint_path) == ([4, 5], {"output_stride": 8}, None)


def test_the_recorded_flags_repeat_a_run(tmp_path):
    arguments = [
        "--lr",
        "3e-4",
        "--seeds",
        "1",
        "2",
        "--ablation",
        "--img-size",
        "64",
        "--drop-path",
        "0.1",
        "--strict",
    ]
    for run in expand(parse(tmp_path, *arguments)):
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(recorded(run)))
        argv = ["--config", str(tmp_path / "config.yaml"), "--output-dir", str(run.output_dir)]
        (repeated,) = expand(parse_args(argv))
        assert differences(recorded(run), recorded(repeated)) == []
        assert repeated.model_kwargs == run.model_kwargs


def test_every_flag_is_recorded_and_a_changed_one_is_named(tmp_path):
    (before,), (now,) = (
        expand(parse(tmp_path, "--lr", "0.1")),
        expand(parse(tmp_path, "--lr", "0.2", "--num-workers", "0")),
    )
    not_recorded = {
        "output_dir",
        "config",
        "resume",
        "overwrite",
        "shard",
        "variant",
        "fold",
        "seed",
    }  # in the name of the folder, or in the plural flag
    assert vars(before).keys() - not_recorded < recorded(before).keys()
    assert differences(recorded(before), recorded(now)) == ["lr was 0.1, now 0.2"]


def test_the_content_of_a_checkpoint_is_recorded_and_compared(tmp_path, capsys):
    weights = tmp_path / "weights.pth"
    runs = []
    for content in (b"first", b"second"):
        weights.write_bytes(content)
        runs += expand(parse(tmp_path, "--checkpoint-path", str(weights)))
    before, now = (recorded(run) for run in runs)
    digests = [hashlib.sha256(content).hexdigest() for content in (b"first", b"second")]
    assert [flags["checkpoint_sha256"] for flags in (before, now)] == digests
    message = f"checkpoint_sha256 of {weights} was '{digests[0]}', now '{digests[1]}'"
    assert differences(before, now) == [message]
    assert differences(recorded(*expand(parse(tmp_path))), now) == [
        f"checkpoint_sha256 of {weights} was None, now '{digests[1]}'"
    ]
    moved = weights.rename(tmp_path / "moved.pth")
    assert differences(now, recorded(*expand(parse(tmp_path, "--checkpoint-path", str(moved))))) == []
    moved.rename(weights)
    # The recorded flags repeat a run from the same weights only.
    argv = ["--config", str(tmp_path / "config.yaml"), "--output-dir", str(tmp_path / "out")]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(now))
    assert parse_args(argv).checkpoint_sha256 == digests[1]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(before))
    with pytest.raises(SystemExit):
        parse_args(argv)
    assert f"with --checkpoint-sha256 {digests[0]}, got '{weights}' with {digests[1]}" in capsys.readouterr().err


def test_a_piece_of_the_gauss_error_function_is_read_and_repeated(tmp_path):
    (run,) = expand(parse(tmp_path, "--gauss-error", "-3", "5", "--min-lr", "1e-6"))
    assert (run.gauss_error, run.min_lr) == ([-3, 5], 1e-6)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(recorded(run)))
    argv = ["--config", str(tmp_path / "config.yaml"), "--output-dir", str(tmp_path / "out")]
    assert parse_args(argv).gauss_error == [-3, 5]


WHOLE_NUMBERS = [
    *(("epochs", 1, 10**6), ("batch-size", 1, 10**6), ("grad-accum-steps", 1, 10**6), ("folds", 0, 10**6)),
    *(("num-workers", 0, 256), ("num-folds", 2, 1000), ("img-size", 32, 4096)),
    *(("seeds", 0, 2**32 - 1), ("split-seed", 0, 2**32 - 1)),
]


def test_every_flag_of_a_whole_number_has_a_limit():
    """Find them by what they do with text, so that a new flag cannot be forgotten."""
    whole = {action.dest for action in make_parser()._actions if action.type is not None and is_whole(action.type)}
    assert whole == {flag.replace("-", "_") for flag, _, _ in WHOLE_NUMBERS}


def is_whole(parse: Callable[[str], object]) -> bool:
    """Return whether a type makes the number 64 of "64"."""
    try:
        return type(parse("64")) is int
    except argparse.ArgumentTypeError:
        return False


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data-dir", "x"], "one of the arguments --data-dir and --synthetic is required, and not both"),
        (["--folds", "5"], "argument --folds: must be below --num-folds 5, got 5"),
        (["--folds", "some"], "argument --folds: invalid"),
        (["--epochs", "0"], "argument --epochs: must be from 1 to 1000000, got 0"),
        (["--epochs", "many"], "argument --epochs: invalid int value: 'many'"),
        (["--lr", "nan"], "argument --lr: must be a positive number, got nan"),
        (["--min-lr", "0.1"], "argument --min-lr: must be at most --lr 0.0001, got 0.1"),
        (["--gauss-error", "0", "3"], "argument --gauss-error: must be a number below 0 and one above it, got [0.0, 3"),
        (["--gauss-error", "-3", "11"], "argument --gauss-error: must be from -10 to 10, got 11.0"),
        (["--tested-cases", "halved", "--protocol", "image"], "must be whole unless --protocol patient divides cases"),
        (
            ["--tested-cases", "leaked", "--group-by", "patient"],
            "must be whole unless --protocol patient divides cases",
        ),
        (
            ["--tested-cases", "leaked", "--score-on", "val"],
            "--tested-cases: must be whole with --score-on val, got 'lea",
        ),
        (
            ["--variants", "{a: {tested_cases: halved}, b: {}, c: {tested_cases: leaked}}"],
            "so that they test the same images, got 'halved' for a and 'whole' for b",
        ),
        (["--smoothing", "2"], "argument --smoothing: must be from 0 to 1, got 2.0"),
        (["--mixup", "nan"], "argument --mixup: must be from 0 to 1000000, got nan"),
        (["--model", "nonesuch"], "a model that timm knows, got 'nonesuch'"),
        (["--model-kwargs", "7"], "argument --model-kwargs: must be a mapping in YAML, got '7'"),
        (["--ablation", "--insert", "{layer1: se}"], "argument --ablation: needs at least two blocks in --insert, got"),
        (["--model", "resnet18", "--identity-start"], "argument --identity-start: not allowed without blocks"),
        *(
            (["--shard", text], f"argument --shard: must be I/N with I from 1 to N, such as 1/4, got {text!r}")
            for text in ("0/2", "3/2", "1", "1/0", "a/b", "1/2/3")
        ),
        (["--insert", "[layer1]"], "argument --insert: must be a mapping in YAML, got '[layer1]'"),
        (["--variants", "{a: {lr: -1}}"], "argument --lr: must be a positive number, got -1.0"),
        (["--variants", "{a: {lr: }}"], "argument --variants: must give a value to lr in a, got none"),
        (["--variants", "{a: {seed: 1}}"], "must have flags of the model and the recipe, got seed in a"),
        (["--variants", "{a: {task: subtype}}"], "must have flags of the model and the recipe, got task in a"),
        (["--variants", "{a: {epoch: 2}}"], "must have known flags, got epoch in a; did you mean epochs?"),
        (["--variants", "{a: {weight-decay: -1}}"], "argument --weight-decay: must be from 0 to 1000000, got -1.0"),
        (["--variants", "{a: {model: nonesuch}}"], "a model that timm knows, got 'nonesuch'"),
        (["--variants", "{a: {insert: 3}}"], "argument --insert: must be a mapping in YAML, got '3'"),
        (["--variants", "{a: {checkpoint_path: none}}"], "argument --checkpoint-path: must be a file"),
        (["--ablation", "--variants", "{a: {}}"], "argument --variants: not allowed with argument --ablation"),
        (["--dataset", "idc"], "argument --dataset: must be 'breakhis' to be downloaded or drawn, got 'idc'"),
        (["--protocol", "official"], "'official' lists the images of BreakHis alone"),
        (
            ["--protocol", "official", "--num-folds", "3"],
            "argument --num-folds: must be 5 with --protocol official, got 3",
        ),
        (["--protocol", "image", "--group-by", "patient"], "argument --group-by: not allowed with --protocol image"),
        (["--seeds", "0", "0"], "argument --seeds: must name each once, and all or pooled alone, got [0, 0]"),
        (["--folds", "1", "all"], "argument --folds: must name each once, and all or pooled alone, got [1, 'all']"),
        (["--magnification", "all", "pooled"], "argument --magnification: must name each once"),
        (["--variants", "{1: {}}"], "argument --variants: must map names of letters, digits and .+-_ to mappings"),
        (["--variants", "{../x: {}}"], "got '../x': {}"),
        (["--variants", "{a: 3}"], "got 'a': 3"),
        (["--layer-decay", "0"], "argument --layer-decay: must be from 0.01 to 1, got 0.0"),
        (["--checkpoint-path", "none.safetensors"], "argument --checkpoint-path: must be a file"),
        (
            ["--mixup", "0.2", "--batch-size", "3"],
            "argument --batch-size: must be even with --mixup or --cutmix, got 3",
        ),
        (["--config", "none.yaml"], "argument --config: must be a YAML file that can be read"),
        (["--batch-size", "0"], "argument --batch-size: must be from 1 to 1000000, got 0"),
        (["--mixup", "inf"], "argument --mixup: must be from 0 to 1000000, got inf"),
        (["--weight-decay", "1e300"], "argument --weight-decay: must be from 0 to 1000000, got 1e+300"),
        *(
            ([f"--{flag}", str(value)], f"argument --{flag}: must be from {low} to {high}, got {value}")
            for flag, low, high in WHOLE_NUMBERS
            for value in (high + 1, 10**30, -1)
        ),
        (["--lr", "1e300"], "argument --lr: must be at most 1e+06, got 1e+300"),
        (
            ["--model-kwargs", "{checkpoint_path: x}"],
            "or --variants: must not have checkpoint_path, which",
        ),
        (
            ["--model-kwargs", "{pretrained: true}"],
            "or --variants: must not have pretrained, which this",
        ),
        (["--variants", "{a: {}, b: {num_classes: 3}}"], "or --variants: must not have num_classes, which this"),
        (["--seeds", str(2**70)], "argument --seeds: must be from 0 to 4294967295, got 1180591620717411303424"),
        (["--seeds", "4294967296"], "argument --seeds: must be from 0 to 4294967295, got 4294967296"),
        (["--split-seed", str(2**32)], "argument --split-seed: must be from 0 to 4294967295, got 4294967296"),
        (["--color-jitter", "5"], "argument --color-jitter: must be from 0 to 2.5, got 5.0"),
        (["--stain-jitter", "1e9"], "argument --stain-jitter: must be from 0 to 1, got 1000000000.0"),
        (["--img-size", "4097"], "argument --img-size: must be from 32 to 4096, got 4097"),
        (["--model-kwargs", "{a: ["], "argument --model-kwargs: must be a mapping in YAML, got '{a: [': while parsing"),
        (["--model-kwargs", "{a: !!python/name:os.system ''}"], "argument --model-kwargs: must be a mapping in YAML"),
        (["--variants", "[" * 9999], "argument --variants: must be a mapping in YAML, got '[[["),
        (["--model-kwargs", "{a: 2026-13-45}"], "argument --model-kwargs: must be a mapping in YAML"),
        (
            ["--checkpoint-path", "a\0b"],
            "argument --checkpoint-path: must be a path, which has no NUL character, got 'a",
        ),
        (["--output-dir", "\0"], "argument --output-dir: must be a path, which has no NUL character, got"),
        (["--config", "\0"], "argument --config: must be a path, which has no NUL character, got"),
        (["--output-dir", __file__], "argument --output-dir: must be a directory, got the file"),
        (["--epoch", "3"], "unrecognized arguments: --epoch 3; did you mean --epochs?"),
        (["--batchsize=3"], "unrecognized arguments: --batchsize=3; did you mean --batch-size?"),
        (["--qqqq"], "unrecognized arguments: --qqqq\n"),
        (["--model", "resnet5O"], "got 'resnet5O'; did you mean resnet50?"),
        (["--overwrite", "--resume"], "argument --overwrite: not allowed with argument --resume"),
        (["--checkpoint-sha256", "0" * 63], "argument --checkpoint-sha256: must be 64 hexadecimal digits, got '000"),
        (["--checkpoint-sha256", "0" * 64], "argument --checkpoint-sha256: not allowed without argument --checkpoint-"),
        (
            ["--checkpoint-path", __file__, "--checkpoint-sha256", "0" * 64],
            f"must be the file with --checkpoint-sha256 {'0' * 64}, got {__file__!r} with ",
        ),
        (["--archive-sha256", "abc"], "argument --archive-sha256: must be 64 hexadecimal digits, got 'abc'"),
        (["--archive-sha256", "0" * 63 + "g"], "argument --archive-sha256: must be 64 hexadecimal digits, got '000"),
        (["--archive-sha256", "0" * 64], "argument --archive-sha256: not allowed without argument --download"),
    ],
)
def test_wrong_flags_are_named_with_their_values(tmp_path, arguments, message, capsys):
    with pytest.raises(SystemExit):
        parse(tmp_path, *arguments)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data-dir", "none"], "argument --data-dir: must be a directory, got 'none'"),
        (["--data-dir", "docs", "--protocol", "official"], "argument --fold-dir: must be a directory with dsfold1.txt"),
        (["--data-dir", ".."], "argument --output-dir: must not lie in --data-dir, where its figures"),
        (["--data-dir", "docs", "--dataset", "idc", "--task", "subtype"], "argument --task: must be binary, got"),
        (["--data-dir", "docs", "--dataset", "idc", "--magnification", "40X"], "must be pooled with --dataset idc"),
        ([], "one of the arguments --data-dir and --synthetic is required"),
    ],
)
def test_wrong_data_are_named_with_their_values(arguments, message, capsys, monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[4])
    with pytest.raises(SystemExit):
        parse_args(["--output-dir", "out", *arguments])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[1]", b"text", b"\xff\xfe", b"a: !!python/name:os.system ''", b"config: x"]
)
def test_a_file_that_holds_no_flags_is_refused(content, tmp_path, capsys):
    (tmp_path / "flags.yaml").write_bytes(content)
    with pytest.raises(SystemExit) as stopped:
        parse(tmp_path, "--config", str(tmp_path / "flags.yaml"))
    assert stopped.value.code == 2
    assert "argument --config: must be a" in capsys.readouterr().err


def test_a_nul_in_a_file_of_flags_is_refused(tmp_path, capsys):
    (tmp_path / "flags.yaml").write_text('checkpoint_path: "a\\0b"')
    with pytest.raises(SystemExit):
        parse(tmp_path, "--config", str(tmp_path / "flags.yaml"))
    assert "argument --checkpoint-path: must be a path, which has no NUL character" in capsys.readouterr().err


def test_the_largest_values_pass(tmp_path):
    args = parse(tmp_path, "--seeds", str(2**32 - 1), "--color-jitter", "2.5", "--stain-jitter", "1")
    assert (args.seeds, args.color_jitter, args.stain_jitter) == ([2**32 - 1], 2.5, 1)
    numbers = {"--epochs": 10**6, "--batch-size": 10**6, "--num-workers": 256, "--num-folds": 1000}
    args = parse(tmp_path, *(str(part) for pair in numbers.items() for part in pair))
    assert (args.epochs, args.batch_size, args.num_workers, args.num_folds) == (10**6, 10**6, 256, 1000)


def test_a_file_with_an_unknown_flag_is_refused(tmp_path, capsys):
    (tmp_path / "flags.yaml").write_text("learning_rate: 1\n")
    with pytest.raises(SystemExit):
        parse(tmp_path, "--config", str(tmp_path / "flags.yaml"))
    assert "unrecognized arguments: --learning-rate 1" in capsys.readouterr().err
