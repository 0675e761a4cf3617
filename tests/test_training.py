"""Training that can be killed at any moment, and what it writes."""

import contextlib
import os
import re
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

import console
import files
import losses
import storage
import training
from console import UserError

META = training.META_CHECKPOINT
IMAGES = 10  # two batches of 4 an epoch, so that epochs change while training
WRITTEN = {  # step 12 is the last: its number is 12 // 5, which is step 10's too
    "checkpoints-meta/checkpoint.pth",
    "checkpoints/checkpoint_1.pth",
    "checkpoints/checkpoint_2.pth",
    *(f"samples/iter_{step}/sample.{suffix}" for step in (5, 10, 12) for suffix in ("np", "png")),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny.write_pictures(tmp_path_factory.mktemp("data") / "squares.npz", IMAGES)


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """A finished run that was never interrupted, with dropout."""
    workdir = tmp_path_factory.mktemp("whole")
    tiny.train(tiny.config(data__dataset=str(data), model__dropout=0.1), workdir)
    return workdir


@pytest.fixture
def tree(data):
    """The config of `whole`."""
    return tiny.config(data__dataset=str(data), model__dropout=0.1)


def results(workdir):
    """The files that a run leaves, besides its logs -> content, checkpoints as tensors."""
    found = {}
    for path in workdir.rglob("*"):
        name = path.relative_to(workdir).as_posix()
        if path.is_file() and name != "stdout.txt" and not name.startswith("tensorboard/"):
            found[name] = storage.read_checkpoint(path) if path.suffix == ".pth" else path.read_bytes()
    return found


# ------------------------------------------------------------------------------------------- killed and resumed

CHILD = """
import os, signal, sys
import files, tiny, training

moment, dataset, workdir, dropout = sys.argv[1:]
writes, flush, train_step = [], files.os.fsync, training.Trainer.train_step

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def step(self, x):  # the next one to be saved would be step 9
    return die() if self.state.step == 8 else train_step(self, x)

def fsync(handle):  # checkpoint, numbered checkpoint, two of samples, then the first one again: not yet renamed
    flush(handle)
    writes.append(handle)
    if len(writes) == 5:
        die()

if moment == "step":
    training.Trainer.train_step = step
else:
    files.os.fsync = fsync
tiny.train(tiny.config(data__dataset=dataset, model__dropout=float(dropout)), workdir)
"""


@pytest.mark.parametrize(("moment", "dropout"), [("step", 0.1), ("write", 0.0)])
def test_a_killed_run_ends_as_one_that_was_not(moment, dropout, data, whole, tmp_path):
    """SIGKILL in the midst of a step, or of writing the checkpoint; then equality to the bit."""
    workdir = tmp_path / "killed"
    code, _, err = tiny.command("-c", CHILD, moment, data, workdir, dropout)
    assert code == -signal.SIGKILL, err
    assert storage.read_checkpoint(workdir / META)["step"] == {"step": 7, "write": 4}[moment]
    unfinished = list(workdir.rglob("*.tmp"))
    assert [path.parent.name for path in unfinished] == (["checkpoints-meta"] if moment == "write" else [])
    tree = tiny.config(data__dataset=str(data), model__dropout=dropout)
    tiny.train(tree, workdir)
    if dropout == 0:
        whole = tmp_path / "whole"
        tiny.train(tree, whole)
    for path in unfinished:
        path.unlink()
    assert tiny.same(results(workdir), results(whole))
    assert "resuming at step" in (workdir / "stdout.txt").read_text()


class Death(BaseException):
    pass


@pytest.mark.parametrize("writes", [1, 4, 10, 13])
def test_a_run_that_dies_at_any_file_ends_with_all_of_them(writes, tree, whole, tmp_path, monkeypatch):
    """Also the last checkpoint and its samples, which a resumed run would not make again."""
    left, flush = [writes], os.fsync

    def fsync(handle):
        left[0] -= 1
        if not left[0]:
            raise Death
        flush(handle)

    monkeypatch.setattr(files.os, "fsync", fsync)
    with pytest.raises(Death):
        tiny.train(tree, tmp_path)
    tiny.train(tree, tmp_path)
    assert tiny.same(results(tmp_path), results(whole))


def interrupting(step, times, monkeypatch):
    """Ctrl-C arrives in the midst of a step."""
    train_step = training.Trainer.train_step

    def interrupted(self, x):
        for _ in range(times if self.state.step == step else 0):
            signal.raise_signal(signal.SIGINT)
        return train_step(self, x)

    monkeypatch.setattr(training.Trainer, "train_step", interrupted)


def test_ctrl_c_loses_nothing(tree, whole, tmp_path, monkeypatch, capsys):
    before = signal.getsignal(signal.SIGINT)
    interrupting(7, 1, monkeypatch)
    assert console.guard(lambda _: tiny.train(tree, tmp_path), None) == console.EXIT_INTERRUPTED
    assert "the same command continues where this run stopped" in capsys.readouterr().err
    assert storage.read_checkpoint(tmp_path / META)["step"] == 8  # step 7 was finished, and saved though not due
    assert signal.getsignal(signal.SIGINT) is before
    monkeypatch.undo()
    tiny.train(tree, tmp_path)
    assert tiny.same(results(tmp_path), results(whole))


def test_a_second_ctrl_c_acts_at_once(tree, tmp_path, monkeypatch):
    before = signal.getsignal(signal.SIGINT)
    interrupting(7, 2, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        tiny.train(tree, tmp_path)
    assert storage.read_checkpoint(tmp_path / META)["step"] == 7  # of the step that was due
    assert signal.getsignal(signal.SIGINT) is before


def test_a_finished_run_says_so_and_changes_nothing(tree, whole, capsys):
    before = tiny.snapshot(whole)
    tiny.train(tree, whole)
    assert re.fullmatch(r"already trained: .*checkpoint\.pth is at step 12 of 12\n", capsys.readouterr().out)
    assert tiny.snapshot(whole) == before


def test_more_steps_continue_a_finished_run(tree, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "longer")
    tree.training.n_iters = 14
    for workdir in ("longer", "at once"):
        tiny.train(tree, tmp_path / workdir)
    ends = [storage.read_checkpoint(tmp_path / workdir / META) for workdir in ("longer", "at once")]
    assert ends[0]["step"] == 15
    assert tiny.same(ends[0], ends[1])


def test_dropout_is_drawn(tree, whole, tmp_path):
    """Or resuming with it would prove nothing."""
    tree.model.dropout = 0.0
    tiny.train(tree, tmp_path)
    with_dropout, without = (storage.read_checkpoint(w / META)["model"] for w in (whole, tmp_path))
    assert any(not torch.equal(with_dropout[name], without[name]) for name in without)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("model__nf", 64, "was trained with another config"),
        ("training__sde", "vpsde", "was trained with another config"),
        ("seed", 1, "was trained with seed 42, not 1"),
    ],
)
def test_a_run_of_another_config_is_not_continued(field, value, message, data, whole):
    before = tiny.snapshot(whole)
    with pytest.raises(UserError, match=message):
        tiny.train(tiny.config(data__dataset=str(data), **{field: value}), whole)
    assert tiny.snapshot(whole) == before


