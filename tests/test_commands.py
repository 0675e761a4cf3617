"""The three commands as a user types them: from training to scores, their flags, and mistakes on the command line."""

import json
import re
import subprocess
import xml.etree.ElementTree as ET

import numpy as np
import pytest
import tiny
import torch
from helpers import ROOT, read_scores

import command_line
import recon
from basics import distributed
from basics.console import EXIT_USER_ERROR
from configs.base import TREE
from lmd.process import PRESETS
from storage.checkpoints import read_checkpoint
from storage.scores import read_results

COMMANDS = ("main.py", "recon.py", "detect.py")

# ------------------------------------------------------------------------------------------- the three commands


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """In-domain images to train on and to test, and out-of-domain images."""
    folder = tmp_path_factory.mktemp("data")
    tiny.write_pictures(folder / "train.npz", 10, seed=0)
    tiny.write_pictures(folder / "test.npz", 6, seed=1)
    np.savez(folder / "noise.npz", images=np.random.default_rng(2).integers(0, 256, (5, 8, 8), dtype=np.uint8))
    return folder


@pytest.fixture(scope="module")
def commands(data, tmp_path_factory):
    """The README's commands one after the other: their exit codes and outputs, and where they wrote."""
    workdir = tmp_path_factory.mktemp("results") / "tiny"
    config = tiny.config_flags(data__dataset=data / "train.npz")
    train = tiny.command("main.py", "--workdir", f"{workdir}/", *config, "--mode", "train")
    recon = tiny.command(
        "recon.py", *config, "--ckpt_path", workdir / "checkpoints" / "checkpoint_2.pth",
        "--in_domain", data / "test.npz", "--out_of_domain", data / "noise.npz", "--batch_size", "4",
        "--mask_type", "checkerboard_alt", "--mask_num_blocks", "4", "--reps_per_image", "2",
        "--workdir", f"{workdir}/test_vs_noise/",
    )  # fmt: skip
    results = workdir / "test_vs_noise" / "checkerboard_alt_blocks4_reps2"
    detect = tiny.command("detect.py", "--result_path", f"{results}/", "--reps", "2", "--metric", "MSE,SSIM")
    return {"train": train, "recon": recon, "detect": detect, "workdir": workdir, "results": results}


def test_training(commands):
    code, out, err = commands["train"]
    assert code == 0, err
    assert "starting: ddpm" in out
    assert out.splitlines()[-1].startswith("trained: checkpoints are in ")
    workdir = commands["workdir"]
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == ["checkpoint_1.pth", "checkpoint_2.pth"]
    config = read_checkpoint(workdir / "checkpoints" / "checkpoint_2.pth")["config"]
    for name, value in tiny.OVERRIDES.items():  # every one reached it, tuples too
        section, field = name.split(".")
        assert config[section][field] == (list(value) if isinstance(value, tuple) else value)


def test_reconstruction(commands):
    code, out, err = commands["recon"]
    assert code == 0, err
    assert out.splitlines() == [
        f"reconstructions: {commands['results']}",
        f"next: python detect.py --result_path {commands['results']} --reps 2 --metric MSE,SSIM",
    ]
    batch = torch.load(commands["results"] / "neg" / "batch_1.pth", weights_only=True)
    assert batch["orig"].shape == (1, 1, 8, 8)
    assert len(batch["recon"]) == len(batch["masked"]) == 2


def test_detection(commands):
    code, out, err = commands["detect"]
    assert code == 0, err
    lines = out.splitlines()
    results = read_results(commands["results"])
    assert results["images"] == {"pos": 6, "neg": 5}
    assert results["repetitions"] == 2
    for metric in ("MSE", "SSIM"):
        assert f"{metric} ROC AUC: {results['metrics'][metric]['roc_auc']:.4f}" in lines
        scores = read_scores(commands["results"] / f"scores_{metric}.csv")
        assert scores["pos"]["distances"].shape == (2, 6)
        assert (commands["results"] / f"pictures_{metric}.png").is_file()


