"""What a run keeps of itself, what continuing it refuses or tells, and which checkpoint a path names."""

import json
import shutil

import numpy as np
import pytest
import tiny
import torch
from helpers import GOLDEN

import losses
import models
from basics.console import UserError, shell
from command_line import value_of
from configs.base import from_dict, to_dict
from lmd import training
from lmd.trained_model import load_model
from storage.checkpoints import config_of, find_checkpoint, read_checkpoint, restore_state, write_ema_weights

META = training.META_CHECKPOINT


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny.write_pictures(tmp_path_factory.mktemp("data") / "squares.npz", 10)


@pytest.fixture(scope="module")
def done(data, tmp_path_factory):
    """A finished run of three steps, without warm-up."""
    workdir = tmp_path_factory.mktemp("run")
    tiny.train(short(data), workdir)
    return workdir


@pytest.fixture(scope="module")
def numbered(data, tmp_path_factory):
    """A run of four steps, of which the second and the last have numbered checkpoints."""
    workdir = tmp_path_factory.mktemp("numbered")
    tiny.train(short(data, training__n_iters=4, training__snapshot_freq=2), workdir)
    return workdir


def short(data, **changes):
    usual = {"training__n_iters": 2, "training__snapshot_sampling": False, "optim__warmup": 0}
    return tiny.config(data__dataset=str(data), **{**usual, **changes})


@pytest.fixture
def run(done, tmp_path):
    """A copy of the run."""
    return shutil.copytree(done, tmp_path / "run")


# ------------------------------------------------------------------------------------------------------- resuming


def test_a_run_keeps_what_it_was_trained_on(done, data):
    kept = read_checkpoint(done / META)["data"]
    assert (kept["images"], kept["source"]) == (10, str(data))
    assert kept["fingerprint"]


REFUSED = {
    "training__batch_size": (5, r"training\.batch_size: 4 there, 5 here\).*--config\.training\.batch_size=4"),
    "training__reduce_mean": (False, r"training\.reduce_mean: true there, false here"),
    "training__likelihood_weighting": (True, r"training\.likelihood_weighting: false there, true here"),
    "data__random_flip": (False, r"data\.random_flip: true there"),
    "data__uniform_dequantization": (True, r"data\.uniform_dequantization: false there"),
    "data__image_size": (16, r"data\.image_size: 8 there, 16 here"),
    "model__dropout": (0.5, r"model\.dropout: .* there, 0\.5 here"),
    "model__ema_rate": (0.5, r"model\.ema_rate: .* there, 0\.5 here"),
    "seed": (7, "was trained with seed 42, not 7"),
}


@pytest.mark.parametrize("field", REFUSED)
def test_what_shapes_a_run_may_not_change(field, run, data):
    value, message = REFUSED[field]
    tree = short(data, **{field: value, "training__n_iters": 3})
    before = tiny.snapshot(run)
    with pytest.raises(UserError, match=message):
        tiny.train(tree, run)
    assert tiny.snapshot(run) == before


def test_other_images_are_refused(run, data, tmp_path):
    with np.load(data) as file:
        images = file["images"].copy()
    images[3, 0, 0] ^= 255
    np.savez(tmp_path / "others.npz", images=images)
    before = tiny.snapshot(run)
    with pytest.raises(UserError, match=r"was trained on other images \(10 of .*squares.*; here are 10 of .*others"):
        tiny.train(short(tmp_path / "others.npz", training__n_iters=3), run)
    assert tiny.snapshot(run) == before


