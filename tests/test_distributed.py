"""Several processes: the same training and the same reconstructions as one, other numbers of them, and their ends.

The processes are started by torchrun and talk through gloo on the CPU.
"""

import json
import re
import signal
import subprocess
import time

import numpy as np
import pytest
import tiny
import torch
from helpers import close
from test_console import gpus

import datasets
import losses
from basics import distributed, noise
from basics.console import EXIT_USER_ERROR, UserError, place, progress, say, warn
from basics.distributed import ALONE, Ranks
from lmd import training
from lmd.batches import TrainingBatches
from storage.checkpoints import read_checkpoint

IMAGES = 10
TIMEOUT = 120  # seconds, of a run that should take 10
# With a large eps Adam's steps are proportional to gradients. Without it they are their signs: those of the rounding
# where a gradient is zero, as for a bias before a normalisation. The clipping acts on every step.
CHANGES = {"training__batch_size": 5, "optim__eps": 1e-2, "optim__grad_clip": 0.1, "training__n_iters": 6}
RECON = ["--mask_type=checkerboard_alt", "--mask_num_blocks=4", "--reps_per_image=2", "--batch_size=2", "--seed=0"]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """In every process, or sums are taken in another order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Training images, other images, and a checkpoint of random weights."""
    folder = tmp_path_factory.mktemp("data")
    tiny.write_pictures(folder / "squares.npz", IMAGES)
    tiny.write_pictures(folder / "others.npz", 5, seed=1)
    tiny.write_checkpoint(folder / "checkpoint.pth")
    return folder


def start(processes, *arguments):
    """torchrun on this machine, not waited for."""
    return tiny.start("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", *arguments)


def finish(process):
    """Exit code and outputs; a run that hangs is ended together with its ranks."""
    try:
        out, err = process.communicate(timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun passes it on
        process.communicate()
        raise
    return process.returncode, out, err


def torchrun(processes, *arguments):
    """torchrun to its end: exit code, standard output, standard error."""
    return finish(start(processes, *arguments))


def train_command(data, workdir, **changes):
    dataset = data / "squares.npz"
    flags = tiny.config_flags(**{"data__dataset": dataset, **CHANGES, **changes})
    return ["main.py", *flags, "--mode=train", f"--workdir={workdir}"]


def train(data, workdir, **changes):
    """One process."""
    tiny.train(tiny.config(**{"data__dataset": str(data / "squares.npz"), **CHANGES, **changes}), workdir)


# ------------------------------------------------------------------------------------------- without processes


def test_environment(monkeypatch):
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    assert place() == (0, 0, 1)
    for name, value in zip(names, "928", strict=True):
        monkeypatch.setenv(name, value)
    assert place() == (9, 2, 8)


def test_only_the_first_process_speaks(monkeypatch, capsys):
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    say("hello")
    warn("careful")
    list(progress(range(3)))
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(("count", "size"), [(8, 2), (5, 2), (7, 3), (3, 3)])
def test_shares_cover_everything_once(count, size):
    shares = [range(count)[Ranks(rank, rank, size).share(count)] for rank in range(size)]
    assert [i for share in shares for i in share] == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_one_process_joins_nothing():
    with distributed.start("cpu") as (ranks, device):
        assert (ranks, device) == (ALONE, torch.device("cpu"))
        assert not torch.distributed.is_initialized()
    net = torch.nn.Linear(1, 1)
    assert ranks.wrap(net) is net
    assert ranks.share(3) == slice(0, 3)
    assert (ranks.any([]), ranks.any([2]), ranks.mean(0.3)) == (False, True, 0.3)
    assert (ranks.on_main(lambda: "a"), ranks.in_turn(lambda: "b")) == ("a", "b")
    ranks.check_same(1, "numbers")
    with pytest.raises(KeyError), ranks.together():
        raise KeyError


def test_gradients_alone_are_shared(monkeypatch):
    """No buffer changes in training: none is sent at every step."""
    import torch.nn.parallel

    given = []

    def today(net, gradient_as_bucket_view, broadcast_buffers=None, forward_sync_buffers=None):
        given.append((broadcast_buffers, forward_sync_buffers))

    def before(net, gradient_as_bucket_view, broadcast_buffers=True):
        given.append(broadcast_buffers)

    for wrapper in (today, before):
        monkeypatch.setattr(torch.nn.parallel, "DistributedDataParallel", wrapper)
        Ranks(world_size=2).wrap(torch.nn.Linear(1, 1))
    assert given == [(None, False), False]


@pytest.mark.parametrize(
    ("name", "count", "expected"),
    [
        ("cuda", 2, torch.device("cuda:1")),
        ("auto", 2, torch.device("cuda:1")),
        ("auto", 0, torch.device("cpu")),
        ("cpu", 2, torch.device("cpu")),
        ("cuda", 1, "torchrun started more processes than the 1 GPU that torch sees; lower --nproc_per_node"),
        ("cuda:1", 2, "each process of torchrun takes a GPU of its own, not 'cuda:1'; use --device cuda"),
        ("cuda", 0, "torch sees no GPU"),
    ],
)
def test_each_process_takes_its_own_gpu(name, count, expected, monkeypatch):
    gpus(monkeypatch, count)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    if isinstance(expected, torch.device):
        assert distributed.own_device(name, Ranks(9, 1, 16)) == expected
    else:
        with pytest.raises(UserError, match=expected):
            distributed.own_device(name, Ranks(9, 1, 16))


@pytest.mark.parametrize("in_memory", [True, False])
def test_shares_of_a_batch_and_of_its_draws(in_memory, data, monkeypatch):
    """Together they are the whole batch's, to the bit."""
    if not in_memory:
        monkeypatch.setattr("basics.image_sets.IN_MEMORY_BYTES", 0)
    images = datasets.load(data / "squares.npz", split="train", image_size=tiny.SIZE, num_channels=1)
    options = {"seed": 1, "device": "cpu", "random_flip": True, "uniform_dequantization": True, "centered": True}
    shares = [slice(None), *(Ranks(rank, rank, 2).share(5) for rank in range(2))]
    whole, first, second = (TrainingBatches(images, 5, **options, share=share) for share in shares)
    for step in (0, 1, 2):
        assert torch.equal(torch.cat([first.batch(step), second.batch(step)]), whole.batch(step))
    whole, *parts = (losses.Draws.keyed((5, 1, 8, 8), 100, 7, "train", share=share) for share in shares)
    for name in ("normal", "uniform", "labels"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name))


