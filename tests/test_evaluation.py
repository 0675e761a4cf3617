"""Evaluation of the numbered checkpoints of a training run."""

import contextlib
import shutil
import sys

import numpy as np
import pytest
import tiny
import torch
from test_configs import fields

from basics import files, noise
from basics.console import UserError
from configs.base import TREE, check, to_dict
from lmd import evaluation, likelihood, samples, training
from metrics import fidelity
from storage.checkpoints import load_ema_weights, read_checkpoint


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
    assert sorted(path.name for path in (workdir / "losses").glob("ckpt*")) == ["ckpt_1_loss.npz", "ckpt_2_loss.npz"]
    saved = {k: np.load(workdir / "losses" / f"ckpt_{k}_loss.npz") for k in (1, 2)}
    for k in saved:
        values = saved[k]["all_losses"]
        assert values.shape == (3,)  # batches of 4, 4 and 2
        assert saved[k]["mean_loss"] == pytest.approx(values @ [0.4, 0.4, 0.2], rel=1e-12)
        assert f"checkpoint {k}: mean test loss {saved[k]['mean_loss']:.5f} over 10 images" in out
    assert saved[1]["mean_loss"] != saved[2]["mean_loss"]

    trainer = training.Trainer(tree, tmp_path, tiny.CPU, "./data")
    averages = read_checkpoint(whole / "checkpoints" / "checkpoint_2.pth")["ema"]["shadow_params"]
    with torch.no_grad():
        for parameter, average in zip(trainer.state.net.parameters(), averages, strict=True):
            parameter.copy_(average)
    trainer.state.net.eval()
    x = trainer.images("test").read(8, 10).float() / 127.5 - 1
    assert saved[2]["all_losses"][2] == pytest.approx(trainer.loss_on(x, "evaluate", 2), rel=1e-5)


@pytest.mark.parametrize("other", [False, True])
def test_other_images_than_those_trained_on_are_told_before_they_are_loaded(other, data, whole, tmp_path, capsys):
    workdir = shutil.copytree(whole, tmp_path / "run")
    tree = tiny.config(data__dataset="CIFAR11" if other else f"{data}", eval__end_ckpt=1)
    with pytest.raises(UserError, match="unknown data set") if other else contextlib.nullcontext():
        evaluate(tree, workdir)
    told = f"was trained on {data}, and is evaluated on CIFAR11; --config.data.dataset={data} evaluates it on its own"
    assert (told in capsys.readouterr().out) == other


def evaluate(tree, workdir, folder="eval"):
    evaluation.evaluate(tree, workdir, folder, tiny.CPU, "./data")