def test_what_may_change_is_told(run, data, capsys):
    """Also without warm-up the config's rates win over the checkpoint's."""
    changes = {"lr": 3e-5, "beta1": 0.8, "eps": 1e-6, "weight_decay": 0.01, "grad_clip": 2.0}
    tree = short(data, training__n_iters=3, training__log_freq=1, **{f"optim__{k}": v for k, v in changes.items()})
    tiny.train(tree, run)
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("settings that changed since"))
    for name in (*(f"optim.{name}" for name in changes), "training.n_iters", "training.log_freq"):
        assert f"{name}: " in line
    assert "training.n_iters: 2 before, 3 now" in line
    group = read_checkpoint(run / META)["optimizer"]["param_groups"][0]
    assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (3e-5, (0.8, 0.999), 1e-6, 0.01)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"training__precision": "bf16"},
            ['training.precision: "auto" before, "bf16" now', "computed in fp32 before, in bf16 now"],
        ),
        ({"training__compile": "off"}, ['training.compile: "auto" before, "off" now']),
    ],
)
def test_another_precision_is_told(changes, told, run, data, capsys):
    tiny.train(short(data, training__n_iters=3, **changes), run)
    said = capsys.readouterr().out
    assert all(text in said for text in told)
    assert read_checkpoint(run / META)["precision"] == changes.get("training__precision", "fp32")


def test_what_auto_came_to_elsewhere_is_told(run, data, capsys):
    """A run of a GPU, continued on a CPU: its config is the same."""
    content = torch.load(run / META, weights_only=True)
    torch.save({**content, "precision": "bf16"}, run / META)
    tiny.train(short(data, training__n_iters=3, training__log_freq=2), run)
    assert "computed in bf16 before, in fp32 now" in capsys.readouterr().out


def test_averages_and_moments_follow_the_weights_layout(done, run, data):
    """As of a checkpoint of a GPU, where the network is not channels-last; or one pass would mix up their entries."""
    content = torch.load(run / META, weights_only=True)
    for entry in content["optimizer"]["state"].values():
        entry.update({name: entry[name].contiguous() for name in ("exp_avg", "exp_avg_sq")})
    torch.save(content, run / META)
    same = shutil.copytree(done, run.parent / "same")
    for workdir in (run, same):
        tiny.train(short(data, training__n_iters=4), workdir)
    ends = [read_checkpoint(workdir / META) for workdir in (run, same)]
    assert all(tiny.same(ends[0][part], ends[1][part]) for part in ("model", "ema", "optimizer"))


def test_a_checkpoint_that_says_less_is_continued(run, data):
    """Of the published program, or of an earlier version of this one."""
    content = torch.load(run / META, weights_only=True)
    del content["config"]["optim"]["cooldown"]
    for field in ("precision", "compile"):
        del content["config"]["training"][field]
    for part in ("precision", "data", "config", "randomness"):
        content.pop(part)
        torch.save(content, run / META)
        tiny.train(short(data, training__n_iters=3), run)
        assert read_checkpoint(run / META)["step"] == 4
        assert read_checkpoint(run / META)["data"]["images"] == 10


def numbers(workdir):
    """Number -> step of a run's numbered checkpoints."""
    return {
        int(path.stem.removeprefix("checkpoint_")): read_checkpoint(path)["step"] - 1
        for path in (workdir / "checkpoints").glob("*.pth")
    }


NUMBERED = {  # after steps 2 and 4 with a frequency of 2: n_iters and frequency of each continuation, numbers then
    "the same": ([(6, 2)], {1: 2, 2: 4, 3: 6}),
    "the last step's is the one before": ([(5, 2)], {1: 2, 2: 5}),
    "another end in between": ([(5, 2), (6, 2)], {1: 2, 2: 5, 3: 6}),
    "a number that is taken": ([(6, 3)], {1: 2, 2: 4, 3: 6}),
    "and on": ([(6, 3), (10, 3)], {1: 2, 2: 4, 3: 6, 4: 9, 5: 10}),
    "a smaller number": ([(6, 100)], {1: 2, 2: 4, 3: 6}),
    "no number": ([(6, 0)], {1: 2, 2: 4, 3: 6}),
    "more often": ([(6, 1)], {1: 2, 2: 4, 5: 5, 6: 6}),
}