def test_more_processes_than_images_in_a_batch(data, tmp_path):
    with pytest.raises(UserError, match="a batch of 5 images cannot be shared by 6 processes; raise"):
        training.Trainer(tiny.config(**CHANGES), tmp_path, tiny.CPU, "./data", ranks=Ranks(1, 1, 6))


def test_dropout_differs_between_processes(data, tmp_path, monkeypatch):
    """One process keeps the key of the step alone."""
    seeds, seed = [], torch.manual_seed
    monkeypatch.setattr(Ranks, "wrap", lambda self, net: net)
    monkeypatch.setattr(torch, "manual_seed", lambda value: seeds.append(value) or seed(value))
    tree = tiny.config(**{**CHANGES, "data__dataset": str(data / "squares.npz"), "model__dropout": 0.1})
    for ranks in (ALONE, Ranks(0, 0, 2), Ranks(1, 1, 2)):
        trainer = training.Trainer(tree, tmp_path, tiny.CPU, "./data", ranks=ranks)
        trainer.train_step(trainer.batches("train").batch(0))
    assert len(set(seeds[1::2])) == 3
    assert seeds[1] == noise.key(tree.seed, "dropout", 0) & (2**63 - 1)


# ---------------------------------------------------------------------------------------------------- training


@pytest.fixture(scope="module")
def two(data, tmp_path_factory):
    """Six steps of two processes, whose shares are two and three images: work folder and standard output."""
    workdir = tmp_path_factory.mktemp("two")
    code, out, err = torchrun(2, *train_command(data, workdir))
    assert code == 0, err
    return workdir, out


def same_state(a, b):
    """Asserts that two checkpoints agree but for the order of float32 sums, over some steps."""
    assert (a["step"], a["model"].keys(), a["randomness"]) == (b["step"], b["model"].keys(), b["randomness"])
    for name, weight in a["model"].items():
        close(weight, b["model"][name], rtol=1e-4, atol=1e-5)
    for mine, theirs in zip(a["ema"]["shadow_params"], b["ema"]["shadow_params"], strict=True):
        close(mine, theirs, rtol=1e-4, atol=1e-5)
    gradients = [[state["exp_avg"] for state in c["optimizer"]["state"].values()] for c in (a, b)]
    close(*(torch.cat([average.flatten() for average in averages]) for averages in gradients), rtol=1e-4)


def test_two_processes_train_as_one_and_one_goes_on(two, data, tmp_path):
    """The weights, their averages, and Adam's averages of the clipped gradients."""
    workdir, _ = two
    single = tmp_path / "single"
    train(data, single)
    theirs, ours = (read_checkpoint(folder / training.META_CHECKPOINT) for folder in (single, workdir))
    same_state(ours, theirs)
    samples = [np.load(folder / "samples" / "iter_5" / "sample.np").astype(int) for folder in (single, workdir)]
    assert abs(samples[0] - samples[1]).max() <= 1
    for folder in (single, workdir):
        train(data, folder, training__n_iters=9)
    last = [read_checkpoint(folder / training.META_CHECKPOINT) for folder in (single, workdir)]
    assert last[1]["step"] == 10
    same_state(last[1], last[0])
    assert any(not torch.equal(last[1]["model"][name], ours["model"][name]) for name in ours["model"])