def arrays(path):
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eval__begin_ckpt": 7, "eval__end_ckpt": 9}, r"holds none of checkpoint_7\.pth to checkpoint_9\.pth; set "),
        ({"eval__begin_ckpt": 2, "eval__end_ckpt": 1}, "holds none of"),
        ({"eval__enable_loss": False}, "nothing is to be evaluated; set one of enable_loss, enable_bpd, enable_samp"),
        ({"eval__batch_size": 0}, "a batch of 0 images cannot be evaluated; raise --config.eval.batch_size"),
        (
            {"eval__enable_bpd": True, "eval__bpd_dataset": "valid"},
            r"unknown split \(config\.eval\.bpd_dataset\) 'valid'; choose one of: train, test",
        ),
        ({"data__dataset": "CIFAR11"}, "unknown data set"),
        ({"data__test_dataset": "CIFAR11"}, "unknown data set"),
        ({"model__nf": 64}, "was trained with another config"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_evaluation_of_what_is_not_there(changes, message, data, whole):
    before = tiny.snapshot(whole)
    with pytest.raises(UserError, match=message):
        evaluate(tiny.config(**{"data__dataset": str(data), **changes}), whole)
    assert tiny.snapshot(whole) == before


def test_folders_that_cannot_be_used(tree, whole, tmp_path, monkeypatch):
    """They are told before images are read."""
    monkeypatch.setattr(training.datasets, "load", None)
    with pytest.raises(UserError, match=r"there is no folder .*typo; give --workdir the folder of a training"):
        evaluate(tree, tmp_path / "typo")
    shutil.copytree(whole, tmp_path / "run")
    with pytest.raises(UserError, match=r"cannot write to .*stdout\.txt: Not a directory; "):
        evaluate(tree, tmp_path / "run", "stdout.txt")
    assert not (tmp_path / "typo").exists()


def test_memory_that_does_not_suffice(tree, whole, monkeypatch):
    def refuse(self, x, *words):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(training.Trainer, "loss_on", refuse)
    with pytest.raises(UserError, match=r"too little memory for 4 images at once; lower --config\.eval\.batch_size"):
        evaluate(tree, whole, "memory")


# ----------------------------------------------------------------------------------------------- what is there


def test_what_is_there_is_not_made_again(tree, whole, tmp_path, capsys, monkeypatch):
    workdir = shutil.copytree(whole, tmp_path / "run")
    evaluate(tree, workdir)
    said, files = capsys.readouterr().out, tiny.snapshot(workdir)
    monkeypatch.setattr(training.Trainer, "loss_on", None)
    evaluate(tree, workdir)
    assert capsys.readouterr().out == said
    assert tiny.snapshot(workdir) == files


@pytest.mark.parametrize("what", ["checkpoint", "loss.reduce_mean", "seed", "batch_size", "images"])
def test_results_of_something_else_are_not_taken_for_these(what, tree, whole, data, tmp_path):
    workdir = shutil.copytree(whole, tmp_path / "run")
    evaluate(tree, workdir)
    if what == "checkpoint":
        tiny.write_checkpoint(workdir / "checkpoints" / "checkpoint_1.pth", tree)
    elif what == "images":
        tree.data.dataset = str(tiny.write_pictures(tmp_path / "others.npz", 10, seed=9))
    else:
        values = {"loss.reduce_mean": "training.reduce_mean", "batch_size": "eval.batch_size"}
        tree.update_from_flattened_dict({values.get(what, what): 3 if what != "loss.reduce_mean" else False})
    before = tiny.snapshot(workdir)
    told = rf"ckpt_1_loss\.npz was made from something else \({what}: .* there, .* here"
    if what == "images":  # which the checkpoint knows, too
        told = r"checkpoint_1\.pth was trained on other images"
    with pytest.raises(UserError, match=told):
        evaluate(tree, workdir)
    assert tiny.snapshot(workdir) == before


def test_a_damaged_result_is_named(tree, whole, tmp_path):
    workdir = shutil.copytree(whole, tmp_path / "run")
    evaluate(tree, workdir)
    path = workdir / "eval" / "ckpt_1_loss.npz"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match=r"ckpt_1_loss\.npz is damaged or truncated; delete it"):
        evaluate(tree, workdir)


def test_a_changed_result_is_named(tree, whole, tmp_path):
    workdir = shutil.copytree(whole, tmp_path / "run")
    evaluate(tree, workdir)
    path = workdir / "eval" / "ckpt_1_loss.npz"
    np.savez(path, **{**arrays(path), "mean_loss": np.array(0.1)})
    with pytest.raises(UserError, match=r"ckpt_1_loss\.npz was changed after it was made; delete it"):
        evaluate(tree, workdir)


# --------------------------------------------------------------------------------------------- bits per dimension


BPD = {"eval.enable_loss": False, "eval.enable_bpd": True, "eval.begin_ckpt": 2, "eval.batch_size": 8}


@pytest.fixture
def bpd_tree(tree):
    """Bits per dimension of the second checkpoint alone, in batches of 8 and 2."""
    tree.update_from_flattened_dict(BPD)
    return tree


@pytest.fixture(scope="module")
def likelihoods(data, whole, tmp_path_factory):
    """A work folder with the bits per dimension of both splits."""
    workdir = shutil.copytree(whole, tmp_path_factory.mktemp("bpd") / "run")
    for split in ("test", "train"):
        tree = tiny.config(data__dataset=str(data), eval__bpd_dataset=split)
        tree.update_from_flattened_dict(BPD)
        evaluate(tree, workdir)
    return workdir