def test_evaluation_of_the_checkpoints(commands, data):
    config = tiny.config_flags(data__dataset=data / "train.npz")
    code, out, err = tiny.command(
        "main.py", "--workdir", commands["workdir"], *config, "--mode=eval", "--eval_folder=losses", "--device=cpu"
    )
    assert code == 0, err
    values = [np.load(commands["workdir"] / "losses" / f"ckpt_{k}_loss.npz")["mean_loss"] for k in (1, 2)]
    assert re.findall(r"checkpoint (\d): mean test loss (\S+) ", out) == [
        ("1", f"{values[0]:.5f}"),
        ("2", f"{values[1]:.5f}"),
    ]


# -------------------------------------------------------------------------------------------------------- flags

# Flags of the published scripts with their defaults, None where they have none, and those added here.
FLAGS = {
    "main.py": {
        "workdir": None, "config": None, "mode": None, "eval_folder": "eval",
        "data_root": "./data", "workers": None, "device": None, "seed": None,
    },
    "recon.py": {
        "workdir": None, "config": None, "ckpt_path": None, "reps_per_image": "1", "batch_size": "100",
        "in_domain": None, "out_of_domain": None, "id_center_crop": "true", "ood_center_crop": "true",
        "mask_type": "center", "save_mask": "false", "mask_num_blocks": "4", "mask_patch_size": "4",
        "mask_ratio": "0.5", "mask_file_path": None, "mask_save_dir": None, "mask_identifier": None,
        "max_images": None, "match_resolution": "false", "data_root": "./data", "workers": None,
        "seed": None, "device": None, "memory_gb": None,
        "sampler": None, "steps": None, "precision": "auto", "compile": "auto",
    },
    "detect.py": {"result_path": None, "metric": "LPIPS", "reps": "1", "device": "auto", "resize_type": "bicubic"},
    "calibrate.py": {
        "config": None, "ckpt_path": None, "in_domain": None, "detector": None, "method": "auto",
        "false_alarm_rate": "0.05", "fit_share": "0.5", "card_images": "100", "center_crop": "true", "seed": "0",
        "max_images": None, "data_root": "./data", "workers": None, "memory_gb": None, "precision": "auto",
        "device": "auto",
    },
    "predict.py": {
        "detector": None, "images": None, "output": None, "false_alarm_rate": None, "false_discovery_rate": None,
        "maps": "false", "fail_on_outlier": "false", "max_images": None, "data_root": "./data", "workers": None,
        "memory_gb": None, "device": "auto",
    },
}  # fmt: skip


@pytest.mark.parametrize("command", FLAGS)
def test_every_flag_is_there_with_its_default_and_a_help_text(command):
    _, out, _ = tiny.command(command, "--helpxml")
    found = {flag.findtext("name"): flag for flag in ET.fromstring(out).iter("flag")}
    for name, default in FLAGS[command].items():
        value = found[name].findtext("default")
        assert (None if value in ("None", "") else value) == default, name
    for name, flag in found.items():
        assert len(flag.findtext("meaning")) >= 10, name
    assert not found.keys() & recon.REMOVED.keys()


HELP = """
import runpy, sys
sys.argv = [sys.argv[1], "--help"]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit:
    pass
heavy = ["torch", "torchvision", "scipy", "sklearn", "matplotlib", "skimage", "lpips", "tensorboard", "PIL"]
print([name for name in heavy if name in sys.modules])
"""


@pytest.mark.parametrize("command", FLAGS)
def test_help_imports_nothing_heavy(command):
    """Which alone takes seconds."""
    _, out, err = tiny.command("-c", HELP, command)
    assert "flags:" in out
    assert out.splitlines()[-1] == "[]", err


OPENED = """
import sys
from lmd import open_model, reconstruction
open_model("pretrained/fashion_mnist_small.safetensors", device="cpu")
print([name for name in ("torch._dynamo", "torch._inductor", "triton", "sympy") if name in sys.modules])
"""


def test_a_model_is_opened_without_a_compiler():
    """Torch's takes more than a second to import, and a check of the checkpoint or a count brings it in unseen."""
    _, out, err = tiny.command("-c", OPENED)
    assert out.splitlines()[-1:] == ["[]"], err