def test_a_damaged_checkpoint_is_not_overwritten(tree, whole, tmp_path):
    path = tmp_path / META
    path.parent.mkdir()
    path.write_bytes((whole / META).read_bytes()[:5000])
    before = tiny.snapshot(tmp_path)
    with pytest.raises(UserError, match=r"checkpoint\.pth is damaged or truncated"):
        tiny.train(tree, tmp_path)
    assert tiny.snapshot(tmp_path) == before


# ---------------------------------------------------------------------------------------------- what is written


def test_files_are_the_published_ones(whole):
    assert results(whole).keys() == WRITTEN
    assert {path.name for path in whole.iterdir()} == {
        "checkpoints", "checkpoints-meta", "samples", "stdout.txt", "tensorboard",
    }  # fmt: skip
    steps = {name: storage.read_checkpoint(whole / name)["step"] for name in WRITTEN if name.endswith(".pth")}
    assert steps == {  # a checkpoint holds the number of the next step, as published
        "checkpoints-meta/checkpoint.pth": 13,
        "checkpoints/checkpoint_1.pth": 6,
        "checkpoints/checkpoint_2.pth": 13,
    }


def test_samples(whole):
    pixels = np.load(whole / "samples" / "iter_5" / "sample.np")
    assert (pixels.shape, pixels.dtype) == ((4, 8, 8, 1), np.uint8)
    assert len(np.unique(pixels)) > 5
    grid = np.array(Image.open(whole / "samples" / "iter_5" / "sample.png"))  # 2 x 2 pictures, 2 pixels apart
    assert grid.shape[:2] == (22, 22)
    assert abs(int(grid[2, 2, 0]) - int(pixels[0, 0, 0, 0])) <= 1  # one is rounded, the other cut off, as published