def test_bpd_files(likelihoods, bpd_tree, capsys):
    """Two batches of 10 images, five times for the test set; then the mean of all."""
    folder = likelihoods / "eval"
    names = {f"test_ckpt_2_bpd_{i}.npz" for i in range(10)} | {f"train_ckpt_2_bpd_{i}.npz" for i in range(2)}
    assert {path.name for path in folder.iterdir()} == {*names, files.MARK}
    found = [arrays(folder / f"test_ckpt_2_bpd_{i}.npz") for i in range(10)]
    assert [len(batch["bpd"]) for batch in found] == [8, 2] * 5
    assert all(batch["evaluations"] > 20 for batch in found)
    bpd = np.concatenate([batch["bpd"] for batch in found]).reshape(5, 10)
    assert np.ptp(bpd, axis=0).min() > 1e-3  # each repeat draws anew
    evaluate(bpd_tree, likelihoods)
    error = bpd.mean(axis=0).std(ddof=1) / 10**0.5
    assert f"checkpoint 2: {bpd.mean():.4f} bits per dimension (standard error {error:.4f}) over 10 test images" in (
        out := capsys.readouterr().out
    )
    mean = np.average([batch["evaluations"] for batch in found], weights=[8, 2] * 5)
    assert f", 5 times each; {mean:.0f} network evaluations each time; written to" in out


def test_bpd_by_hand(likelihoods, tree):
    """The second batch of the second repeat, from the definitions."""
    trainer = training.Trainer(tree, likelihoods, tiny.CPU, "./data")
    load_ema_weights(likelihoods / "checkpoints" / "checkpoint_2.pth", trainer.state.net, to_dict(tree))
    trainer.state.net.eval()
    images, x, probes = trainer.images("test"), [], []
    for position in (8, 9):
        content = noise.content_keys(images.read(position, position + 1)).item()
        generator = noise.generator(tree.seed, "bpd", content, 1)
        u = torch.rand(1, 1, 8, 8, generator=generator)
        x.append(2 * (images.read(position, position + 1) + u) / 256 - 1)
        probes.append(likelihood.rademacher((1, 1, 8, 8), generator))
    logp, _, _ = likelihood.log_likelihood(trainer.model, trainer.sde, torch.cat(x), torch.cat(probes))
    expected = (-logp / 64 / np.log(2) + 7).numpy()
    # rounding enters the choice of the solver's steps
    np.testing.assert_allclose(arrays(likelihoods / "eval" / "test_ckpt_2_bpd_3.npz")["bpd"], expected, atol=1e-3)


def test_another_batch_under_this_name(likelihoods, bpd_tree, tmp_path):
    folder = shutil.copytree(likelihoods, tmp_path / "run") / "eval"
    shutil.copy(folder / "test_ckpt_2_bpd_0.npz", folder / "test_ckpt_2_bpd_2.npz")  # the same images, drawn anew
    with pytest.raises(UserError, match=r"bpd_2\.npz was made from something else \(batch: 0 there, 2 here\)"):
        evaluate(bpd_tree, folder.parent)


def test_an_interrupted_bpd_continues(likelihoods, bpd_tree, tmp_path, monkeypatch):
    workdir = shutil.copytree(likelihoods, tmp_path / "run")
    for i in (4, 9):
        (workdir / "eval" / f"test_ckpt_2_bpd_{i}.npz").unlink()
    made, compute = [], likelihood.log_likelihood
    monkeypatch.setattr(likelihood, "log_likelihood", lambda *args: made.append(len(args[2])) or compute(*args))
    evaluate(bpd_tree, workdir)
    assert made == [8, 2]
    assert tiny.snapshot(workdir) == tiny.snapshot(likelihoods)


# ----------------------------------------------------------------------------------------------- samples, scores


class Stub:
    """In place of Inception: the four quarters' means as features, the first two of them as logits."""

    def __init__(self, device):
        self.calls = []

    def __call__(self, images):
        assert images.dtype == torch.uint8
        self.calls.append(len(images))
        pool = torch.nn.functional.avg_pool2d(images.float() / 64, 4).flatten(1)  # (B, 4)
        return fidelity.Features(pool, pool[:, :2])


@pytest.fixture
def sampling_tree(tree):
    """14 samples of each checkpoint, in batches of 4, 4, 4 and 2."""
    tree.eval.enable_loss, tree.eval.enable_sampling, tree.eval.num_samples = False, True, 14
    return tree