CALLED = """
import json, os, sys, types
import command_line, recon
from basics import machine
from configs import base
from lmd import reconstruction
changed = lambda config: {n: v for n, v in config.sampling.items() if v != base.TREE["sampling"][n]}
recon.define_flags()
described = lambda config: {"width": config.model.nf, "sampling": changed(config)}
reconstruction.run = lambda job, device, ranks: print(json.dumps(
    {**described(vars(job).pop("config")), **vars(job), "device": device, "ranks": ranks}, default=vars
))
machine.choose_device = lambda name: types.SimpleNamespace(type=name)
for line in json.loads(sys.argv[1]):
    if os.fork() == 0:  # flags can be parsed once only
        sys.argv = ["recon.py", *line]
        command_line.run(recon.main)
    os.wait()
"""
REQUIRED = [f"--config={tiny.CONFIG_FILE}", "--workdir=w", "--ckpt_path=c.pth", "--in_domain=MNIST"]
DEFAULTS = {
    "width": 32, "ckpt_path": "c.pth", "workdir": "w", "sources": {"pos": ["MNIST", True]}, "reps": 1,
    "batch_size": 100, "seed": 42, "device": {"type": "auto"}, "max_images": None, "data_root": "./data",
    "workers": None, "match_resolution": False, "memory_gb": None, "ranks": vars(distributed.ALONE),
    "precision": "auto", "compiled": "auto", "sampling": {}, "mask_directory": None, "mask_options": {
        "mask_type": "center", "num_blocks": 4, "patch_size": 4, "ratio": 0.5, "file_path": None, "identifier": None,
        "file_mask": None,
    },
}  # fmt: skip


def called(*lines):
    """What recon.py's command lines, each a list of flags besides the required ones, come to."""
    _, out, err = tiny.command("-c", CALLED, json.dumps([[*REQUIRED, *line] for line in lines]))
    options = [json.loads(line) for line in out.splitlines()]
    assert len(options) == len(lines), err
    return options


def test_recon_defaults_are_the_published_ones():
    assert called([]) == [DEFAULTS]


def test_recon_flags_have_their_effects():
    flags = [
        "--config.model.nf=64", "--out_of_domain=SVHN", "--noid_center_crop", "--ood_center_crop=false",
        "--reps_per_image=10", "--batch_size=200", "--seed=7", "--device=cpu", "--max_images=3", "--data_root=d",
        "--workers=2", "--match_resolution", "--memory_gb=2.5", "--save_mask", "--mask_save_dir=m",
        "--mask_type=random", "--mask_patch_size=2", "--mask_ratio=0.3",
        "--mask_identifier=tag", "--sampler=ddim", "--steps=7", "--config.sampling.eta=0.5", "--precision=bf16",
        "--compile",
    ]  # fmt: skip
    (options,) = called(flags)
    assert options == {
        "sampling": {"sampler": "ddim", "steps": 7, "eta": 0.5},
        "precision": "bf16", "compiled": "on",
        "width": 64, "ckpt_path": "c.pth", "workdir": "w", "reps": 10, "batch_size": 200, "seed": 7,
        "device": {"type": "cpu"},
        "sources": {"pos": ["MNIST", False], "neg": ["SVHN", False]}, "max_images": 3, "data_root": "d",
        "workers": 2, "match_resolution": True, "memory_gb": 2.5, "ranks": vars(distributed.ALONE),
        "mask_directory": "m", "mask_options": {
            "mask_type": "random", "num_blocks": 4, "patch_size": 2, "ratio": 0.3, "file_path": None,
            "identifier": "tag", "file_mask": None,
        },
    }  # fmt: skip


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ([], "auto"),
        (["--compile"], "on"),  # as it was when it was a switch
        (["--nocompile"], "off"),
        (["--compile=true"], "on"),
        (["--compile=Off"], "off"),
        (["--compile=auto"], "auto"),
        (["--compile=always"], "choose one of: auto, on or off"),
    ],
)
def test_the_ways_to_write_compile(written, expected):
    from absl import flags

    values = flags.FlagValues()
    command_line.define_compile("compile", "auto", "", flag_values=values)
    if " " in expected:
        with pytest.raises(flags.IllegalFlagValueError, match=expected):
            values(["recon.py", *written])
    else:
        values(["recon.py", *written])
        assert values.compile == expected


