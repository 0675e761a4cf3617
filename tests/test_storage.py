"""What is on disk is whole or not there; what cannot be used is refused in one line; published files load."""

import errno
import json
import os
import pickle
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from helpers import GOLDEN, close, fill_, golden, load_config, small, tensor, wave

import losses
import models
import sde_lib
from basics import files
from basics.console import UserError
from configs.base import to_dict
from losses import Draws
from models.score import ScoreModel
from storage import results_folder
from storage.arrays import differences, read_arrays, write_arrays
from storage.checkpoints import (
    load_ema_weights,
    read_checkpoint,
    reads_sigma_table,
    restore_state,
    what_weights_depend_on,
    write_checkpoint,
    write_ema_weights,
)
from storage.results_folder import ResultsFolder, made_from
from storage.scores import read_results
from storage.tensors import read_tensors

PUBLISHED = GOLDEN / "train_small_checkpoint.pth"


def listing(folder):
    return sorted(path.name for path in folder.iterdir())


# ------------------------------------------------------------------------------------------------------ reading


class Code:
    """Pickled, this runs a command when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def truncate(path, share):
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])


def write_truncated(path, share):
    torch.save({"a": torch.zeros(3000)}, path)
    truncate(path, share)


UNREADABLE = {
    "missing": (lambda path: None, r"^there is no checkpoint at .*bad\.pth; check the path$"),
    "a folder": (Path.mkdir, "there is no checkpoint at"),
    "empty": (lambda path: path.write_bytes(b""), "damaged or truncated"),
    "text": (lambda path: path.write_text("hello there\n"), "damaged"),
    "noise": (lambda path: path.write_bytes(np.random.default_rng(1).bytes(3000)), "damaged"),
    "other noise": (lambda path: path.write_bytes(b"\x8a" + np.random.default_rng(2).bytes(300)), "damaged"),
    "half": (lambda path: write_truncated(path, 0.5), "damaged or truncated"),
    "almost whole": (lambda path: write_truncated(path, 0.99), "damaged or truncated"),
    "pickled module": (lambda path: torch.save({"model": torch.nn.Linear(1, 1)}, path), "holds pickled code"),
    "pickled code": (lambda path: torch.save({"model": Code(path.parent / "ran")}, path), "holds pickled code"),
    "plain pickle": (lambda path: path.write_bytes(pickle.dumps(Code(path.parent / "ran"))), "pickled code|no torch"),
    "old pickle": (lambda path: path.write_bytes(pickle.dumps(Code(path.parent / "ran"), 2)), "holds pickled code"),
    "numpy": (lambda path: np.savez(path.open("wb"), a=np.zeros(3)), "damaged"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_files_that_cannot_be_read(name, tmp_path, recwarn):
    write, message = UNREADABLE[name]
    write(tmp_path / "bad.pth")
    with pytest.raises(UserError, match=message):
        read_tensors(tmp_path / "bad.pth", "checkpoint")
    assert not (tmp_path / "ran").exists()  # nothing was run
    assert not [warning for warning in recwarn if "pickle" in str(warning.message)]


def test_a_file_without_permission(tmp_path, monkeypatch):
    torch.save({}, tmp_path / "file.pth")
    monkeypatch.setattr(torch, "load", tiny.failing(errno.EACCES))
    with pytest.raises(UserError, match="may not be read; change its permissions"):
        read_tensors(tmp_path / "file.pth", "checkpoint")


MADE_FROM = {"seed": 1, "config": {"sizes": [1, 2]}}


def test_arrays_come_back_with_what_they_were_made_from(tmp_path):
    path = tmp_path / "a" / "b.npz"
    assert read_arrays(path, MADE_FROM) is None
    write_arrays(path, MADE_FROM, x=np.arange(3), y=np.array(0.5))
    found = read_arrays(path, MADE_FROM)
    assert found.keys() == {"x", "y"}
    assert found["x"].tolist() == [0, 1, 2]
    assert found["y"] == 0.5
    message = r"b\.npz was made from something else \(config\.sizes: \[1, 2\] there, \[3\] here\); delete it or choose"
    with pytest.raises(UserError, match=message):
        read_arrays(path, {"seed": 1, "config": {"sizes": [3]}})


def resaved(path, **changes):
    """Writes an .npz file again with other arrays, or without those that are None."""
    with np.load(path) as file:
        content = {**{name: file[name] for name in file.files}, **changes}
    np.savez(path, **{name: value for name, value in content.items() if value is not None})


ARRAYS = {  # what is done to a file of `x` and `y`, and what is said of it
    "half": (lambda path: path.write_bytes(path.read_bytes()[:-60]), "is damaged or truncated; delete it"),
    "pickled": (lambda path: resaved(path, x=np.array([{}], dtype=object)), "is damaged or truncated; delete it"),
    "settings of no table": (
        lambda path: write_arrays(path, [1, 2], x=np.arange(3)),
        "is damaged or truncated; delete",
    ),
    "foreign": (lambda path: np.savez(path, x=np.zeros(3)), "was made by an earlier version; delete it, then run"),
    "no digest": (lambda path: resaved(path, digest=None), "was made by an earlier version; delete it, then run"),
    "another digest": (lambda path: resaved(path, digest=np.arange(3)), "was changed after it was made; delete it"),
    "another number": (lambda path: resaved(path, y=np.array(0.6)), "was changed after it was made; delete it"),
    "another type": (lambda path: resaved(path, x=np.arange(3).view(np.uint64)), "was changed after it was made"),
    "another shape": (lambda path: resaved(path, x=np.arange(3)[None]), "was changed after it was made; delete it"),
    "another name": (lambda path: resaved(path, x=None, z=np.arange(3)), "was changed after it was made; delete it"),
    "an array less": (lambda path: resaved(path, x=None), "was changed after it was made; delete it"),
    "an array more": (lambda path: resaved(path, z=np.arange(3)), "was changed after it was made; delete it"),
    "other settings": (lambda path: resaved(path, settings=json.dumps({**MADE_FROM, "seed": 2})), "was changed after"),
    "other arrays": (
        lambda path: write_arrays(path, MADE_FROM, x=np.arange(3)),
        r"does not hold x \(3,\) and y \(\) al",
    ),
    "other shapes": (
        lambda path: write_arrays(path, MADE_FROM, x=np.arange(4), y=0.5),
        r"does not hold x \(3,\) and y",
    ),
    "text": (lambda path: write_arrays(path, MADE_FROM, x=np.array(["a"] * 3), y=0.5), r"does not hold x \(3,\) and y"),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_arrays_that_cannot_be_used(name, tmp_path):
    spoil, message = ARRAYS[name]
    path, shapes = tmp_path / "a.npz", {"x": (3,), "y": ()}
    write_arrays(path, MADE_FROM, x=np.arange(3), y=np.array(0.5))
    assert read_arrays(path, MADE_FROM, shapes).keys() == shapes.keys()
    spoil(path)
    with pytest.raises(UserError, match=rf"a\.npz {message}") as error:
        read_arrays(path, MADE_FROM, shapes)
    assert "\n" not in str(error.value)


# -------------------------------------------------------------------------------------------- published checkpoint


def published_config():
    config = small("subvp/cifar10_ddpm_continuous.py", ch_mult=(1, 1), dropout=0.0)
    config.optim.warmup = 3
    return config


def outputs(net):
    with torch.no_grad():
        return net.eval()(wave((2, 3, 16, 16), 9.5), torch.tensor([300.0, 800.0]))


def test_published_checkpoint_gives_its_outputs():
    numbers, config = golden("train_small"), published_config()
    state = losses.create_state(config, models.create_model(config))
    restore_state(PUBLISHED, state, to_dict(config), config.seed)
    assert (state.step, state.ema.num_updates) == (5, 5)
    close(outputs(state.net), numbers["output"])
    net = models.create_model(config)
    assert load_ema_weights(PUBLISHED, net, to_dict(config)) == 5
    close(outputs(net), numbers["output_ema"])


def test_training_continues_from_the_published_checkpoint(tmp_path):
    """Adam's moments, its count and the EMA's go on from where they were; and what is written then loads again."""
    config = published_config()
    state = losses.create_state(config, models.create_model(config).train())
    restore_state(PUBLISHED, state, to_dict(config), config.seed)
    before = read_checkpoint(PUBLISHED)
    assert type(before["optimizer"]["param_groups"][0]["lr"]).__module__ == "numpy"
    numbers, sde = golden("train_small"), sde_lib.create_sde(config)
    draws = Draws(normal=tensor(numbers["z"][0]), uniform=tensor(numbers["u"][0]))
    loss, model = losses.create_loss(config, sde), ScoreModel(state.net, sde)
    losses.train_step(state, loss, model, wave((4, 3, 16, 16), 0.7), draws, config)
    assert (state.step, state.ema.num_updates) == (6, 6)
    optimizer, decay = state.optimizer.state_dict(), 7 / 16
    assert optimizer["param_groups"][0]["lr"] == config.optim.lr
    for i, parameter in enumerate(state.net.parameters()):
        old, new = before["optimizer"]["state"][i], optimizer["state"][i]
        assert new["step"].item() == 6
        torch.testing.assert_close(new["exp_avg"], 0.9 * old["exp_avg"] + 0.1 * parameter.grad)
        expected = decay * before["ema"]["shadow_params"][i] + (1 - decay) * parameter.detach()
        torch.testing.assert_close(state.ema.shadow[i], expected)
    write_checkpoint(tmp_path / "next.pth", state, to_dict(config), config.seed)
    again = losses.create_state(config, models.create_model(config))
    restore_state(tmp_path / "next.pth", again, to_dict(config), config.seed)
    assert tiny.same(again.optimizer.state_dict()["state"], optimizer["state"])


# ----------------------------------------------------------------------------------------------- our checkpoints


def test_checkpoint_has_the_published_parts(tmp_path):
    published = read_checkpoint(PUBLISHED)
    ours = read_checkpoint(tiny.write_checkpoint(tmp_path / "checkpoint.pth", published_config()))
    assert published.keys() <= ours.keys()
    assert ours["model"].keys() == published["model"].keys()
    assert all(name.startswith("module.") for name in ours["model"])
    assert ours["ema"].keys() == published["ema"].keys()
    assert ours["optimizer"].keys() == published["optimizer"].keys()
    shapes = [[tuple(p.shape) for p in part["ema"]["shadow_params"]] for part in (ours, published)]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("path", ["subvp/cifar10_ddpm_continuous.py", "ve/cifar10_ncsnpp_continuous.py"])
def test_ema_weights_by_either_file(path, tmp_path):
    """The second network has frozen frequencies, which are parameters but not averaged."""
    config = small(path)
    checkpoint = tiny.write_checkpoint(tmp_path / "checkpoint.pth", config)
    state = losses.create_state(config, models.create_model(config))
    restore_state(checkpoint, state, to_dict(config), config.seed)
    with torch.no_grad():
        for average in state.ema.shadow:
            average.mul_(1.1)  # unlike the raw weights
    state.step = 77
    write_checkpoint(checkpoint, state, to_dict(config), config.seed)
    raw = outputs(state.net)
    state.ema.copy_to(state.net.parameters())
    expected = outputs(state.net)
    assert (raw - expected).abs().max() > 0.05 * raw.abs().max()

    other, light = models.create_model(config), tmp_path / "ema.safetensors"
    notes = {"command": "python main.py"}
    write_ema_weights(light, checkpoint, models.create_model(config), to_dict(config), notes)
    weights = sum(parameter.nbytes for parameter in other.parameters())
    assert light.stat().st_size < weights + 30_000  # neither the raw weights nor Adam's moments
    for file in (checkpoint, light):
        fill_(other.state_dict())
        assert load_ema_weights(file, other, to_dict(config)) == 77
        assert torch.equal(outputs(other), expected)


def test_safetensors_metadata(tmp_path):
    from safetensors import safe_open

    config, light = tiny.config(), tmp_path / "ema.safetensors"
    checkpoint = tiny.write_checkpoint(tmp_path / "checkpoint.pth")
    write_ema_weights(light, checkpoint, models.create_model(config), to_dict(config), {"loss": "0.03"})
    with safe_open(light, framework="pt") as file:
        metadata = file.metadata()
        names = set(file.keys())
    assert json.loads(metadata["config"]) == to_dict(config)
    assert (metadata["step"], metadata["loss"]) == ("0", "0.03")
    assert "module." + min(names) in read_checkpoint(checkpoint)["model"]


OTHER_CONFIGS = {
    "model.nf": (64, r"model\.nf: 32 there, 64 here"),
    "model.ch_mult": ((1, 2), r"model\.ch_mult: \[1\] there, \[1, 2\] here"),
    "model.beta_max": (10.0, r"model\.beta_max: 20\.0 there, 10\.0 here"),
    "training.sde": ("vpsde", r'training\.sde: "subvpsde" there, "vpsde" here'),
    "training.continuous": (False, r"training\.continuous: true there, false here"),
    "data.centered": (False, r"data\.centered: true there, false here"),
    "data.num_channels": (3, r"data\.num_channels: 1 there, 3 here"),
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A checkpoint and the EMA-only file made from it."""
    folder, config = tmp_path_factory.mktemp("checkpoints"), tiny.config()
    checkpoint = tiny.write_checkpoint(folder / "checkpoint.pth")
    write_ema_weights(folder / "ema.safetensors", checkpoint, models.create_model(config), to_dict(config), {})
    return {".pth": checkpoint, ".safetensors": folder / "ema.safetensors"}