@pytest.fixture
def package(monkeypatch):
    """As if torch-fidelity were there, for what comes before the scores."""
    monkeypatch.setattr(fidelity, "require_package", lambda: None)


def no_weights(device):
    raise UserError("no weights")


def test_samples_come_before_the_weights_are_missed(sampling_tree, whole, package, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fidelity, "Inception", no_weights)
    workdir = shutil.copytree(whole, tmp_path / "run")
    for _ in range(2):
        with pytest.raises(UserError, match="no weights"):
            evaluate(sampling_tree, workdir)
        monkeypatch.setattr(samples, "draw", None)  # the second time all samples are there
    assert "checkpoint 2: 14 samples are in " in capsys.readouterr().out
    assert sorted(path.name for path in (workdir / "eval").iterdir()) == [files.MARK, "ckpt_1", "ckpt_2"]
    for k in (1, 2):
        batches = [arrays(workdir / "eval" / f"ckpt_{k}" / f"samples_{r}.npz")["samples"] for r in range(4)]
        assert [batch.shape for batch in batches] == [(4, 8, 8, 1)] * 3 + [(2, 8, 8, 1)]
        assert all(batch.dtype == np.uint8 for batch in batches)
        assert len(np.unique(np.concatenate(batches), axis=0)) == 14


def test_samples_are_keyed_by_their_number(sampling_tree, whole, package, tmp_path, monkeypatch):
    """Not by the batch they are drawn in; up to rounding, which may move a pixel by one level."""
    monkeypatch.setattr(fidelity, "Inception", no_weights)
    drawn = {}
    for size in (4, 7):
        workdir = shutil.copytree(whole, tmp_path / str(size))
        sampling_tree.eval.batch_size = size
        with pytest.raises(UserError, match="no weights"):
            evaluate(sampling_tree, workdir)
        folder = workdir / "eval" / "ckpt_2"
        paths = [folder / f"samples_{r}.npz" for r in range(len(list(folder.iterdir())))]
        drawn[size] = np.concatenate([arrays(path)["samples"] for path in paths]).astype(int)
    assert np.abs(drawn[4] - drawn[7]).max() <= 1


def test_reports(sampling_tree, whole, tmp_path, monkeypatch, capsys):
    pytest.importorskip("torch_fidelity")
    stubs = []
    monkeypatch.setattr(fidelity, "Inception", lambda device: stubs.append(Stub(device)) or stubs[-1])
    workdir = shutil.copytree(whole, tmp_path / "run")
    evaluate(sampling_tree, workdir)
    said, folder = capsys.readouterr().out, workdir / "eval"
    assert [stub.calls for stub in stubs] == [[4, 4, 2, 4, 4, 4, 2, 4, 4, 4, 2]]  # the reference once
    reference = Stub(None)(training.Trainer(sampling_tree, workdir, tiny.CPU, "./data").images("train").read(0, 10))
    for k in (1, 2):
        pixels = np.concatenate([arrays(folder / f"ckpt_{k}" / f"samples_{r}.npz")["samples"] for r in range(4)])
        features = Stub(None)(torch.from_numpy(pixels).permute(0, 3, 1, 2))
        expected, report = fidelity.scores(features, reference.pool), arrays(folder / f"report_{k}.npz")
        assert {name: report[name] for name in ("IS", "fid", "kid")} == pytest.approx(expected, rel=1e-6)
        assert f"checkpoint {k}: IS {report['IS']:.5g}, fid {report['fid']:.5g}, kid {report['kid']:.5g} of 14" in said

    files = tiny.snapshot(workdir)  # without a report: from the features; without features: from the samples
    (folder / "report_2.npz").unlink()
    evaluate(sampling_tree, workdir)
    (folder / "report_2.npz").unlink()
    (folder / "ckpt_2" / "statistics_3.npz").unlink()
    evaluate(sampling_tree, workdir)
    assert [stub.calls for stub in stubs[1:]] == [[2]]
    assert tiny.snapshot(workdir) == files


