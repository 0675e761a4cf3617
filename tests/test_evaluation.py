"""Evaluation of the numbered checkpoints of a training run."""

import shutil

import numpy as np
import pytest
import tiny
import torch

import evaluation
import storage
import training
from console import UserError


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny.write_pictures(tmp_path_factory.mktemp("data") / "squares.npz", 10)


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """A finished training run."""
    workdir = tmp_path_factory.mktemp("whole")
    tiny.train(tiny.config(data__dataset=str(data)), workdir)
    return workdir


@pytest.fixture
def tree(data):
    """The config of `whole`."""
    return tiny.config(data__dataset=str(data))


def test_evaluation(tree, whole, tmp_path, capsys):
    """The mean is over images: the last batch is smaller."""
    workdir = shutil.copytree(whole, tmp_path / "run")
    tree.eval.end_ckpt = 4
    evaluation.evaluate(tree, workdir, "losses", tiny.CPU, "./data")
    out = capsys.readouterr().out
    assert "missing checkpoints, left out: 3, 4\n" in out
    assert sorted(path.name for path in (workdir / "losses").iterdir()) == ["ckpt_1_loss.npz", "ckpt_2_loss.npz"]
    saved = {k: np.load(workdir / "losses" / f"ckpt_{k}_loss.npz") for k in (1, 2)}
    for k in saved:
        values = saved[k]["all_losses"]
        assert values.shape == (3,)  # batches of 4, 4 and 2
        assert saved[k]["mean_loss"] == pytest.approx(values @ [0.4, 0.4, 0.2], rel=1e-12)
        assert f"checkpoint {k}: mean test loss {saved[k]['mean_loss']:.5f} over 10 images" in out
    assert saved[1]["mean_loss"] != saved[2]["mean_loss"]

    trainer = training.Trainer(tree, tmp_path, tiny.CPU, "./data")
    averages = storage.read_checkpoint(whole / "checkpoints" / "checkpoint_2.pth")["ema"]["shadow_params"]
    with torch.no_grad():
        for parameter, average in zip(trainer.state.net.parameters(), averages, strict=True):
            parameter.copy_(average)
    trainer.state.net.eval()
    x = trainer.images("test").read(8, 10).float() / 127.5 - 1
    assert saved[2]["all_losses"][2] == pytest.approx(trainer.loss_on(x, "evaluate", 2), rel=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eval__begin_ckpt": 7, "eval__end_ckpt": 9}, r"holds none of checkpoint_7\.pth to checkpoint_9\.pth; set "),
        ({"eval__begin_ckpt": 2, "eval__end_ckpt": 1}, "holds none of"),
        ({"eval__enable_bpd": True}, r"the test loss alone; set --config\.eval\.enable_bpd=False"),
        ({"eval__enable_sampling": True}, r"set --config\.eval\.enable_sampling=False"),
        ({"eval__enable_loss": False}, r"set --config\.eval\.enable_loss=True"),
        ({"data__dataset": "CIFAR11"}, "unknown data set"),
        ({"model__nf": 64}, "was trained with another config"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_evaluation_of_what_is_not_there(changes, message, data, whole):
    before = tiny.snapshot(whole)
    with pytest.raises(UserError, match=message):
        evaluation.evaluate(tiny.config(**{"data__dataset": str(data), **changes}), whole, "eval", tiny.CPU, "./data")
    assert tiny.snapshot(whole) == before