@pytest.mark.parametrize("kind", [".pth", ".safetensors"])
@pytest.mark.parametrize("field", OTHER_CONFIGS)
def test_another_config_than_the_checkpoints_own(field, kind, checkpoints):
    value, message = OTHER_CONFIGS[field]
    config = tiny.config(**{field: value})
    with pytest.raises(UserError, match=rf"was trained with another config \(.*{message}"):
        load_ema_weights(checkpoints[kind], models.create_model(config), to_dict(config))


@pytest.mark.parametrize("kind", [".pth", ".safetensors"])
def test_what_may_differ_from_the_checkpoints_config(kind, checkpoints):
    changes = {"model.num_scales": 50, "model.dropout": 0.3, "model.ema_rate": 0.5, "optim.lr": 1.0}
    config = tiny.config(**changes, **{"sampling.corrector": "langevin", "training.batch_size": 7})
    load_ema_weights(checkpoints[kind], models.create_model(config), to_dict(config))


def without_config(path, target):
    """A checkpoint as the published code writes it, which has nothing but the weights to go by."""
    checkpoint = read_checkpoint(path)
    del checkpoint["config"], checkpoint["randomness"]
    torch.save(checkpoint, target)
    return target


OTHER_NETWORKS = {
    "model.nf": (64, r"does not fit the config: all_modules\.0\.weight is \(128, 32\), the config's is \(256, 64\)"),
    "model.ch_mult": ((1, 1), r"all_modules\.\d+\.\S+ is .*; and \d+ more; use the config it was made with"),
    "model.num_res_blocks": (2, "does not fit the config"),
    "data.num_channels": (3, r"all_modules\.2\.weight is \(32, 1, 3, 3\), the config's is \(32, 3, 3, 3\)"),
}