def test_other_batches_of_samples_are_not_taken_for_these(sampling_tree, whole, package, tmp_path, monkeypatch):
    monkeypatch.setattr(fidelity, "Inception", no_weights)
    workdir = shutil.copytree(whole, tmp_path / "run")
    with pytest.raises(UserError, match="no weights"):
        evaluate(sampling_tree, workdir)
    folder = workdir / "eval" / "ckpt_1"
    shutil.copy(folder / "samples_0.npz", folder / "samples_1.npz")
    with pytest.raises(UserError, match=r"samples_1\.npz was made from something else \(batch: 0 there, 1 here\)"):
        evaluate(sampling_tree, workdir)


def test_other_samples_are_not_scored_as_these(sampling_tree, whole, package, tmp_path, monkeypatch):
    monkeypatch.setattr(fidelity, "Inception", no_weights)
    workdir = shutil.copytree(whole, tmp_path / "run")
    sampling_tree.model.num_scales = 24  # correctors need more than 20
    with pytest.raises(UserError, match="no weights"):
        evaluate(sampling_tree, workdir)
    sampling_tree.sampling.corrector = "ald"
    with pytest.raises(UserError, match=r"samples_0\.npz was made from something else \(sampling\.corrector: \"none\""):
        evaluate(sampling_tree, workdir)


def test_what_scores_need_is_told_before_any_work(sampling_tree, whole, monkeypatch):
    before = tiny.snapshot(whole)
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(UserError, match=r"package torch-fidelity; install it by 'pip install torch-fidelity==0\.4\.0'"):
        evaluate(sampling_tree, whole)
    monkeypatch.setattr(fidelity, "require_package", lambda: None)
    sampling_tree.eval.num_samples = 9
    with pytest.raises(UserError, match=r"at least 10 samples, not 9; raise --config\.eval\.num_samples"):
        evaluate(sampling_tree, whole)
    assert tiny.snapshot(whole) == before


# --------------------------------------------------------------------------------------- where the results may lie


@pytest.mark.parametrize("name", ["../x", "/tmp/x", "", ".", "a/../../x", "checkpoints", "samples/x", "tensorboard"])
def test_results_stay_in_a_folder_of_their_own(name, tree, whole):
    before, beside = tiny.snapshot(whole), sorted(whole.parent.iterdir())
    with pytest.raises(UserError, match=r"--eval_folder is '.*'; it must be the name of a folder of its own below"):
        evaluate(tree, whole, name)
    assert tiny.snapshot(whole) == before
    assert sorted(whole.parent.iterdir()) == beside


def test_two_evaluations_in_one_folder(tree, whole, tmp_path):
    workdir = shutil.copytree(whole, tmp_path / "run")
    with files.owned(workdir / "eval"):
        with pytest.raises(UserError, match=r"run/eval is being written to by .*; wait until it ends"):
            evaluate(tree, workdir)
        evaluate(tree, workdir, "another")
    evaluate(tree, workdir)


def test_evaluating_while_training_goes_on(tree, whole, tmp_path, monkeypatch):
    step, made = training.Trainer.train_step, []

    def meanwhile(self, x):
        if self.state.step == 8:
            options = tree.copy_and_resolve_references()
            options.eval.end_ckpt = 1
            evaluate(options, tmp_path, "losses")
            made.append(arrays(tmp_path / "losses" / "ckpt_1_loss.npz")["mean_loss"])
        return step(self, x)

    monkeypatch.setattr(training.Trainer, "train_step", meanwhile)
    tiny.train(tree, tmp_path)
    assert np.isfinite(made).all()
    assert len(made) == 1
    last = "checkpoints/checkpoint_2.pth"
    assert tiny.same(read_checkpoint(tmp_path / last), read_checkpoint(whole / last))


# --------------------------------------------------------------------------- what every result says it depends on