@pytest.mark.parametrize("name", ["fast", "best"])
def test_a_preset_brings_its_settings_and_repetitions_and_flags_win(name):
    values, reps = PRESETS[name]
    preset, typed = f"--sampler={name}", ["--config.sampling.t_start=0.3", "--config.sampling.corrector=none"]
    alone, *overridden = called(
        [preset],
        *([preset, steps, *typed, "--reps_per_image=1"] for steps in ("--steps=33", "--config.sampling.steps=33")),
    )
    assert {**TREE["sampling"], **alone["sampling"]} == {**TREE["sampling"], **values}
    assert alone["reps"] == reps
    for options in overridden:
        assert {**TREE["sampling"], **options["sampling"]} == {
            **TREE["sampling"], **values, "t_start": 0.3, "steps": 33,
        }  # fmt: skip
        assert options["reps"] == 1


def test_lifting_by_noise_knows_nothing():
    lifting = ["--sampler=ddim", "--config.sampling.lift=noise", "--config.sampling.t_start=0.5"]
    for options in called(lifting, [*lifting, "--mask_type=none"]):
        assert options["mask_options"]["mask_type"] == "none"


def test_a_mask_file_implies_its_type():
    (options,) = called(["--mask_file_path=own.png", "--save_mask", "--config.seed=5"])
    assert options["mask_options"] == {**DEFAULTS["mask_options"], "mask_type": "file", "file_path": "own.png"}
    assert options["mask_directory"] == ""  # below the results
    assert options["seed"] == 5


# ----------------------------------------------------------------------------------------------------- mistakes