@pytest.mark.parametrize("field", OTHER_NETWORKS)
def test_another_architecture_is_told_by_its_weights(field, checkpoints, tmp_path):
    value, message = OTHER_NETWORKS[field]
    path = without_config(checkpoints[".pth"], tmp_path / "published.pth")
    load_ema_weights(path, models.create_model(tiny.config()), to_dict(tiny.config()))
    config = tiny.config(**{field: value})
    state = losses.create_state(config, models.create_model(config))
    before = [parameter.detach().clone() for parameter in state.net.parameters()]
    with pytest.raises(UserError, match=message):
        load_ema_weights(path, state.net, to_dict(config))
    with pytest.raises(UserError, match=message):
        restore_state(path, state, to_dict(config), config.seed)
    assert all(torch.equal(a, b) for a, b in zip(before, state.net.parameters(), strict=True))


def poison(value):
    def change(checkpoint):
        checkpoint["ema"]["shadow_params"][3].view(-1)[0] = value

    return change


BROKEN = {
    "NaN": (poison(float("nan")), r"holds NaN or infinite weights \(1 tensor\): training diverged"),
    "infinity": (poison(float("inf")), "holds NaN or infinite weights"),
    "no EMA": (lambda c: c.pop("ema"), "is no checkpoint of main.py"),
    "no step": (lambda c: c.pop("step"), "is no checkpoint of main.py"),
    "model is a list": (lambda c: c.update(model=[1]), "no tensors by name"),
    "model holds numbers": (lambda c: c["model"].update(x=1), "no tensors by name"),
    "EMA is empty": (lambda c: c.update(ema={}), "no tensors by name"),
    "EMA of another length": (lambda c: c["ema"]["shadow_params"].pop(), r"holds \d+ EMA weights, the config's .* \d+"),
    "EMA of another shape": (
        lambda c: c["ema"]["shadow_params"].__setitem__(0, torch.zeros(2)),
        r"EMA weight 0 is \(2,\), the config's is",
    ),
    "a weight missing": (lambda c: c["model"].pop("module.all_modules.2.bias"), r"all_modules\.2\.bias is missing"),
    "a weight too many": (lambda c: c["model"].update(more=torch.zeros(1)), "more is unknown"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_checkpoints(name, checkpoints, tmp_path):
    change, message = BROKEN[name]
    checkpoint = read_checkpoint(checkpoints[".pth"])
    change(checkpoint)
    torch.save(checkpoint, tmp_path / "broken.pth")
    config = tiny.config()
    with pytest.raises(UserError, match=message):
        load_ema_weights(tmp_path / "broken.pth", models.create_model(config), to_dict(config))


def test_a_list_is_no_checkpoint(tmp_path):
    torch.save([torch.zeros(2)], tmp_path / "list.pth")
    with pytest.raises(UserError, match=r"is no checkpoint of main\.py"):
        read_checkpoint(tmp_path / "list.pth")


def test_broken_safetensors(checkpoints, tmp_path):
    from safetensors.torch import load_file, save_file

    path, config = tmp_path / "ema.safetensors", tiny.config()

    def load():
        load_ema_weights(path, models.create_model(config), to_dict(config))

    with pytest.raises(UserError, match="there is no checkpoint at"):
        load()
    shutil.copy(checkpoints[".safetensors"], path)
    load()
    for share in (0.9, 0.1, 0):
        truncate(path, share)
        with pytest.raises(UserError, match="damaged or truncated"):
            load()
    path.write_text("hello there, this is no safetensors file\n")
    with pytest.raises(UserError, match="damaged or truncated"):
        load()
    save_file(load_file(checkpoints[".safetensors"]), path, {"config": "{oh", "step": "3"})
    with pytest.raises(UserError, match="its config or step is no JSON"):
        load()


def test_safetensors_of_nan(checkpoints, tmp_path):
    from safetensors.torch import load_file, save_file

    weights, config = load_file(checkpoints[".safetensors"]), tiny.config()
    next(iter(weights.values())).fill_(float("nan"))
    save_file(weights, tmp_path / "nan.safetensors")
    with pytest.raises(UserError, match="holds NaN"):
        load_ema_weights(tmp_path / "nan.safetensors", models.create_model(config), to_dict(config))


def test_resuming_with_another_seed_or_without_the_optimizer(checkpoints, tmp_path):
    config = tiny.config()
    state = losses.create_state(config, models.create_model(config))
    with pytest.raises(UserError, match=r"was trained with seed 42, not 7; use --config\.seed=42"):
        restore_state(checkpoints[".pth"], state, to_dict(config), 7)
    checkpoint = read_checkpoint(checkpoints[".pth"])
    del checkpoint["optimizer"]
    torch.save(checkpoint, tmp_path / "light.pth")
    load_ema_weights(tmp_path / "light.pth", state.net, to_dict(config))  # enough to reconstruct with
    with pytest.raises(UserError, match="lacks the optimizer's state"):
        restore_state(tmp_path / "light.pth", state, to_dict(config), config.seed)


# ------------------------------------------------------------------------------------------- the results folder

SETTINGS = {
    "config": {"model": {"nf": 32, "ch_mult": (1, 2)}}, "seed": 0, "checkpoint": "ab" * 32, "reps_per_image": 2,
}  # fmt: skip


def entry(name="photos", batches=2, **changes):
    """A side's entry; the content of its images goes with the name here."""
    sizes = {"images": 2 * batches, "batches": batches, "batch_size": 2}
    return {"dataset": name, "fingerprint": f"4:{name}", **sizes, **changes}


def fill(folder, side="pos", batches=2, value=0.5):
    for index in range(batches):
        images = torch.full((2, 3, 4, 4), value + index)
        folder.write_batch(side, index, images, [images, images], [images + 1, images + 2])


def claimed(path, sides, settings=SETTINGS):
    """A results folder with a manifest and no batches."""
    folder = ResultsFolder(path)
    folder.claim(settings, sides, {"torch": "2"})
    return folder


@pytest.fixture
def folder(tmp_path):
    """A results folder that says what it holds, with two in-domain batches."""
    made = claimed(tmp_path / "first" / "center_reps2", {"pos": entry()})
    fill(made)
    return made


def test_a_batch_is_as_published(folder):
    """Beside what the published detect.py reads it knows what it is."""
    ours = torch.load(folder.path / "pos" / "batch_1.pth", weights_only=True)
    theirs = torch.load(GOLDEN / "results_small" / "pos" / "batch_1.pth", weights_only=True)
    assert ours.keys() == {*theirs, "identity", "digest"} == {"orig", "masked", "recon", "identity", "digest"}
    for name in theirs:
        assert type(ours[name]) is type(theirs[name])
    assert ours["identity"] == {
        "index": 1, "images": 2, "repetitions": 2, "made_from": made_from(SETTINGS, entry()),
    }  # fmt: skip
    orig, recon = folder.read_batch("pos", 1, reps=2)
    assert torch.equal(orig, torch.full((2, 3, 4, 4), 1.5))
    assert [r[0, 0, 0, 0].item() for r in recon] == [2.5, 3.5]


def test_published_results_folder_is_readable(tmp_path):
    path = shutil.copytree(GOLDEN / "results_small", tmp_path / "center_reps3")
    folder = ResultsFolder(Path(path))
    assert folder.manifest() is None
    assert (folder.batch_count("pos"), folder.batch_count("neg")) == (3, 3)
    orig, recon = folder.read_batch("neg", 2, reps=3)
    assert orig.shape == (1, 3, 16, 16)
    assert len(recon) == 3
    with pytest.raises(UserError, match=r"holds batches without a manifest\.json; choose another --workdir"):
        folder.claim(SETTINGS, {"pos": entry()}, {})


def as_earlier_version(folder):
    """Makes a folder what an earlier version wrote: a manifest without a format, batches without identity."""
    manifest = json.loads((folder.path / "manifest.json").read_text())
    del manifest["format"]
    (folder.path / "manifest.json").write_text(json.dumps(manifest))
    for path in folder.path.rglob("batch_*.pth"):
        batch = torch.load(path, weights_only=True)
        torch.save({name: batch[name] for name in ("orig", "masked", "recon")}, path)


def test_a_folder_of_an_earlier_version_is_readable_but_not_continued(folder, tmp_path):
    as_earlier_version(folder)
    assert folder.batch_count("pos") == 2
    assert torch.equal(folder.read_batch("pos", 1)[0], torch.full((2, 3, 4, 4), 1.5))
    with pytest.raises(
        UserError, match=r"holds batches of an earlier version, with another noise; choose another --wo"
    ):
        folder.claim(SETTINGS, {"pos": entry()}, {})
    assert claimed(tmp_path / "second" / "center_reps2", {"pos": entry()}).adopt("pos", [0, 1]) == []


def test_fewer_repetitions_than_asked(folder):
    assert len(folder.read_batch("pos", 0, reps=1)[1]) == 1
    with pytest.raises(UserError, match=r"batch_0\.pth holds 2 repetitions, 3 were asked for; lower --reps"):
        folder.read_batch("pos", 0, reps=3)


# ------------------------------------------------------------------------------------- batches that cannot be used


def zero_bytes(path, count=64):
    """Overwrites bytes in the middle of the pixels of `recon`, which no reader of the file itself notices."""
    data = bytearray(path.read_bytes())
    at = data.index(np.float32(1.5).tobytes() * 8)
    data[at : at + count] = bytes(count)
    path.write_bytes(data)


def rewrite(path, **changes):
    batch = torch.load(path, weights_only=True)
    torch.save({name: value for name, value in {**batch, **changes}.items() if value is not None}, path)


def another_seed(folder):
    other = claimed(folder.path.parent.parent / "other" / "center_reps2", {"pos": entry()}, {**SETTINGS, "seed": 1})
    fill(other)
    shutil.copy(other.batch_path("pos", 0), folder.batch_path("pos", 0))


def another_side(folder):
    folder.claim(SETTINGS, {"pos": entry(), "neg": entry("digits")}, {})
    fill(folder, "neg")
    shutil.copy(folder.batch_path("neg", 0), folder.batch_path("pos", 0))


FAULTS = {
    "zeroed bytes": (lambda folder: zero_bytes(folder.batch_path("pos", 0)), "is damaged: the checksum"),
    "another content": (
        lambda folder: rewrite(folder.batch_path("pos", 0), orig=torch.full((2, 3, 4, 4), 0.25)),
        r"is damaged \(its content does",
    ),
    "truncated": (lambda folder: truncate(folder.batch_path("pos", 0), 0.7), "is damaged or truncated"),
    "empty": (lambda folder: folder.batch_path("pos", 0).write_bytes(b""), "is damaged or truncated"),
    "pickled code": (
        lambda folder: torch.save({"orig": torch.nn.Linear(1, 1)}, folder.batch_path("pos", 0)), "holds pickled code",
    ),
    "not a batch": (lambda folder: torch.save([1], folder.batch_path("pos", 0)), "is no batch of reconstructions"),
    "shapes": (
        lambda folder: rewrite(folder.batch_path("pos", 0), recon=[torch.zeros(2)]), "is no batch of reconstructions",
    ),
    "masked is none": (lambda folder: rewrite(folder.batch_path("pos", 0), masked=3), "is no batch of reconstructions"),
    "sparse": (
        lambda folder: rewrite(folder.batch_path("pos", 0), orig=torch.zeros(2, 3, 4, 4).to_sparse()), "is no batch",
    ),
    "a gradient is wanted": (
        lambda folder: rewrite(folder.batch_path("pos", 0), recon=[torch.zeros(2, 3, 4, 4, requires_grad=True)] * 2),
        "is no batch",
    ),
    "conjugates": (
        lambda folder: rewrite(folder.batch_path("pos", 0), orig=torch.zeros(2, 3, 4, 4, dtype=torch.cfloat).conj()),
        "is no batch",
    ),
    "one number a trillion times": (
        lambda folder: rewrite(folder.batch_path("pos", 0), orig=torch.zeros(1).expand(10**4, 10**4, 100, 100)),
        "is no batch",
    ),
    "without numbers": (
        lambda folder: rewrite(folder.batch_path("pos", 0), orig=torch.empty(2, 3, 4, 4, device="meta")), "is no batch",
    ),
    "another number": (
        lambda folder: shutil.copy(folder.batch_path("pos", 1), folder.batch_path("pos", 0)),
        "is another batch under this name",
    ),
    "another seed": (another_seed, "was made from other images or settings"),
    "the other side": (another_side, "was made from other images or settings"),
    "no identity": (
        lambda folder: rewrite(folder.batch_path("pos", 0), identity=None), "does not say what it was made from",
    ),
    "odd identity": (lambda folder: rewrite(folder.batch_path("pos", 0), identity=[{}]), "is no batch of"),
    "tensors in the identity": (
        lambda folder: rewrite(folder.batch_path("pos", 0), identity={"index": torch.zeros(2)}), "is no batch of",
    ),
    "a batch of the published code": (
        lambda folder: shutil.copy(GOLDEN / "results_small" / "pos" / "batch_0.pth", folder.batch_path("pos", 0)),
        "does not say what it was made from",
    ),
    "images left out": (
        lambda folder: rewrite(folder.batch_path("pos", 0), orig=torch.full((1, 3, 4, 4), 0.5), masked=[], recon=[]),
        "is damaged",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_batch_that_is_not_what_it_should_be_is_refused_and_made_again(name, folder):
    """`lacking` is what recon.py makes, so the remedy of `read_batch` is true."""
    spoil, message = FAULTS[name]
    spoil(folder)
    with pytest.raises(
        UserError, match=rf"batch_0\.pth {message}.*; run the same recon\.py command again, it makes it a"
    ):
        folder.read_batch("pos", 0)
    lacking = folder.lacking("pos")
    assert lacking.keys() == {0}
    assert re.match(message, lacking[0])
    fill(folder)
    assert folder.lacking("pos") == {}


def test_damage_in_a_folder_without_identities_is_noticed_by_the_files_own_checksums(tmp_path):
    folder = ResultsFolder(Path(shutil.copytree(GOLDEN / "results_small", tmp_path / "center_reps3")))
    path = folder.batch_path("pos", 0)
    data = bytearray(path.read_bytes())
    data[5000:5500] = bytes(500)
    path.write_bytes(data)
    torch.load(path, weights_only=True)  # torch itself does not look
    with pytest.raises(UserError, match=r"batch_0\.pth is damaged: the checksum of its part .* differs; copy it again"):
        folder.read_batch("pos", 0)


def test_each_batch_is_read_once_when_checked(folder, monkeypatch):
    read, paths = read_tensors, []
    monkeypatch.setattr(results_folder, "read_tensors", lambda path, what: paths.append(path) or read(path, what))
    folder.lacking("pos")
    assert paths == [folder.batch_path("pos", index) for index in range(2)]


def test_half_precision_and_views_have_digests(tmp_path):
    folder = claimed(tmp_path / "w" / "center_reps2", {"pos": entry(batches=1)})
    images = torch.rand(2, 8, 4, 6)[:, ::2].to(torch.bfloat16).transpose(2, 3)
    folder.write_batch("pos", 0, images, [images] * 2, [images] * 2)
    assert folder.lacking("pos") == {}
    assert torch.equal(folder.read_batch("pos", 0)[0], images)


@pytest.mark.parametrize("change", ["removed", "replaced"])
def test_a_batch_is_written_only_under_the_manifest_it_was_made_with(change, folder):
    running = ResultsFolder(folder.path, {"pos": made_from(SETTINGS, entry())})
    fill(running)
    if change == "removed":
        (folder.path / "manifest.json").unlink()
    else:
        manifest = json.loads((folder.path / "manifest.json").read_text())
        manifest["settings"]["seed"] = 1
        files.write_json(folder.path / "manifest.json", manifest)
    before = tiny.snapshot(folder.path)
    with pytest.raises(
        UserError, match=r"manifest\.json was removed or replaced while this run wrote there; run the sam"
    ):
        fill(running)
    assert tiny.snapshot(folder.path) == before


def test_gaps_and_missing_batches(folder):
    assert folder.batch_count("pos") == 2
    with pytest.raises(UserError, match=r"neg holds no batches \(out-of-domain images\); run recon\.py first"):
        folder.batch_count("neg")
    fill(folder, "neg", batches=4)
    folder.batch_path("neg", 2).unlink()
    with pytest.raises(UserError, match=r"neg is incomplete: batch_2\.pth is missing \(1 of 4\); run the same recon"):
        folder.batch_count("neg")
    folder.batch_path("pos", 1).unlink()  # the last one: the manifest alone knows
    with pytest.raises(UserError, match=r"pos is incomplete: batch_1\.pth is missing \(1 of 2\)"):
        folder.batch_count("pos")


def test_batches_that_the_manifest_does_not_know(folder):
    shutil.copy(folder.batch_path("pos", 1), folder.batch_path("pos", 2))
    with pytest.raises(
        UserError, match=r"batch_2\.pth is one more than the 2 batches that manifest\.json tells of; move"
    ):
        folder.batch_count("pos")
    folder.batch_path("pos", 2).rename(folder.path / "pos" / "batch_\u00b2.pth")  # a digit to Python, and no number
    (folder.path / "pos" / "batch_01.pth").touch()
    assert folder.batch_count("pos") == 2


# -------------------------------------------------------------------------------------------------- the manifest


def test_claiming_again(folder):
    """The same settings are welcome, a side may be added, an older side stays."""
    folder.claim(SETTINGS, {"pos": entry()}, {"torch": "3"})
    folder.claim(SETTINGS, {"pos": entry(), "neg": entry("digits")}, {})
    folder.claim(SETTINGS, {"pos": entry()}, {})
    manifest = folder.manifest()
    assert manifest["sides"] == {"pos": entry(), "neg": entry("digits")}
    assert manifest["settings"] == json.loads(json.dumps(SETTINGS))


def test_names_are_told_but_not_compared(folder, tmp_path):
    """A folder that was renamed, and files that were, continue what was made, and serve others."""
    renamed = entry(dataset="elsewhere", labels=["a", "b", "c", "d"], skipped=[["x.png", "damaged"]])
    folder.claim(SETTINGS, {"pos": renamed}, {})
    assert folder.manifest()["sides"]["pos"] == renamed
    assert folder.lacking("pos") == {}
    assert claimed(tmp_path / "second" / "center_reps2", {"pos": entry()}).adopt("pos", [0, 1]) == [0, 1]


OTHER_SETTINGS = {
    "seed": ({"seed": 1}, {"pos": entry()}, r"\(seed: 0 there, 1 here\)"),
    "one more": ({"new": 1}, {"pos": entry()}, r"\(new: null there, 1 here\)"),
    "config": ({"config": {"model": {"nf": 64, "ch_mult": [1, 2]}}}, {}, r"\(config\.model\.nf: 32 there, 64 here\)"),
    "checkpoint": ({"checkpoint": "cd" * 32}, {}, r'checkpoint: "abab.*\.\.\. there, "cdcd.*\.\.\. here'),
    "images": (
        {},
        {"pos": entry("others")},
        "other images: in-domain 4 there, 4 here, or in another",
    ),
    "treatment": (
        {},
        {"pos": entry(treatment={"exif": True})},
        r'\(pos\.treatment: null there, \{"exif": true\} here\)',
    ),
    "batch size": ({}, {"pos": entry(batch_size=3), "neg": entry()}, r"\(pos\.batch_size: 2 there, 3 here\)"),
}


@pytest.mark.parametrize("name", OTHER_SETTINGS)
def test_claiming_with_other_settings_changes_nothing(name, folder):
    changes, sides, message = OTHER_SETTINGS[name]
    before = tiny.snapshot(folder.path)
    with pytest.raises(UserError, match=rf"was made (with other settings .*|of ){message}"):
        folder.claim({**SETTINGS, **changes}, sides, {})
    assert tiny.snapshot(folder.path) == before


def test_a_folder_in_which_nothing_was_made_yet_may_be_claimed_anew(tmp_path):
    folder = ResultsFolder(tmp_path / "w" / "center_reps2")
    folder.claim(SETTINGS, {"pos": entry(), "neg": entry()}, {})
    folder.claim({**SETTINGS, "seed": 1}, {"pos": entry("others")}, {})
    assert folder.manifest()["settings"]["seed"] == 1
    assert folder.manifest()["sides"] == {"pos": entry("others")}
    fill(folder)
    folder.claim({**SETTINGS, "seed": 1}, {"pos": entry("others"), "neg": entry("a")}, {})
    folder.claim({**SETTINGS, "seed": 1}, {"pos": entry("others"), "neg": entry("b")}, {})  # no batch of it either
    assert folder.manifest()["sides"]["neg"] == entry("b")


def manifest_text(**changes):
    """A manifest whose in-domain entry has these changes."""
    return json.dumps({"format": 2, "settings": {"reps_per_image": 2}, "sides": {"pos": {**entry(), **changes}}})


MANIFESTS = {
    "empty": ("", "Expecting value"),
    "half": ("{", "Expecting property name"),
    "a list": ("[]", r"\[\] is no table"),
    "no fields": ("{}", "settings is missing"),
    "no sides": ('{"settings": {}}', "sides is missing"),
    "settings": ('{"settings": 1, "sides": {}}', "settings is 1, not a table"),
    "sides": ('{"settings": {}, "sides": [1]}', r"sides is \[1\], not a table"),
    "a side": ('{"settings": {}, "sides": {"pos": 3}}', "sides is .*, not a table, each a table"),
    "another side": ('{"settings": {}, "sides": {"left": {}}}', "sides.left is unknown"),
    "a later version": ('{"format": 3, "settings": {}, "sides": {}}', "its format 3 is of a later version"),
    "repetitions": ('{"format": 2, "settings": {"reps_per_image": "2"}, "sides": {}}', "settings.reps_per_image is"),
    "no repetitions": ('{"format": 2, "settings": {}, "sides": {}}', "settings.reps_per_image is missing"),
    "deep": ('{"settings": ' + 100_000 * '{"a":' + "1" + 100_001 * "}", "it is nested too deeply"),
    "deep enough": ('{"settings": ' + 200 * '{"a":' + "1" + 200 * "}" + ', "sides": {}}', "it is nested too deeply"),
    "long numbers": ('{"settings": {"seed": ' + 5000 * "9" + '}, "sides": {}}', "4300 digits"),
    "many batches": (manifest_text(batches=10**12), "tells of 4 images in batches of 2, but 1000000000000 batches"),
    "more batches": (manifest_text(batches=10**30), "sides.pos.batches is 10+, not a whole number, 1 or more"),
    "negative": (manifest_text(batches=-2), "sides.pos.batches is -2, not a whole number"),
    "a fraction": (manifest_text(batch_size=1.5), "sides.pos.batch_size is 1.5, not a whole number"),
    "true": (manifest_text(images=True), "sides.pos.images is true, not a whole number"),
    "text for a number": (manifest_text(images="4"), 'sides.pos.images is "4", not a whole number'),
    "a number for text": (manifest_text(dataset=4), "sides.pos.dataset is 4, not text"),
    "formulas": (
        manifest_text(positions=["=1+1", 1, 2, 3]),
        "sides.pos.positions is .*, not a list, each a whole number",
    ),
    "few labels": (manifest_text(labels=["a"]), "tells of 4 images and of 1 labels"),
    "few positions": (manifest_text(positions=[0, 1]), "tells of 4 images and of 2 positions"),
    "labels": (manifest_text(labels=[1, 2, 3, 4]), "sides.pos.labels is .*, not a list, each text, or null"),
    "skipped": (manifest_text(skipped=["a", "b"]), "sides.pos.skipped is .*, not a list, each a list, each text"),
    "crop": (manifest_text(center_crop="yes"), 'sides.pos.center_crop is "yes", not true or false'),
    "bytes": (b"\xff\xfe", "can't decode byte"),
}


@pytest.mark.parametrize("name", MANIFESTS)
def test_damaged_manifest(name, folder):
    text, message = MANIFESTS[name]
    (folder.path / "manifest.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    for use in (lambda: folder.batch_count("pos"), lambda: folder.claim(SETTINGS, {}, {})):
        with pytest.raises(
            UserError, match=rf"manifest\.json cannot be read \(.*{message}.*\); delete the folder"
        ) as told:
            use()
        assert "\n" not in str(told.value)
        assert len(str(told.value)) < 500


# -------------------------------------------------------------------------------------------- adopting from neighbours


def test_adopting_what_a_neighbour_made(folder, tmp_path):
    other = claimed(tmp_path / "second" / "center_reps2", {"neg": entry()})
    assert other.adopt("neg", other.lacking("neg")) == [0, 1]
    for index in range(2):  # the other side's, too: noise and masks do not depend on it
        assert other.batch_path("neg", index).samefile(folder.batch_path("pos", index))
    assert listing(other.path / "neg") == ["batch_0.pth", "batch_1.pth"]
    assert other.lacking("neg") == {}
    fill(folder, value=9)  # written anew, not in place
    assert other.read_batch("neg", 0)[0].max() == 0.5


def test_adopting_across_file_systems(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(files.os, "link", tiny.failing(errno.EXDEV))
    other = claimed(tmp_path / "second" / "center_reps2", {"pos": entry()})
    assert other.adopt("pos", [0, 1]) == [0, 1]
    assert not other.batch_path("pos", 0).samefile(folder.batch_path("pos", 0))
    assert other.batch_path("pos", 0).read_bytes() == folder.batch_path("pos", 0).read_bytes()


def test_adopting_to_a_full_disk(folder, tmp_path, monkeypatch):
    """The file that finds no room is ours, not the neighbour's."""
    other = claimed(tmp_path / "second" / "center_reps2", {"pos": entry()})
    monkeypatch.setattr(files.os, "link", tiny.failing(errno.EXDEV))
    monkeypatch.setattr(files.os, "fsync", tiny.failing(errno.ENOSPC))
    message = (
        rf"^cannot write {other.batch_path('pos', 0)}: No space left on device; free some space, then run the same"
    )
    with pytest.raises(UserError, match=message):
        other.adopt("pos", [0, 1])
    assert listing(other.path / "pos") == []


def test_adopting_only_what_is_the_same(folder, tmp_path):
    for number, (settings, side, name) in enumerate(
        [({**SETTINGS, "seed": 1}, entry(), "center_reps2"), (SETTINGS, entry("others"), "center_reps2"),
         (SETTINGS, entry(), "center_reps3")]
    ):  # fmt: skip
        assert claimed(tmp_path / str(number) / name, {"pos": side}, settings).adopt("pos", [0, 1]) == []


def test_adopting_only_what_is_whole_and_asked_for(folder, tmp_path):
    zero_bytes(folder.batch_path("pos", 0))
    (tmp_path / "third" / "center_reps2").mkdir(parents=True)
    (tmp_path / "third" / "center_reps2" / "manifest.json").write_text("{")  # a damaged neighbour is passed over
    (tmp_path / "a file").touch()
    other = claimed(tmp_path / "second" / "center_reps2", {"pos": entry()})
    assert other.adopt("pos", []) == []
    assert other.adopt("pos", [0, 1]) == [1]
    assert folder.adopt("pos", [0]) == []


def test_damage_to_a_file_that_two_folders_share_is_noticed_in_both(folder, tmp_path):
    other = claimed(tmp_path / "second" / "center_reps2", {"pos": entry()})
    other.adopt("pos", [0, 1])
    zero_bytes(folder.batch_path("pos", 1))
    assert folder.lacking("pos").keys() == other.lacking("pos").keys() == {1}
    assert other.adopt("pos", [1]) == []


def test_neighbours_still_being_made_are_adopted_from(tmp_path, folder):
    folder.batch_path("pos", 0).unlink()
    with files.owned(folder.path):
        assert claimed(tmp_path / "second" / "center_reps2", {"pos": entry()}).adopt("pos", [0, 1]) == [1]


def test_neighbours_of_the_current_folder(folder, tmp_path, monkeypatch):
    (tmp_path / "second").mkdir()
    monkeypatch.chdir(tmp_path / "second")
    assert claimed(Path("center_reps2"), {"pos": entry()}).adopt("pos", [0, 1]) == [0, 1]


# --------------------------------------------------------------------------------------------- results and scores

RESULTS = {
    "half": ("{", "Expecting property name"),
    "a number": ("3", "3 is no table"),
    "no metrics": ("{}", "metrics is missing"),
    "metrics": ('{"metrics": ["MSE"]}', "metrics is .*, not a table"),
    "a metric": ('{"metrics": {"MSE": 0.5}}', "metrics is .*, not a table, each a table"),
    "text": ('{"metrics": {"MSE": {"roc_auc": "=1+1"}}}', 'metrics.MSE.roc_auc is "=1\\+1", not a number from 0 to 1'),
    "not a number": ('{"metrics": {"MSE": {"roc_auc": NaN}}}', "metrics.MSE.roc_auc is NaN, not a number"),
    "AUPR": ('{"metrics": {"MSE": {"aupr_in": 2}}}', "metrics.MSE.aupr_in is 2, not a number from 0 to 1"),
    "interval": ('{"metrics": {"MSE": {"interval_95": [0.1]}}}', "metrics.MSE.interval_95 is"),
    "negative": ('{"metrics": {}, "images": {"pos": -3}}', "images is .*, not a table, each a whole number"),
    "deep": ('{"metrics": {}, "settings": ' + 100_000 * "[" + 100_000 * "]" + "}", "it is nested too deeply"),
}


@pytest.mark.parametrize("name", RESULTS)
def test_damaged_results(name, tmp_path):
    text, message = RESULTS[name]
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(
        UserError, match=rf"results\.json cannot be read \(.*{message}.*\); delete it and run detect\.py"
    ):
        read_results(tmp_path)


@pytest.mark.parametrize(
    ("path", "reads"),
    [
        ("subvp/cifar10_ddpm_continuous.py", False),  # does not scale by sigma
        ("ve/cifar10_ncsnpp_continuous.py", False),  # divides by its labels
        ("ve/cifar10_ncsnpp.py", True),
        ("ve/cifar10_ddpm.py", True),
    ],
)
def test_fewer_steps_are_refused_only_where_the_network_reads_its_table(path, reads):
    trained, fewer = load_config(path), load_config(path)
    fewer.model.num_scales = 50
    there, here = (what_weights_depend_on(to_dict(config)) for config in (trained, fewer))
    assert reads_sigma_table(to_dict(trained)) == reads
    assert bool(differences(there, here)) == reads