@pytest.fixture
def identities(whole, tmp_path, monkeypatch):
    """A function: config -> {kind of result: what it says it was made from}; nothing is computed."""
    stub = {"all_losses": np.ones(1), "mean_loss": np.array(1.0), "bpd": np.ones(1), "evaluations": np.array(1)}
    monkeypatch.setattr(fidelity, "require_package", lambda: None)
    workdir = shutil.copytree(whole, tmp_path / "run")
    kinds = {"loss": "ckpt_2_loss.npz", "bpd": "test_ckpt_2_bpd_0.npz", "samples": "samples_0.npz"}
    kinds |= {"report": "report_2.npz"}

    def collect(config):
        found = {}
        scores = {"IS": 1.0, "fid": 1.0, "kid": 1.0}

        def read(path, settings, shapes):
            found[path.name] = settings
            return scores if "report" in path.name else {**stub, "bpd": np.ones(10)}

        monkeypatch.setattr(evaluation, "read_arrays", read)
        monkeypatch.setattr(evaluation, "_rounds", lambda count, size: 1)
        check(config)  # as main.py does first
        evaluate(config, workdir)
        return {kind: found[name] for kind, name in kinds.items()}

    return collect


FREE = {  # fields that no result depends on, and why
    "device": "the same up to rounding",
    "data.random_flip": "training alone",
    "data.uniform_dequantization": "training alone",
    "data.category": "of LSUN; its images enter",
    "model.dropout": "training alone",
    "model.ema_rate": "training alone; the weights enter",
    **dict.fromkeys((f"optim.{name}" for name in TREE["optim"]), "training alone; the weights enter"),
    **dict.fromkeys(
        (
            f"training.{name}"
            for name in (
                *("batch_size", "n_iters", "log_freq", "eval_freq", "snapshot_freq", "snapshot_freq_for_preemption"),
                *("snapshot_sampling", "precision", "compile"),
            )
        ),
        "training alone; the weights enter",
    ),
    **{f"eval.{name}": "what is made" for name in TREE["eval"] if name != "batch_size"},
}
OTHERS = {  # another value of each field that results may depend on
    "seed": 7, "data.test_dataset": "others", "data.dataset": "others", "data.image_size": 16,
    "data.num_channels": 3, "data.centered": False,
    "model.name": "ncsnpp", "model.nf": 64, "model.ch_mult": (2,), "model.num_res_blocks": 2,
    "model.attn_resolutions": (8,), "model.resamp_with_conv": False, "model.nonlinearity": "elu",
    "model.normalization": "BatchNorm", "model.conditional": False, "model.embedding_type": "positional",
    "model.scale_by_sigma": True, "model.num_scales": 24, "model.beta_min": 0.2, "model.beta_max": 10.0,
    "model.sigma_min": 0.02, "model.sigma_max": 40.0,
    "training.sde": "vpsde", "training.continuous": False, "training.likelihood_weighting": True,
    "training.reduce_mean": False,
    "sampling.method": "ode", "sampling.predictor": "reverse_diffusion", "sampling.corrector": "ald",
    "sampling.n_steps_each": 2, "sampling.snr": 0.3, "sampling.noise_removal": False,
    "sampling.probability_flow": True, "sampling.sampler": "ddim", "sampling.steps": 10,
    "sampling.time_grid": "lambda", "sampling.t_start": 0.9, "sampling.t_end": 0.1, "sampling.eta": 0.5,
    "sampling.constraint": "project", "sampling.returns": 1, "sampling.lift": "both",
    "eval.batch_size": 3,
}  # fmt: skip
DEPEND = {  # the results that a field matters to, where not to all
    **dict.fromkeys((f"sampling.{name}" for name in TREE["sampling"]), ("samples", "report")),
    "training.likelihood_weighting": ("loss",),
    "training.reduce_mean": ("loss",),
    "data.test_dataset": ("loss", "bpd"),
    "data.dataset": ("loss", "bpd", "report"),
    "model.num_scales": ("samples", "report"),
}
SAMPLING = {  # settings from which those of sampling are changed
    "published": {"sampling.predictor": "euler_maruyama"},
    "corrector": {"sampling.corrector": "langevin", "sampling.predictor": "reverse_diffusion"},
    "ddim": {"sampling.sampler": "ddim"},
}


@pytest.fixture
def every_part(tree, data):
    tree.update_from_flattened_dict(
        {"eval.enable_bpd": True, "eval.enable_sampling": True, "eval.num_samples": 12, "model.num_scales": 30}
    )
    return tree


def changed(tree, path, value):
    copy = tree.copy_and_resolve_references()
    copy.update_from_flattened_dict({path: value})
    return copy