@pytest.mark.parametrize("name", NUMBERED)
def test_no_checkpoint_replaces_one_of_another_step(name, numbered, data, tmp_path, capsys):
    """A restart that writes the same step again has the same file for it."""
    parts, expected = NUMBERED[name]
    run, told = shutil.copytree(numbered, tmp_path / "run"), 0
    before = shutil.copy(run / META, tmp_path / "before.pth")
    for n_iters, frequency in parts:
        changes = {"training__n_iters": n_iters, "training__snapshot_freq": frequency}
        for again in (False, True):
            if again:
                shutil.copy(before, run / META)
            tiny.train(short(data, training__eval_freq=0, **changes), run)
            told = max(told, capsys.readouterr().out.count("and none is replaced"))
        shutil.copy(run / META, before)
    assert numbers(run) == expected
    assert told == (name in ("a number that is taken", "and on", "a smaller number", "no number"))


def test_a_file_that_cannot_be_read_is_not_replaced(numbered, data, tmp_path):
    run = shutil.copytree(numbered, tmp_path / "run")
    (run / "checkpoints" / "checkpoint_3.pth").write_bytes(b"of whatever")
    tiny.train(short(data, training__n_iters=6, training__snapshot_freq=2), run)
    assert (run / "checkpoints" / "checkpoint_3.pth").read_bytes() == b"of whatever"
    assert read_checkpoint(run / "checkpoints" / "checkpoint_4.pth")["step"] == 7


BREAKS = {
    "the averaged weights": lambda state: state.ema.shadow[0].fill_(float("nan")),
    "the optimizer's averages": lambda state: state.optimizer.state_dict()["state"][0]["exp_avg"].fill_(float("inf")),
    "the weights": lambda state: next(state.net.parameters()).fill_(float("nan")),
}


@pytest.mark.parametrize("part", BREAKS)
def test_what_is_not_finite_is_not_saved(part, data, tmp_path):
    trainer = training.Trainer(short(data), tmp_path, tiny.CPU, "./data")
    trainer.train_step(trainer.batches("train").batch(0))
    assert losses.not_finite(trainer.state) == []
    with torch.no_grad():
        BREAKS[part](trainer.state)
    with pytest.raises(UserError, match=rf"{part}.* NaN or infinite after step 0: training diverged"):
        trainer.save(META)
    assert not list(tmp_path.rglob("*.pth"))


def test_an_ema_rate_of_nan_ends_the_run(data, tmp_path):
    tree = short(data)
    tree.model.ema_rate = float("nan")
    with pytest.raises(UserError):
        tiny.train(tree, tmp_path / "run")
    assert not list(tmp_path.rglob("*.pth"))


def test_large_but_finite_numbers_are_saved():
    config = tiny.config()
    state = losses.create_state(config, models.create_model(config))
    with torch.no_grad():
        next(state.net.parameters()).fill_(3e38)  # whose square is not finite
    assert losses.not_finite(state) == []


# -------------------------------------------------------------------------------------------------- which checkpoint


def test_a_folder_names_its_newest_checkpoint(run, capsys):
    shutil.copy(run / META, run / "checkpoints" / "checkpoint_12.pth")
    content = torch.load(run / META, weights_only=True)
    for name, step in {"checkpoint_9.pth": 900, "checkpoint_10.pth": 1000, "checkpoint_11.pth": 30}.items():
        torch.save({**content, "step": step}, run / "checkpoints" / name)
    for folder in (run, run / "checkpoints"):
        assert find_checkpoint(folder) == run / "checkpoints" / "checkpoint_10.pth"
        assert "checkpoint_10.pth, the newest in" in capsys.readouterr().out
    torch.save({**content, "step": 5000}, run / META)
    assert find_checkpoint(run) == run / META
    assert find_checkpoint(run / "checkpoints-meta") == run / META
    (run / META).write_bytes(b"damaged")
    assert find_checkpoint(run) == run / "checkpoints" / "checkpoint_10.pth"
    assert "checkpoint.pth is damaged" in capsys.readouterr().err
    assert find_checkpoint(run / META) == run / META  # a file is taken as it is


def test_a_folder_without_checkpoints(tmp_path):
    with pytest.raises(UserError, match=r"there is no checkpoint in .*; check the path"):
        find_checkpoint(tmp_path)
    (tmp_path / "x.pth").write_bytes(b"damaged")
    with pytest.raises(UserError, match="of 1 file there none can be used"):
        find_checkpoint(tmp_path)