COMPILING = """
import functools
import torch

import command_line, main

torch.compile = functools.partial(torch.compile, backend="eager")  # without generating code
main.define_flags()
command_line.run(main.main)
"""


def test_two_processes_train_a_compiled_network(data, tmp_path):
    """As one does that is not compiled."""
    child = tmp_path / "child.py"
    child.write_text(COMPILING)
    command = train_command(data, tmp_path / "two", training__compile="on", training__snapshot_sampling=False)
    code, out, err = torchrun(2, child, *command[1:])
    assert code == 0, err
    assert "compiling the network for 7 steps" in out
    train(data, tmp_path / "one", training__snapshot_sampling=False)
    same_state(*(read_checkpoint(tmp_path / name / training.META_CHECKPOINT) for name in ("two", "one")))


def test_rank_0_alone_logs(two):
    workdir, out = two
    assert out.count("starting: ddpm") == out.count("trained: checkpoints are in") == 1
    logged = (workdir / "stdout.txt").read_text()
    assert [int(step) for step in re.findall(r"step: (\d+), training_loss", logged)][:4] == [0, 2, 4, 6]
    assert len(list((workdir / "tensorboard").iterdir())) >= 1


def test_an_interrupt_is_agreed_on_at_every_tenth_step():
    """Each question is a message to all; a process by itself acts at once."""
    asked = []

    class Two(Ranks):
        def any(self, flag):
            asked.append(bool(flag))
            return True

    stopped = [step for step in range(35) if training._all_stop(Two(world_size=2), [], step)]
    assert stopped == [0, 10, 20, 30]
    assert asked == [False] * 4
    assert [training._all_stop(Ranks(), noted, 3) for noted in ([], [2])] == [False, True]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_all_at_one_step_and_another_number_goes_on(number, data, tmp_path):
    changes = {"training__snapshot_sampling": False, "training__log_freq": 1, "training__eval_freq": 10**6}
    process = start(2, *train_command(data, tmp_path, training__n_iters=10**6, **changes))
    log, patience = tmp_path / "stdout.txt", time.monotonic() + 60
    while not (log.is_file() and "step: 3," in log.read_text()) and time.monotonic() < patience:
        time.sleep(0.05)
    process.send_signal(number)
    code, _, err = finish(process)
    assert code != 0
    assert err.count("interrupted; the same command continues where this run stopped") == 1, err
    step = read_checkpoint(tmp_path / training.META_CHECKPOINT)["step"]
    assert step >= 4
    train(data, tmp_path, training__n_iters=step, **changes)
    assert f"resuming at step {step}:" in log.read_text()
    assert read_checkpoint(tmp_path / training.META_CHECKPOINT)["step"] == step + 1


# -------------------------------------------------------------------------------------------------------- errors


def exit_codes(err):
    """Of the ranks, as torchrun tells them."""
    return set(re.findall(r"exitcode +: (-?\d+)", err))