CONFIG = f"--config={tiny.CONFIG_FILE}"
TRAIN = ["main.py", "--mode=train", "--workdir={out}"]
RECON = ["recon.py", "--workdir={out}", "--ckpt_path=nowhere.pth", "--in_domain=MNIST"]
CARRIED = [*RECON[:2], "--ckpt_path=pretrained/fashion_mnist_small.safetensors", RECON[3]]  # has its config
MISTAKES = {  # noticed before anything is loaded
    "unknown flag": ([*TRAIN, CONFIG, "--batchsize=3"], "Unknown command line flag 'batchsize'"),
    "no config": (TRAIN, "--config is needed; --help says what it is"),
    "no workdir": (["main.py", CONFIG, "--mode=train"], "--workdir is needed; --help says what it is"),
    "no mode": (["main.py", CONFIG, "--workdir={out}"], "--mode is needed; --help says what it is"),
    "another mode": ([*TRAIN, CONFIG, "--mode=test"], "--mode=test: value should be one of <train|eval>"),
    "a word too many": ([*TRAIN, CONFIG, "train"], "unexpected argument 'train'; flags are written --name=value"),
    "missing config": ([*TRAIN, "--config=nowhere.py"], r"no config can be read \(.*'nowhere\.py'\); give --config"),
    "missing config overridden": ([*TRAIN, "--config=nowhere.py", "--config.seed=1"], "no config can be read"),
    "no config field": ([*TRAIN, CONFIG, "--config.model.width=3"], "the config has no such field: .*width"),
    "no config section": ([*TRAIN, CONFIG, "--config.net.nf=3"], "the config has no such field: .*net"),
    **{
        f"{name}, {where}": ([*command, flag], f"^error: {message}$")
        for where, command in {"by a file": [*RECON, CONFIG], "by the checkpoint": CARRIED}.items()
        for name, flag, message in (
            (
                "no field",
                "--config.sampling.foo=3",
                r"the config has no such field: .*foo; configs/base\.py lists them",
            ),
            ("no section", "--config.samplin.x=3", r"the config has no such field: .*; configs/base\.py lists them"),
            (
                "a field's field",
                "--config.data.image_size.x=1",
                r"the config has no such field: data\.image_size\.x; configs/base\.py lists them",
            ),
            (
                "a section at once",
                "--config.sampling=3",
                r"--config\.sampling must be set field by field, such as --config\.sampling\.steps=100, not '3'",
            ),
        )
    },
    "a config value of another type": ([*TRAIN, CONFIG, "--config.training.batch_size=few"], "must be a whole number"),
    "no checkpoint": ([*RECON[:2], RECON[3], CONFIG], "--ckpt_path is needed; --help says what it is"),
    "no in-domain": ([*RECON[:3], CONFIG], "--in_domain is needed; --help says what it is"),
    "no repetitions": ([*RECON, CONFIG, "--reps_per_image=0"], "--reps_per_image=0: 0 is not an integer in the range"),
    "no workers": ([*RECON, CONFIG, "--workers=0"], "--workers=0: 0 is not an integer in the range"),
    "no images": ([*RECON, CONFIG, "--max_images=0"], "--max_images=0: 0 is not an integer in the range"),
    "images too large": (
        [*RECON, CONFIG, "--config.data.image_size=100000"],
        r"config\.data\.image_size is 100000; it must be an int from 1 to 8192",
    ),
    "too many steps": ([*RECON, CONFIG, "--steps=10000000000"], "--steps is 10000000000; it must be an int from"),
    **{
        f"the removed flag {name}": (
            [*RECON, CONFIG, f"--{name}=0.5"],
            f"^error: --{name} is now --config.sampling.{name}; write --config.sampling.{name}=...$",
        )
        for name in ("t_start", "lift")
    },
    "too many repetitions": ([*RECON, CONFIG, "--reps_per_image=10001"], r"10001 is not an integer in the range"),
    "too many at once": ([*RECON, CONFIG, "--batch_size=1000000"], r"1000000 is not an integer in the range"),
    "too many images": ([*RECON, CONFIG, "--max_images=1000000000000"], r"is not an integer in the range"),
    "too many workers": ([*RECON, CONFIG, "--workers=100000"], r"100000 is not an integer in the range \[1, 1024\]"),
    "too many threads": ([*TRAIN, CONFIG, "--workers=100000"], r"100000 is not an integer in the range \[1, 1024\]"),
    "no width": ([*TRAIN, CONFIG, "--config.model.nf=0"], r"config\.model\.nf is 0; it must be an int from 4 to 8192"),
    "no width to reconstruct with": ([*RECON, CONFIG, "--config.model.nf=0"], r"config\.model\.nf is 0; it must be an"),
    "no learning rate": ([*TRAIN, CONFIG, "--config.optim.lr=nan"], r"config\.optim\.lr is nan; it must be a finite"),
    "a negative seed": ([*TRAIN, CONFIG, "--seed=-1"], "--seed is -1; it must be an int from 0 to 9223372036854775807"),
    "a negative seed of noise": ([*RECON, CONFIG, "--seed=-1"], "--seed is -1; it must be an int from 0 to"),
    "a predictor beside a sampler": (
        [*RECON, CONFIG, "--sampler=ddim", "--config.sampling.predictor=reverse_diffusion"],
        "predictor: not with the sampler ddim, which is a predictor itself",
    ),
    "snr without a corrector": (
        [*TRAIN, CONFIG, "--config.sampling.snr=0.16"],
        "config.sampling: snr: not without a corrector; choose langevin or ald",
    ),
    "two kinds of mask": (
        [*RECON, CONFIG, "--mask_file_path=own.png", "--mask_type=center"],
        "--mask_file_path goes with --mask_type file, not center; leave one out",
    ),
}
INEFFECTIVE = {  # flags of recon.py, and what is said of them
    "mask folder alone": (["--mask_save_dir=m"], "--mask_save_dir goes with --save_mask; add it or leave both out"),
    "crop of no side": (["--noood_center_crop"], "--ood_center_crop goes with --out_of_domain; add it or leave"),
    "a ratio of squares": (
        ["--mask_type=checkerboard", "--mask_ratio=0.3"],
        "--mask_ratio has no effect with --mask_type checkerboard; leave it out, or choose random",
    ),
    "blocks of an unknown type": (
        ["--mask_type=foo", "--mask_num_blocks=8"],
        r"unknown mask type \(--mask_type\) 'foo'; choose one of: center, checkerboard, checkerboard_alt, random, none",
    ),
    "unknown type": (["--mask_type=foo"], r"unknown mask type \(--mask_type\) 'foo'"),
    "a file and an unknown type": (["--mask_type=foo", "--mask_file_path=x"], "unknown mask type"),
    "patches of the centre": (["--mask_patch_size=2"], "--mask_patch_size has no effect with --mask_type center"),
    "blocks at random": (
        ["--mask_type=random", "--mask_num_blocks=4"],
        "--mask_num_blocks has no effect with --mask_type random; .* choose checkerboard or checkerboard_alt",
    ),
    "blocks of a file": (
        ["--mask_file_path=own.png", "--mask_num_blocks=4"], "--mask_num_blocks has no effect with --mask_type file",
    ),
    "a mask lifted by noise": (
        ["--config.sampling.lift=noise", "--mask_type=center"],
        r"--mask_type has no effect with --config.sampling.lift=noise \(no pixel is known\); leave one",
    ),
    "a mask file lifted by noise": (
        ["--config.sampling.lift=noise", "--mask_file_path=own.png"], "--mask_file_path has no effect with",
    ),
    **{
        f"{name} twice": (
            [f"--{name}={value}", f"--config.{field}={value}"], f"--{name} and --config.{field} say the same; leave",
        )
        for name, field, value in [
            ("seed", "seed", 3), ("device", "device", "cpu"), ("sampler", "sampling.sampler", "ddim"),
            ("steps", "sampling.steps", 7),
        ]
    },
}  # fmt: skip