# -------------------------------------------------------------------------------------------- the config it carries


def test_the_config_of_a_checkpoint(done, data, tmp_path):
    light = tmp_path / "ema.safetensors"
    tree = short(data)
    write_ema_weights(light, done / META, models.create_model(tree), to_dict(tree), {})
    for path in (done, done / META, light):
        assert to_dict(from_dict(config_of(path))) == to_dict(tree)


def test_fields_that_came_later_have_their_usual_values(run):
    content = torch.load(run / META, weights_only=True)
    for name in ("steps", "lift"):
        del content["config"]["sampling"][name]
    torch.save(content, run / META)
    config = config_of(run / META)
    assert (config["sampling"]["steps"], config["sampling"]["lift"]) == (0, "mask")


def test_a_checkpoint_without_a_config():
    with pytest.raises(UserError, match=r"does not say what config .*; give --config .*inspect_checkpoint\.py .* fits"):
        config_of(GOLDEN / "train_small_checkpoint.pth")


def test_what_a_checkpoint_without_a_config_suggests_can_be_copied(tmp_path):
    path = shutil.copy(GOLDEN / "train_small_checkpoint.pth", tmp_path / "it's mine.pth")
    with pytest.raises(UserError) as error:
        config_of(path)
    assert f"`{shell('python', 'scripts/inspect_checkpoint.py', path)}`" in str(error.value)


CLAIMS = {
    "wide": ("nf", 2**40, "no network can be built"),
    "a bit wide": ("nf", 64, "does not fit the config"),
    "deep": ("num_res_blocks", 10**9, "more blocks than the file has weights"),
    "no level": ("ch_mult", [], "no network can be built"),
    "another network": ("name", "unet", "no network can be built"),
    "no width": ("nf", 0, "no network can be built"),
    "scales by the gigabyte": ("num_scales", 10**10, r"no network .*num_scales is 10000000000; .*; give --config"),
    "many levels": ("ch_mult", [1] * 64, "more blocks than the file has weights|does not fit|no network can be built"),
}


@pytest.mark.parametrize("name", CLAIMS)
def test_a_config_of_a_network_that_the_file_does_not_hold(name, run):
    """Nothing of the claimed size is made."""
    field, value, message = CLAIMS[name]
    content = torch.load(run / META, weights_only=True)
    content["config"]["model"][field] = value
    torch.save(content, run / META)
    with pytest.raises(UserError, match=message) as error:
        config_of(run / META)
    assert "\n" not in str(error.value)


COMMAND = ["--in_domain=x", "--workdir=w"]


@pytest.mark.parametrize(
    ("argv", "name", "value"),
    [
        (["--ckpt_path", "a b", *COMMAND], "ckpt_path", "a b"),
        ([*COMMAND, "-ckpt_path=x=y"], "ckpt_path", "x=y"),
        (["--ckpt_path=a", "--ckpt_path=b"], "ckpt_path", "b"),
        (COMMAND, "ckpt_path", None),
        (["--config.seed=3"], "config", None),
        (["--ckpt_path"], "ckpt_path", None),
    ],
)
def test_flags_are_found_before_they_are_parsed(argv, name, value, monkeypatch):
    monkeypatch.setattr("sys.argv", ["recon.py", *argv])
    assert value_of(name) == value


def test_commands_without_a_config(done, data, tmp_path):
    """recon.py of a work folder, with an override; main.py --mode eval."""
    code, out, err = tiny.command(
        "recon.py", "--ckpt_path", done, f"--workdir={tmp_path / 'out'}", f"--in_domain={data}",
        "--config.sampling.steps=2", "--mask_type=checkerboard",
    )  # fmt: skip
    assert code == 0, err
    assert "the newest in" in out
    assert "Warning" not in err
    (manifest,) = tmp_path.rglob("manifest.json")
    config = json.loads(manifest.read_text())["settings"]["config"]
    assert (config["sampling"]["steps"], config["model"]["nf"]) == (2, 32)
    workdir = shutil.copytree(done, tmp_path / "run")
    shutil.copy(workdir / META, workdir / "checkpoints" / "checkpoint_1.pth")
    code, out, err = tiny.command("main.py", "--mode=eval", "--workdir", workdir, "--config.eval.batch_size=4")
    assert code == 0, err
    assert "mean test loss" in out