def test_log(whole):
    lines = (whole / "stdout.txt").read_text().splitlines()
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ", line) for line in lines)
    assert "starting: ddpm" in lines[0]
    assert f"subvpsde, {IMAGES} images of " in lines[0]
    logged = [re.search(r"step: (\d+), (\w+): (\S+)$", line).groups() for line in lines if "step: " in line]
    assert [int(step) for step, name, _ in logged if name == "training_loss"] == [0, 2, 4, 6, 8, 10, 12]
    assert [int(step) for step, name, _ in logged if name == "eval_loss"] == [0, 4, 8, 12]
    assert all(0.05 < float(value) < 3 for *_, value in logged)  # the untrained network's loss is 1
    assert sum("samples of step" in line for line in lines) == 3


def test_tensorboard(whole):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(whole / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    assert sorted(events.Tags()["scalars"]) == ["eval_loss", "training_loss"]
    assert [event.step for event in events.Scalars("eval_loss")] == [0, 4, 8, 12]


def test_training_learns(data, tmp_path):
    """At first the network gives about nothing, which costs 1 (the mean square of the noise)."""
    changes = {"training__n_iters": 60, "optim__lr": 2e-3, "training__snapshot_sampling": False}
    trainer = training.Trainer(tiny.config(data__dataset=str(data), **changes), tmp_path, tiny.CPU, "./data")
    batches = trainer.batches("train")
    values = [trainer.train_step(batches.batch(step)).item() for step in range(60)]
    assert np.mean(values[:5]) == pytest.approx(1, abs=0.15)
    assert np.mean(values[-15:]) < 0.75


def test_evaluation_weights_are_put_back(tree, tmp_path):
    trainer = training.Trainer(tree, tmp_path, tiny.CPU, "./data")
    parameters = [parameter.detach().clone() for parameter in trainer.state.net.parameters()]
    for average in trainer.state.ema.shadow:
        average.add_(1)
    with contextlib.suppress(Death), trainer.with_ema():
        assert torch.equal(next(trainer.state.net.parameters()), parameters[0] + 1)
        assert not trainer.state.net.training
        raise Death
    assert trainer.state.net.training
    assert all(torch.equal(a, b) for a, b in zip(parameters, trainer.state.net.parameters(), strict=True))


# ------------------------------------------------------------------------------------------------------ samples


def sampled(data, tmp_path, **changes):
    """A trainer whose network has random weights, also those that start at about zero."""
    trainer = training.Trainer(tiny.config(data__dataset=str(data), **changes), tmp_path, tiny.CPU, "./data")
    tiny.randomise(trainer.state.net)
    return trainer


SAMPLERS = {
    "ode": {"sampling__method": "ode"},
    "langevin": {"sampling__corrector": "langevin", "model__num_scales": 40},  # its table needs more than 20 steps
    "noisy": {"sampling__predictor": "reverse_diffusion", "sampling__noise_removal": False},
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_samples_are_keyed(name, data, tmp_path):
    trainer = sampled(data, tmp_path, **SAMPLERS[name])
    before = torch.get_rng_state()
    first, again, other = (training.draw_samples(trainer, 3, step).detach() for step in (5, 5, 10))
    assert first.shape == (3, 1, 8, 8)
    assert first.isfinite().all()
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)
    if name != "langevin":  # whose step is a mean over the batch
        few = training.draw_samples(trainer, 2, 5)
        torch.testing.assert_close(few, first[:2], rtol=0, atol=1e-3)  # the ODE's steps are chosen for all together


def test_methods_differ(data, tmp_path):
    images = {}
    for method in ("pc", "ode"):
        images[method] = training.draw_samples(sampled(data, tmp_path, sampling__method=method), 2, 0)
    assert (images["pc"] - images["ode"]).abs().max() > 0.05


# -------------------------------------------------------------------------------------------------- divergence


def test_a_diverging_run_stops_and_overwrites_nothing(tree, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    kept = {name: value for name, value in tiny.snapshot(tmp_path / "run").items() if name.as_posix() in WRITTEN}
    tree.optim.lr, tree.training.n_iters = 1e38, 20
    with pytest.raises(UserError, match=r"the loss is (nan|inf) at step 1\d: training diverged; lower config\.optim"):
        tiny.train(tree, tmp_path / "run")
    now = tiny.snapshot(tmp_path / "run")
    assert {name: now[name] for name in kept} == kept
    assert not [name for name in now if "checkpoint" in name.as_posix() and name not in kept]


def test_weights_that_break_in_the_step_that_is_saved(tree, tmp_path, monkeypatch):
    """Its loss was still finite."""
    train_step = losses.train_step

    def breaking(state, *args):
        value = train_step(state, *args)
        if state.step == 4:
            with torch.no_grad():
                next(state.net.parameters()).fill_(float("nan"))
        return value

    monkeypatch.setattr(training.losses, "train_step", breaking)
    with pytest.raises(UserError, match="the weights are NaN or infinite after step 3: training diverged"):
        tiny.train(tree, tmp_path)
    assert results(tmp_path) == {}


# ----------------------------------------------------------------------------------------------------- bad input

BAD = {
    "unknown data set": ({"data__dataset": "CIFAR11"}, "unknown data set 'CIFAR11'; choose one of: CIFAR10"),
    "absent files": ({"data__dataset": "CELEBA"}, "the train split of CelebA is not in data: put a .txt list of image"),
    "few images": ({"training__batch_size": 11}, "a batch of 11 cannot be taken from the 10 images"),
    "no batch": ({"training__batch_size": 0}, "a batch of 0 cannot be taken"),
    "model": ({"model__name": "unet"}, r"unknown model \(config\.model\.name\) 'unet'; choose one of: ddpm, ncsnpp"),
    "SDE": ({"training__sde": "sde"}, "unknown SDE.* 'sde'; choose one of: vpsde"),
    "optimizer": ({"optim__optimizer": "SGD"}, "unknown optimizer .*'sgd'; choose one of: adam"),
    "predictor": ({"sampling__predictor": "heun"}, r"unknown predictor \(config\.sampling\.predictor\) 'heun'"),
    "no predictor of this SDE": ({"sampling__predictor": "ancestral_sampling"}, "is not defined for sub-VP"),
    "corrector": ({"sampling__corrector": "x"}, r"unknown corrector \(config\.sampling\.corrector\) 'x'"),
    "method": ({"sampling__method": "dpm"}, r"unknown method \(config\.sampling\.method\) 'dpm'; choose one of: pc"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_configs_are_told_before_the_first_step(name, data, tmp_path):
    changes, message = BAD[name]
    with pytest.raises(UserError, match=message):
        tiny.train(tiny.config(**{"data__dataset": str(data), **changes}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_bad_sampler_does_not_matter_where_nothing_is_sampled(data, tmp_path):
    changes = {"sampling__method": "dpm", "training__snapshot_sampling": False, "training__n_iters": 0}
    tiny.train(tiny.config(data__dataset=str(data), **changes), tmp_path)
    assert results(tmp_path).keys() == {"checkpoints-meta/checkpoint.pth", "checkpoints/checkpoint_0.pth"}


def test_a_workdir_that_cannot_be_made(tree, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"cannot write to .*file/run: .*; choose another --workdir"):
        tiny.train(tree, tmp_path / "file" / "run")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_log_on_a_full_disk(tree, tmp_path, capsys):
    (tmp_path / "stdout.txt").symlink_to("/dev/full")
    with pytest.raises(SystemExit) as exit_:
        console.guard(lambda _: tiny.train(tree, tmp_path), None)
    assert exit_.value.code == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert errors == ["error: No space left on device: while writing; free some space, then run the same command again"]