def test_every_field_that_a_result_depends_on_enters_its_identity(every_part, identities, tmp_path):
    """Every field of the config: a result made with another value says so, or the value is refused."""
    others, first = str(tiny.write_pictures(tmp_path / "others.npz", 10, seed=9)), identities(every_part)
    tree = {path for path, _ in fields(every_part)}
    assert tree == OTHERS.keys() | FREE.keys() & tree
    refused = set()
    for path, value in OTHERS.items():
        value = others if value == "others" else value
        try:
            now = identities(changed(every_part, path, value))
        except UserError:
            refused.add(path)
            continue
        for kind in DEPEND.get(path, first):
            assert now[kind] != first[kind], f"{kind} does not depend on {path}"
    assert refused.isdisjoint({"sampling.steps", "sampling.predictor", "model.num_scales", "training.reduce_mean"})
    assert {"sampling.t_start", "sampling.snr", "model.nf"} <= refused


def test_the_solver_of_an_ode_enters_the_identity_of_what_it_makes(every_part, identities):
    """Results of another solver agree within its tolerance alone."""
    odes = changed(every_part, "sampling.method", "ode")
    first, by_ode = identities(every_part), identities(odes)
    assert (
        by_ode["samples"]["solver"]
        == by_ode["report"]["solver"]
        == f"{first['bpd']['ode']['solver']}, then noise_removal"
    )
    assert "solver" not in first["samples"]


@pytest.mark.parametrize("name", SAMPLING)
def test_every_setting_of_sampling_enters_the_identity_of_samples(name, every_part, identities):
    every_part.update_from_flattened_dict(SAMPLING[name])
    first, entered = identities(every_part), set()
    for path, value in OTHERS.items():
        if not path.startswith("sampling.") or every_part.sampling[path[9:]] == value:
            continue
        try:
            now = identities(changed(every_part, path, value))
        except UserError:
            continue
        entered.add(path[9:])
        assert now["samples"] != first["samples"], path
        assert now["report"] != first["report"], path
    assert {"steps"} <= entered
    assert {"corrector": {"snr", "n_steps_each"}, "ddim": {"eta", "time_grid"}}.get(name, set()) <= entered


def test_samples_from_a_later_time_are_refused_before_anything_is_written(sampling_tree, whole, package):
    before = tiny.snapshot(whole)
    sampling_tree.sampling.update({"sampler": "ddim", "t_start": 0.6})
    with pytest.raises(UserError, match=r"samples cannot be drawn with config\.sampling: t_start=0\.6; give that to"):
        evaluate(sampling_tree, whole)
    assert tiny.snapshot(whole) == before


def test_samples_of_other_steps_are_not_taken_for_these(sampling_tree, whole, package, tmp_path, monkeypatch):
    """Their number of steps was compared under the name of another field."""
    monkeypatch.setattr(fidelity, "Inception", no_weights)
    workdir = shutil.copytree(whole, tmp_path / "run")
    sampling_tree.sampling.steps = 2
    with pytest.raises(UserError, match="no weights"):
        evaluate(sampling_tree, workdir)
    sampling_tree.sampling.steps = 0
    with pytest.raises(
        UserError, match=r"samples_0\.npz was made from something else \(sampling\.steps: 2 there, 0 here"
    ):
        evaluate(sampling_tree, workdir)


def test_images_that_were_trained_on_are_not_taken_for_held_back_ones(tmp_path, capsys):
    """The checkpoint says which images it was trained on."""
    source = tiny.write_pictures(tmp_path / "mine.npz", 40)
    tree = tiny.config(data__dataset=str(source), training__snapshot_sampling=False)
    tiny.train(tree, tmp_path / "run")
    evaluation.evaluate(tree, tmp_path / "run", "same", tiny.CPU, "./data")
    tiny.write_pictures(source, 45)
    with pytest.raises(UserError, match=r"checkpoint_1\.pth was trained on other images than are kept for"):
        evaluation.evaluate(tree, tmp_path / "run", "more", tiny.CPU, "./data")
    tree.data.test_dataset = str(source)
    evaluation.evaluate(tree, tmp_path / "run", "named", tiny.CPU, "./data")
    assert "warning" not in capsys.readouterr().err