def test_commands_without_a_config_that_no_checkpoint_carries(data, tmp_path):
    rest = [f"--workdir={tmp_path / 'out'}", f"--in_domain={data}"]
    code, _, err = tiny.command("recon.py", f"--ckpt_path={GOLDEN / 'train_small_checkpoint.pth'}", *rest)
    assert code == 2
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert "give --config" in err


def test_a_given_config_is_checked(done, data, tmp_path):
    with pytest.raises(UserError, match=r"another config \(model\.nf: 32 there, 64 here\); leave --config and its"):
        tiny.reconstruct(tmp_path, done, {"pos": data}, short(data, model__nf=64))


@pytest.mark.parametrize("size", [16, 64])
def test_a_model_is_used_at_its_own_size(size, done, data, tmp_path):
    """Its layers would fit."""
    with pytest.raises(UserError, match=rf"data\.image_size: 8 there, {size} here"):
        tiny.reconstruct(tmp_path, done, {"pos": data}, short(data, data__image_size=size))


# --------------------------------------------------------------------------------------------------- plain weights

WRAPPED = {
    "bare": lambda weights: weights,
    "DataParallel": lambda weights: {f"module.{name}": value for name, value in weights.items()},
    "twice": lambda weights: {f"module.module.{name}": value for name, value in weights.items()},
    "compiled": lambda weights: {f"_orig_mod.{name}": value for name, value in weights.items()},
    "compiled, then wrapped": lambda weights: {f"module._orig_mod.{name}": value for name, value in weights.items()},
}


@pytest.mark.parametrize("name", WRAPPED)
def test_a_state_dict_alone(name, data, tmp_path, capsys):
    config = tiny.config()
    net = models.create_model(config)
    tiny.randomise(net)
    torch.save(WRAPPED[name](net.state_dict()), tmp_path / "weights.pth")
    model, step = load_model(config, tmp_path / "weights.pth", tiny.CPU)
    assert step == 0
    assert tiny.same(dict(model.net.net.named_parameters()), dict(net.named_parameters()))
    assert "holds plain weights, without moving averages" in capsys.readouterr().out
    state = losses.create_state(config, models.create_model(config))
    with pytest.raises(UserError, match="training cannot continue from it"):
        restore_state(tmp_path / "weights.pth", state, to_dict(config), config.seed)


@pytest.mark.parametrize("name", WRAPPED)
def test_a_checkpoint_of_a_wrapped_network(name, done, data, tmp_path):
    content = torch.load(done / META, weights_only=True)
    bare = {key.removeprefix("module."): value for key, value in content["model"].items()}
    torch.save({**content, "model": WRAPPED[name](bare)}, tmp_path / "x.pth")
    tree = short(data)
    nets = [load_model(tree, path, tiny.CPU)[0].net for path in (done / META, tmp_path / "x.pth")]
    assert tiny.same(*(dict(network.net.named_parameters()) for network in nets))
    state = losses.create_state(tree, models.create_model(tree))
    restore_state(tmp_path / "x.pth", state, to_dict(tree), tree.seed)


def test_a_damaged_checkpoint_of_a_training_says_how_to_go_on(done, data, tmp_path):
    """And so it does."""
    workdir = shutil.copytree(done, tmp_path / "run")
    (workdir / META).write_bytes((workdir / META).read_bytes()[:5000])
    with pytest.raises(
        UserError, match=r"is damaged or truncated; copy a checkpoint from .*checkpoints over it to go on"
    ):
        tiny.train(short(data), workdir)
    last = sorted((workdir / "checkpoints").glob("*.pth"))[-1]
    shutil.copy(last, workdir / META)
    tiny.train(short(data), workdir)
    assert tiny.same(*(torch.load(top / META, weights_only=True)["model"] for top in (workdir, done)))