MISTAKES = {
    "data set": (["--config.data.dataset=nowhere"], "unknown data set 'nowhere'; choose one of"),
    "flag": (["--batchsize=3"], "Unknown command line flag 'batchsize'"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_users_error_is_told_once(name, data, tmp_path):
    flags, message = MISTAKES[name]
    code, out, err = torchrun(2, *train_command(data, tmp_path / "run"), *flags)
    assert code != 0
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, err
    assert message in errors[0]
    assert exit_codes(err) == {str(EXIT_USER_ERROR)}
    assert out == ""
    assert not (tmp_path / "run").exists()


EVALUATES = """
import contextlib, types
import command_line, main
two = types.SimpleNamespace(world_size=2), types.SimpleNamespace(type="cpu")
main.distributed.start = lambda device: contextlib.nullcontext(two)
main.define_flags()
command_line.run(main.main)
"""


def test_evaluation_runs_in_one_process(data, tmp_path):
    flags = [*train_command(data, tmp_path / "run")[1:], "--mode=eval"]
    code, out, err = tiny.command("-c", EVALUATES, *flags)
    assert (code, out) == (EXIT_USER_ERROR, "")
    assert err == "error: --mode eval runs in one process; start it without torchrun\n"
    assert not (tmp_path / "run").exists()


CHILD = """
import os

import command_line, main
from basics.console import UserError
from lmd import batches, training_log

rank, batch, scalar = int(os.environ["RANK"]), batches.TrainingBatches.batch, training_log.Log.scalar

def batch_of(self, step):  # in the midst of a step, when the other rank waits for the gradients
    if (rank, step) == (1, 3):
        raise UserError("image 7 can no longer be read")
    return batch(self, step)

def log(self, name, value, step, *notes):  # when the other rank waits for the agreement
    if step == 4:
        raise ZeroDivisionError("a bug")
    scalar(self, name, value, step, *notes)

if "{where}" == "rank 1":
    batches.TrainingBatches.batch = batch_of
else:
    training_log.Log.scalar = log
main.define_flags()
command_line.run(main.main)
"""


@pytest.mark.parametrize(
    ("where", "line"), [("rank 1", "error: image 7 can no longer be read"), ("rank 0", "ZeroDivisionError: a bug")]
)
def test_an_error_of_one_process_ends_all(where, line, data, tmp_path):
    """Its line or traceback is the only one besides torchrun's own."""
    child = tmp_path / "child.py"
    child.write_text(CHILD.replace("{where}", where))
    code, _, err = torchrun(2, child, *train_command(data, tmp_path / "run")[1:])
    assert code != 0
    assert re.findall(r"\b(?:error|\w+Error): \S.*", err) == [line], err  # torchrun's own has nothing behind its colon


OTHERS = """
import os, sys

if os.environ["RANK"] == "1":
    sys.argv = [word.replace("squares.npz", "inverted.npz") for word in sys.argv]
import command_line, main
main.define_flags()
command_line.run(main.main)
"""


def test_processes_that_train_on_different_images(data, tmp_path):
    """As many, but others."""
    np.savez(data / "inverted.npz", images=255 - np.load(data / "squares.npz")["images"])
    child = tmp_path / "child.py"
    child.write_text(OTHERS)
    code, _, err = torchrun(2, child, *train_command(data, tmp_path / "run")[1:])
    assert code != 0
    assert "the processes of this run see different settings or training images" in err


def test_processes_that_see_different_things(tmp_path):
    child = tmp_path / "child.py"
    child.write_text(
        "import os, command_line\n"
        "from basics import distributed\n"
        "def main(_):\n"
        "    with distributed.start('cpu') as (ranks, device):\n"
        "        ranks.check_same([1, 2.5, 'a'], 'lists')\n"
        "        assert ranks.on_main(lambda: ranks.rank) == 0\n"
        "        assert ranks.mean(ranks.rank) == 0.5\n"
        "        ranks.check_same(os.environ['RANK'], 'images')\n"
        "command_line.run(main)\n"
    )
    code, _, err = torchrun(2, child)
    assert code != 0
    assert err.count("error: the processes of this run see different images; give all machines the same command") == 1


# ------------------------------------------------------------------------------------------------ reconstruction

KILLED = """
import os, signal

import command_line, recon
from storage import results_folder

written, write = [], results_folder.ResultsFolder.write_batch

def dying(self, side, index, *tensors):
    written.append(index)
    if os.environ["RANK"] == "1" and len(written) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    write(self, side, index, *tensors)

results_folder.ResultsFolder.write_batch = dying
recon.define_flags()
command_line.run(recon.main)
"""


def test_reconstruction_is_killed_and_goes_on_with_another_number(data, tmp_path):
    """Then everything is there, to the bit as of one process, and what was there has not been made again."""
    sources = {"pos": data / "squares.npz", "neg": data / "others.npz"}
    whole = tiny.reconstruct(tmp_path / "single", data / "checkpoint.pth", sources, batch_size=2)
    flags = [
        *tiny.config_flags(), *RECON, f"--workdir={tmp_path / 'several' / 'run'}",
        f"--ckpt_path={data / 'checkpoint.pth'}", f"--in_domain={sources['pos']}", f"--out_of_domain={sources['neg']}",
    ]  # fmt: skip
    (tmp_path / "child.py").write_text(KILLED)
    code, _, err = torchrun(2, tmp_path / "child.py", *flags)
    assert code != 0
    assert str(-signal.SIGKILL) in exit_codes(err)
    folder = tmp_path / "several" / "run" / whole.name
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("batch_*.pth")}
    batches = sorted(path.relative_to(whole) for path in whole.rglob("batch_*.pth"))
    assert folder / "pos" / "batch_1.pth" in before
    assert 1 <= len(before) < len(batches) == 8

    code, out, err = torchrun(3, "recon.py", *flags)
    assert code == 0, err
    assert out.count("reconstructions: ") == out.count("next: python detect.py") == 1
    assert sorted(path.relative_to(folder) for path in folder.rglob("batch_*.pth")) == batches
    for path in batches:
        assert tiny.same(*(torch.load(top / path, weights_only=True) for top in (folder, whole))), path
    assert json.loads((folder / "manifest.json").read_text()) == json.loads((whole / "manifest.json").read_text())
    assert {path: path.stat().st_mtime_ns for path in before} == before