REFUSED = """
import os, sys
import masks, recon
from absl import flags
from basics.console import UserError
recon.define_flags()
for line in sys.stdin.read().splitlines():
    if os.fork() == 0:  # flags can be parsed once only
        try:
            sys.argv = ["recon.py", *line.split("\\t")]  # which ml_collections reads
            flags.FLAGS(sys.argv)
            recon.check_flags(flags.FLAGS)
            recon.choose_mask_type(flags.FLAGS)
            print("accepted", flush=True)
        except UserError as error:
            print(error, flush=True)
        os._exit(0)
    os.wait()
"""


def test_flags_that_would_have_no_effect_are_refused_by_name():
    """Each alone; what the published commands give is accepted."""
    published = [*REQUIRED, "--out_of_domain=SVHN", "--mask_type=checkerboard_alt", "--mask_num_blocks=8"]
    lines = ["\t".join([*REQUIRED, *arguments]) for arguments, _ in INEFFECTIVE.values()] + ["\t".join(published)]
    process = tiny.start("-c", REFUSED, stdin=subprocess.PIPE)
    out, err = process.communicate("\n".join(lines), timeout=120)
    told = out.splitlines()
    assert len(told) == len(lines), err
    for line, (name, (_, message)) in zip(told, INEFFECTIVE.items(), strict=False):
        assert re.match(message, line), name
    assert told[-1] == "accepted"


def one_line(err):
    """The user's error, which is all that is on standard error besides progress."""
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, err
    assert "Traceback" not in err
    return errors[0]


@pytest.fixture(scope="module")
def mistaken(tmp_path_factory):
    """Where the mistaken commands were to write, and the outcome of each by its name."""
    out = tmp_path_factory.mktemp("mistaken") / "out"
    rows = [
        [script.removesuffix(".py"), [argument.format(out=out) for argument in arguments], ROOT, "utf-8"]
        for (script, *arguments), _ in MISTAKES.values()
    ]
    return out, dict(zip(MISTAKES, tiny.forked(rows, tmp_path_factory.mktemp("table")), strict=True))


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_on_the_command_line(name, mistaken):
    place, outcomes = mistaken
    code, out, err = outcomes[name]
    assert code == EXIT_USER_ERROR
    assert out == ""
    assert err.count("\n") == 1
    assert re.search(MISTAKES[name][1], one_line(err))
    assert not place.exists()


@pytest.mark.parametrize("command", ["main.py", "recon.py"])
def test_mistakes_that_the_work_meets(command, data, tmp_path):
    """The rest of what can be wrong is tested where it is noticed; this is how it leaves the command."""
    config = tiny.config_flags(data__dataset=data / "train.npz", model__name="unet")
    rest = {"main.py": ["--mode=train"], "recon.py": ["--ckpt_path=nowhere.pth", f"--in_domain={data / 'test.npz'}"]}
    code, out, err = tiny.command(command, *config, f"--workdir={tmp_path / 'out'}", *rest[command])
    assert code == EXIT_USER_ERROR
    assert out == ""
    assert one_line(err) == "error: unknown model (config.model.name) 'unet'; choose one of: ddpm, ncsnpp"
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_the_commands_can_be_imported_together():
    """As libraries: importing them defines no flags."""
    code, out, err = tiny.command("-c", "import main, recon, detect; from absl import flags; print(*flags.FLAGS)")
    assert code == 0, err
    assert not set(out.split()) & {name for flags in FLAGS.values() for name in flags}
