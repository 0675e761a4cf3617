"""Training that can be killed at any moment, and what it writes."""

import contextlib
import os
import re
import shutil
import signal
import types

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

import losses
import models
from basics import files
from basics.console import EXIT_INTERRUPTED, EXIT_TERMINATED, UserError, guard, stay_to_tell
from basics.distributed import Ranks
from configs.base import check
from lmd import samples, training, training_log
from lmd.held_out import held_back
from models import inference
from storage.checkpoints import read_checkpoint

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
    """The files that a run leaves, besides its logs and marks -> content, checkpoints as tensors."""
    found = {}
    for path in workdir.rglob("*"):
        name = path.relative_to(workdir).as_posix()
        own = path.name in ("stdout.txt", files.MARK) or name.startswith("tensorboard/")
        if path.is_file() and not own:
            found[name] = read_checkpoint(path) if path.suffix == ".pth" else path.read_bytes()
    return found


# ------------------------------------------------------------------------------------------- killed and resumed

CHILD = """
import os, signal, sys
import tiny
from basics import files
from lmd import training

moment, dataset, workdir, dropout = sys.argv[1:]
writes, flush, train_step = [], files.os.fsync, training.Trainer.train_step

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def step(self, x):  # the next one to be saved would be step 9
    return die() if self.state.step == 8 else train_step(self, x)

def fsync(handle):  # checkpoint, numbered one, mark and two of samples, then the first one again: not yet renamed
    flush(handle)
    writes.append(handle)
    if len(writes) == 6:
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
    assert read_checkpoint(workdir / META)["step"] == {"step": 7, "write": 4}[moment]
    unfinished = list(workdir.rglob("*.tmp"))
    assert [path.parent.name for path in unfinished] == (["checkpoints-meta"] if moment == "write" else [])
    tree = tiny.config(data__dataset=str(data), model__dropout=dropout)
    tiny.train(tree, workdir)
    if dropout == 0:
        whole = tmp_path / "whole"
        tiny.train(tree, whole)
    assert not any(path.exists() for path in unfinished)  # the run that owns the folder removed them
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


@pytest.mark.parametrize("step", [5, 12])
def test_a_run_that_is_killed_while_it_samples_keeps_its_last_step(step, tree, whole, tmp_path, monkeypatch):
    """Sampling can take longer than training did; the samples are drawn when the run goes on."""
    tree.training.snapshot_freq_for_preemption = 12 if step == 12 else 5

    def draw(trainer, count, word, first=0):
        if word == step:
            raise Death
        return drawn(trainer, count, word, first)

    drawn = samples.draw
    monkeypatch.setattr(samples, "draw", draw)
    with pytest.raises(Death):
        tiny.train(tree, tmp_path)
    assert read_checkpoint(tmp_path / META)["step"] == step + 1
    monkeypatch.setattr(samples, "draw", drawn)
    tiny.train(tree, tmp_path)
    found, expected = (
        {name: content for name, content in results(workdir).items() if name.startswith("samples/")}
        for workdir in (tmp_path, whole)
    )
    assert found == expected
    assert tiny.same(results(tmp_path).keys(), results(whole).keys())


def interrupting(step, numbers, monkeypatch):
    """Signals arrive in the midst of a step."""
    train_step = training.Trainer.train_step

    def interrupted(self, x):
        for number in numbers if self.state.step == step else []:
            signal.raise_signal(number)
        return train_step(self, x)

    monkeypatch.setattr(training.Trainer, "train_step", interrupted)


SIGNALS = {signal.SIGINT: EXIT_INTERRUPTED, signal.SIGTERM: EXIT_TERMINATED}  # how training ends after each


@pytest.fixture
def heeded():
    """Both signals raise KeyboardInterrupt; a shell's background jobs, which a test run may be, ignore Ctrl-C."""
    before = {number: signal.signal(number, signal.default_int_handler) for number in SIGNALS}
    yield
    assert [signal.getsignal(number) for number in SIGNALS] == [signal.default_int_handler] * 2
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("heeded")
@pytest.mark.parametrize("number", SIGNALS)
def test_ctrl_c_and_sigterm_lose_nothing(number, tree, whole, tmp_path, monkeypatch, capsys):
    interrupting(7, [number], monkeypatch)
    assert guard(lambda _: tiny.train(tree, tmp_path), None) == SIGNALS[number]
    out, err = capsys.readouterr()
    assert "the same command continues where this run stopped" in err
    assert f"stopped: step 7 is saved in {tmp_path / META}\n" in out
    assert read_checkpoint(tmp_path / META)["step"] == 8  # step 7 was finished, and saved though not due
    monkeypatch.undo()
    tiny.train(tree, tmp_path)
    assert tiny.same(results(tmp_path), results(whole))


@pytest.mark.usefixtures("heeded")
@pytest.mark.parametrize("first", SIGNALS)
@pytest.mark.parametrize("second", SIGNALS)
def test_a_second_signal_acts_at_once(first, second, tree, tmp_path, monkeypatch):
    interrupting(7, [first, second], monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        tiny.train(tree, tmp_path)
    assert read_checkpoint(tmp_path / META)["step"] == 7  # of the step that was due


@pytest.mark.usefixtures("heeded")
def test_of_several_processes_none_ends_by_a_second_sigterm_nor_by_one_after_it_failed():
    """A scheduler sends it beside torchrun; torchrun when a rank has left, and the failed one must tell why."""
    several = Ranks(world_size=2)
    with training._noted_interrupt(several) as noted:
        for _ in range(2):
            signal.raise_signal(signal.SIGTERM)
    assert noted == [signal.SIGTERM] * 2
    with training._noted_interrupt(several):
        stay_to_tell()
    assert signal.signal(signal.SIGTERM, signal.default_int_handler) is signal.SIG_IGN


@pytest.mark.parametrize(
    ("deleted", "steps", "told"),
    [
        ([], 12, " of 12"),
        ([], 6, r", beyond config\.training\.n_iters=6"),
        (["samples/iter_12"], 12, " of 12"),
        (["samples"], 12, " of 12"),
    ],
)
def test_a_finished_run_says_so_and_changes_nothing(deleted, steps, told, tree, whole, tmp_path, capsys):
    """Nor does it draw samples again that were deleted."""
    workdir = shutil.copytree(whole, tmp_path / "run")
    for name in deleted:
        shutil.rmtree(workdir / name)
    before = tiny.snapshot(workdir)
    tree.training.n_iters = steps
    tiny.train(tree, workdir)
    *_, line = capsys.readouterr().out.splitlines()
    on = f", trained on {IMAGES} images of {tree.data.dataset}"
    assert re.fullmatch(rf"already trained: .*checkpoint\.pth is at step 12{told}{on}", line)
    assert tiny.snapshot(workdir) == before


@pytest.mark.parametrize(
    ("warmup", "cooldown", "highest"),
    [(2, 0, None), (24, 0, "0.0005"), (25, 0, "0.00048"), (6, 12, "0.0005"), (20, 2500, "0.00015")],
)
def test_a_rate_that_is_never_reached_is_told(warmup, cooldown, highest, data, tmp_path, capsys):
    """Of 0.001 after 12 steps; half of it passes."""
    tree = tiny.config(data__dataset=str(data), optim__warmup=warmup, optim__cooldown=cooldown)
    tiny.train(tree, tmp_path)
    told = f"of config.optim.lr=0.001 the learning rate reaches {highest} at most: 12 steps are few"
    assert (told in capsys.readouterr().err) == (highest not in (None, "0.0005"))


def test_more_steps_continue_a_finished_run(tree, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "longer")
    tree.training.n_iters = 14
    for workdir in ("longer", "at once"):
        tiny.train(tree, tmp_path / workdir)
    ends = [read_checkpoint(tmp_path / workdir / META) for workdir in ("longer", "at once")]
    assert ends[0]["step"] == 15
    assert tiny.same(ends[0], ends[1])


def test_dropout_is_drawn(tree, whole, tmp_path):
    """Or resuming with it would prove nothing."""
    tree.model.dropout = 0.0
    tiny.train(tree, tmp_path)
    with_dropout, without = (read_checkpoint(w / META)["model"] for w in (whole, tmp_path))
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


def test_without_the_meta_checkpoint_training_starts_anew_and_says_how_to_go_on(tree, whole, tmp_path, capsys):
    shutil.copytree(whole / "checkpoints", tmp_path / "checkpoints")
    (tmp_path / "checkpoints" / "checkpoint_3.pth").write_bytes(b"half")
    tree.training.n_iters = 0
    tiny.train(tree, tmp_path)
    out, err = capsys.readouterr()
    newest, meta = tmp_path / "checkpoints" / "checkpoint_2.pth", tmp_path / META
    (told,) = [line for line in err.splitlines() if line.startswith("warning: there is no ")]
    assert f"there is no {meta}, so training starts anew at step 0; to go on after step 12 instead" in told
    assert f"copy {newest} to {meta}, " in told
    assert " starting: " in out
    shutil.copy(newest, meta)
    tree.training.n_iters = 13
    tiny.train(tree, tmp_path)
    out, err = capsys.readouterr()
    assert "warning: " not in err
    assert " resuming at step 13: " in out


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("data__dataset", "others", f"was trained on other images .{IMAGES} of "),
        ("seed", 1, "was trained with seed 42, not 1"),
        ("model__nf", 64, "was trained with another config"),
        ("training__batch_size", 2, "was trained with other settings"),
    ],
)
def test_no_training_starts_anew_beside_checkpoints_of_another(field, value, message, tree, whole, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(whole / "checkpoints", workdir / "checkpoints")
    before = tiny.snapshot(workdir)
    if value == "others":
        value = str(tiny.write_pictures(tmp_path / "others.npz", IMAGES, seed=1))
    section, _, name = field.rpartition("__")
    setattr(tree[section] if section else tree, name, value)
    with pytest.raises(UserError, match=rf"checkpoint_2\.pth {message}.* --workdir"):
        tiny.train(tree, workdir)
    assert tiny.snapshot(workdir) == before


def test_a_finished_run_is_not_taken_for_one_of_other_images(tree, whole, data, tmp_path, capsys):
    before = tiny.snapshot(whole)
    tree.data.dataset = str(shutil.copy(data, tmp_path / "the same.npz"))
    tiny.train(tree, whole)
    assert "already trained: " in capsys.readouterr().out
    tree.data.dataset = str(tiny.write_pictures(tmp_path / "others.npz", IMAGES, seed=1))
    with pytest.raises(UserError, match=r"checkpoint\.pth was trained on other images"):
        tiny.train(tree, whole)
    assert tiny.snapshot(whole) == before


# ---------------------------------------------------------------------------------------------- what is written


def test_files_are_the_published_ones(whole):
    assert results(whole).keys() == WRITTEN
    assert {path.name for path in whole.iterdir()} == {
        "checkpoints", "checkpoints-meta", "samples", "stdout.txt", "tensorboard", files.MARK,
    }  # fmt: skip
    steps = {name: read_checkpoint(whole / name)["step"] for name in WRITTEN if name.endswith(".pth")}
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
    pace = r"(?:, [\d,.]+ images/s, \d+ % of the time waiting for data)"
    pattern = rf"step: (\d+), (training_loss(?=.*{pace}$)|eval_loss): ([\d.e+-]+){pace}?$"
    logged = [re.search(pattern, line).groups() for line in lines if "step: " in line]
    assert [int(step) for step, name, _ in logged if name == "training_loss"] == [0, 2, 4, 6, 8, 10, 12]
    assert [int(step) for step, name, _ in logged if name == "eval_loss"] == [0, 4, 8, 12]
    assert all(0.05 < float(value) < 3 for *_, value in logged)  # the untrained network's loss is 1
    assert sum("samples of step" in line for line in lines) == 3


def test_the_pace_is_of_the_steps_alone(monkeypatch):
    clock, batches = [100.0], types.SimpleNamespace(waited=7.0)
    monkeypatch.setattr(training_log.time, "perf_counter", lambda: clock[0])
    pace = training_log.Pace(batches, 128)
    for steps, seconds, waited, expected, told in (
        (50, 2.0, 0.5, "3,200.0 images/s, 25 %", False),
        (14, 2.0, 0.5, "2,048.0 images/s, 25 %", True),  # with those before
        (1, 64.0, 0.0, "2.0 images/s, 0 %", True),
    ):
        pace.steps += steps
        clock[0] += seconds
        batches.waited += waited
        pace.pause()
        assert str(pace) == f"{expected} of the time waiting for data"
        clock[0] += 1000
        batches.waited += 100
        if told:
            pace.restart()
        pace.go_on()


def test_a_line_that_a_full_disk_cut_off_ends_before_the_next(tmp_path):
    (tmp_path / "stdout.txt").write_text("2026-01-01 00:00:00 step: 1, training_l")
    log = training_log.Log(tmp_path, 0)
    log.line("starting")
    log.close()
    first, second = (tmp_path / "stdout.txt").read_text().splitlines()
    assert (first[-10:], second[-8:]) == ("training_l", "starting")


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


# -------------------------------------------------------------------------------------- precision and compilation


def trained(tree, tmp_path, precision, steps=40):
    """A trainer after some steps, and the loss of each."""
    trainer = training.Trainer(tree, tmp_path, tiny.CPU, "./data")
    batches, trainer.state.precision = trainer.batches("train"), precision
    trainer.get_ready(steps, batches)
    return trainer, [trainer.train_step(batches.batch(step)).item() for step in range(steps)]


def test_bfloat16_learns_as_float32_does(data, tmp_path):
    """What it changes is less than another seed does, and the forward pass alone is in it."""
    late = {}
    for name, precision, seed in (("a", "fp32", 1), ("b", "fp32", 2), ("c", "fp32", 3), ("bf16", "bf16", 1)):
        tree = tiny.config(data__dataset=str(data), optim__lr=2e-3, seed=seed)
        trainer, values = trained(tree, tmp_path, precision)
        late[name] = np.mean(values[-15:])
    assert 0 < abs(late["bf16"] - late["a"]) < np.std([late[name] for name in "abc"], ddof=1)
    state = trainer.state
    moments = [value for entry in state.optimizer.state.values() for value in entry.values()]
    kept = [*state.net.parameters(), *(p.grad for p in state.net.parameters()), *state.ema.shadow, *moments]
    assert {value.dtype for value in kept} == {torch.float32}


def test_the_forward_pass_alone_is_in_bfloat16(tree, tmp_path, monkeypatch):
    """Not the loss, and the ODE's samples not at all, whose solver would follow the rounding."""
    seen, forward, reduce = {}, models.ddpm.DDPM.forward, losses._reduce
    note = lambda where, *more: seen.setdefault(where, set()).add((torch.is_autocast_enabled("cpu"), *more))

    def watched(self, x, labels):
        note("step" if self.training else "sample")
        return forward(self, x, labels)

    monkeypatch.setattr(models.ddpm.DDPM, "forward", watched)
    monkeypatch.setattr(losses, "_reduce", lambda x, mean: [reduce(x, mean), note("loss", x.dtype)][0])
    tree.training.precision = "bf16"
    for method in ("pc", "ode"):
        seen.clear()
        tree.sampling.method, tree.training.n_iters = method, 5
        tiny.train(tree, tmp_path / method)
        assert seen == {"step": {(True,)}, "sample": {(method == "pc",)}, "loss": {(False, torch.float32)}}
    assert ", cpu, bf16" in (tmp_path / "pc" / "stdout.txt").read_text()


@pytest.fixture
def compiler(monkeypatch):
    """torch.compile without generating code, and what it was given."""
    given, compile_ = [], torch.compile
    monkeypatch.setattr(torch, "compile", lambda net: given.append(net) or compile_(net, backend="aot_eager"))
    return given


def test_a_compiled_training_is_the_same_and_goes_on(data, tmp_path, compiler):
    """Eagerly, too; its checkpoints have the same names."""
    changes = {"optim__eps": 1e-2, "training__snapshot_sampling": False}  # steps proportional to gradients
    tree = tiny.config(data__dataset=str(data), **changes)
    tiny.train(tree, tmp_path / "eager")
    for choice, last in (("on", 7), ("off", 12)):
        tree.training.compile, tree.training.n_iters = choice, last
        tiny.train(tree, tmp_path / "compiled")
    assert [type(net) for net in compiler] == [models.ddpm.DDPM]
    mine, theirs = (read_checkpoint(tmp_path / name / META)["model"] for name in ("compiled", "eager"))
    assert mine.keys() == theirs.keys()
    for weight, value in mine.items():
        torch.testing.assert_close(value, theirs[weight], rtol=1e-4, atol=1e-5)


def test_what_cannot_be_compiled_is_told_before_the_first_step(tree, whole, tmp_path, monkeypatch, capsys):
    """Also where the backward pass alone cannot; where nobody asked for it training goes on without."""
    from torch._dynamo.exc import TorchDynamoException

    class Broken(torch.autograd.Function):
        forward = staticmethod(lambda ctx, x: x.clone())

        @staticmethod
        def backward(ctx, grad):
            raise TorchDynamoException("no C++ compiler found\nand much more")

    monkeypatch.setattr(torch, "compile", lambda net: lambda x, labels: Broken.apply(net(x, labels)))
    tree.training.compile = "on"
    with pytest.raises(
        UserError, match=r"cannot be compiled here \(no C\+\+ compiler found\); set --config\.training\.c"
    ):
        tiny.train(tree, tmp_path / "on")
    assert results(tmp_path / "on") == {}
    tree.training.compile, asked = "auto", []
    monkeypatch.setattr(inference, "worth_compiling", lambda *given: asked.append(given) or True)
    laid_out, layout, match = [], inference.layout, losses.match_layout
    monkeypatch.setattr(inference, "layout", lambda device, *compiled: laid_out.append(compiled) or layout(device))
    monkeypatch.setattr(losses, "match_layout", lambda state: laid_out.append("matched") or match(state))
    tiny.train(tree, tmp_path / "auto")
    assert laid_out == [(), (True,), "matched", (False,), "matched"], "of what is not compiled in the end"
    assert "cannot be compiled here (no C++ compiler found); going on without" in capsys.readouterr().err
    several = types.SimpleNamespace(rank=0, world_size=2, together=contextlib.nullcontext, any=bool)
    several.unshared = lambda net: contextlib.nullcontext()
    trainer = training.Trainer(tree, tmp_path / "several", tiny.CPU, "./data")
    trainer.state.precision, trainer.ranks = "fp32", several
    laid_out.clear()
    trainer._compile(trainer.state.net, torch.zeros(4, 1, 8, 8), required=False)
    assert laid_out == [], "torch keeps the layout of the gradients that several processes share"
    [(choice, network, evaluations, shape, least)] = asked
    assert (choice, network.device, shape) == ("auto", tiny.CPU, (1, 8, 8))
    assert (evaluations, least) == (3 * 13 * 4, inference.COMPILE_TRAINING_FROM)
    mine, theirs = results(tmp_path / "auto"), results(whole)
    assert all(tiny.same(mine[name][part], theirs[name][part]) for name in (str(META),) for part in ("model", "ema"))


def test_compiling_by_itself_is_for_long_trainings_on_a_gpu():
    """65 s are won back in 8,100 steps of 128 images of the CIFAR-10 network."""
    network = types.SimpleNamespace(device=torch.device("cuda"), operations=lambda shape: 12.04e9)
    worth = lambda steps: inference.worth_compiling(
        "auto", network, inference.PASSES * 128 * steps, (3, 32, 32), inference.COMPILE_TRAINING_FROM
    )
    assert [worth(steps) for steps in (8_000, 8_400)] == [False, True]
    network.device = tiny.CPU
    assert not worth(10**6)


def test_a_config_of_earlier_versions_trains(tree, whole, tmp_path):
    with tree.training.unlocked():
        del tree.training.precision, tree.training.compile
    check(tree)
    tiny.train(tree, tmp_path)
    mine, theirs = results(tmp_path), results(whole)
    assert all(tiny.same(mine[str(META)][part], theirs[str(META)][part]) for part in ("model", "ema", "optimizer"))


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
    first, again, other = (samples.draw(trainer, 3, step).detach() for step in (5, 5, 10))
    assert first.shape == (3, 1, 8, 8)
    assert first.isfinite().all()
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)
    if name != "langevin":  # whose step is a mean over the batch
        few = samples.draw(trainer, 2, 5)
        torch.testing.assert_close(few, first[:2], rtol=0, atol=1e-4)


def test_methods_differ(data, tmp_path):
    images = {}
    for method in ("pc", "ode"):
        images[method] = samples.draw(sampled(data, tmp_path, sampling__method=method), 2, 0)
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
    with pytest.raises(UserError, match="infinite after step 3: training diverged; no checkpoint was saved yet, so"):
        tiny.train(tree, tmp_path)
    assert results(tmp_path) == {}


# ----------------------------------------------------------------------------------------------------- bad input

BAD = {
    "unknown data set": ({"data__dataset": "CIFAR11"}, "unknown data set 'CIFAR11'; choose one of: CIFAR10"),
    "absent files": ({"data__dataset": "CELEBA"}, "the train split of CelebA is not in data: put a .txt list of image"),
    "few images": ({"training__batch_size": 11}, "a batch of 11 cannot be taken from the 10 images"),
    "precision": (
        {"training__precision": "fp16"},
        r"unknown precision \(--config\.training\.precision\) 'fp16'; choose",
    ),
    "precision of GPUs": (
        {"training__precision": "tf32"},
        "does not have; use --config.training.precision fp32 or auto",
    ),
    "compile": ({"training__compile": "maybe"}, "unknown choice .* 'maybe'; choose one of: auto, on, off"),
    "no batch": ({"training__batch_size": 0}, "a batch of 0 cannot be taken"),
    "model": ({"model__name": "unet"}, r"unknown model \(config\.model\.name\) 'unet'; choose one of: ddpm, ncsnpp"),
    "SDE": ({"training__sde": "sde"}, "unknown SDE.* 'sde'; choose one of: vpsde"),
    "optimizer": ({"optim__optimizer": "SGD"}, "unknown optimizer .*'sgd'; choose one of: adam"),
    "predictor": ({"sampling__predictor": "heun"}, r"unknown predictor \(config\.sampling\.predictor\) 'heun'"),
    "no predictor of this SDE": ({"sampling__predictor": "ancestral_sampling"}, "is not defined for sub-VP"),
    "corrector": ({"sampling__corrector": "x"}, r"unknown corrector \(config\.sampling\.corrector\) 'x'"),
    "samples from a later time": (
        {"sampling__sampler": "ddim", "sampling__t_start": 0.6},
        r"samples cannot be drawn with config\.sampling: t_start=0\.6; give that to recon\.py alone",
    ),
    "an ODE with steps": (
        {"sampling__method": "ode", "sampling__steps": 5, "sampling__sampler": "ddim"},
        r"config\.sampling: sampler, steps: not with the method 'ode', where noise_removal alone can be chosen; set ",
    ),
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


def test_a_workdir_that_cannot_be_made(tree, tmp_path, monkeypatch):
    monkeypatch.setattr(training.datasets, "load", None)  # it is told before images are read
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"cannot write to .*file/run: .*; .* choose another path"):
        tiny.train(tree, tmp_path / "file" / "run")


def test_a_log_on_a_full_disk(tree, tmp_path, monkeypatch, capsys):
    open_own = files.open_own
    full = lambda: os.fdopen(os.open("/dev/full", os.O_WRONLY), "w")
    monkeypatch.setattr(files, "open_own", lambda path: full() if path.name == "stdout.txt" else open_own(path))
    with pytest.raises(SystemExit) as exit_:
        guard(lambda _: tiny.train(tree, tmp_path), None)
    assert exit_.value.code == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    told = f"No space left on device: {tmp_path / 'stdout.txt'}; free some space, then run the same command again"
    assert errors == [f"error: {told}"]


@pytest.mark.parametrize("name", ["stdout.txt", files.MARK])
@pytest.mark.parametrize("target", ["elsewhere.txt", "nowhere.txt", "/dev/null"])
def test_a_log_that_is_a_link_is_not_followed(name, target, tree, tmp_path):
    kept = tmp_path / "elsewhere.txt"
    kept.write_text("mine\n")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).symlink_to(tmp_path / target)
    with pytest.raises(UserError, match=rf"{re.escape(name)} is a link, which is not followed; remove it, or choose"):
        tiny.train(tree, tmp_path / "run")
    assert kept.read_text() == "mine\n"
    assert not (tmp_path / "nowhere.txt").exists()


@pytest.mark.parametrize("name", ["stdout.txt", files.MARK])
def test_a_log_that_is_no_plain_file_is_refused(name, tree, tmp_path):
    """Opening a FIFO to write waits for a reader for ever."""
    os.mkfifo(tmp_path / name)
    with pytest.raises(UserError, match=rf"{re.escape(name)} is no plain file; remove it"):
        tiny.train(tree, tmp_path)


# ------------------------------------------------------------------------------------------------- 0 means never


@pytest.mark.parametrize("field", ["log_freq", "eval_freq", "snapshot_freq", "snapshot_freq_for_preemption"])
def test_a_frequency_of_0_is_never(field, tree, whole, tmp_path):
    """The last step is saved all the same, as checkpoint_1 where no other is numbered; training is not changed."""
    tree.training[field] = 0
    tiny.train(tree, tmp_path)
    steps = {
        "log_freq": r"step: \d+, training_loss",
        "eval_freq": r"step: \d+, eval_loss",
        "snapshot_freq": r"samples of step (?!12 )",
        "snapshot_freq_for_preemption": r"never written",
    }
    assert not re.search(steps[field], (tmp_path / "stdout.txt").read_text())
    names = {name for name in results(tmp_path) if name.startswith("checkpoints")}
    numbered = {"checkpoints/checkpoint_1.pth", "checkpoints/checkpoint_2.pth"}
    expected = {"checkpoints/checkpoint_1.pth"} if field == "snapshot_freq" else numbered
    assert names == {str(META), *expected}
    last = "checkpoint_1" if field == "snapshot_freq" else "checkpoint_2"
    mine, theirs = (read_checkpoint(path) for path in (tmp_path / f"checkpoints/{last}.pth", whole / META))
    assert all(tiny.same(mine[part], theirs[part]) for part in ("model", "ema", "step"))


def test_without_losses_on_test_images_none_are_needed(tree, tmp_path, monkeypatch):
    load = training.datasets.load
    splits = []
    monkeypatch.setattr(training.datasets, "load", lambda *a, **k: splits.append(k["split"]) or load(*a, **k))
    tree.training.eval_freq, tree.data.test_dataset = 0, "nowhere"
    tiny.train(tree, tmp_path)
    assert splits == ["train"]


# ---------------------------------------------------------------------------------------------- which test images


@pytest.mark.parametrize(("count", "held"), [(1, 0), (19, 0), (20, 2), (105, 10), (10_000, 1000), (1_000_000, 1000)])
def test_a_share_is_held_back_evenly(count, held):
    rows = held_back(count)
    assert len(rows) == held
    if held:
        assert 0 <= rows[0] < rows[-1] < count
        gaps = rows.diff()
        assert gaps.max() - gaps.min() <= 1
        assert abs(rows[0].item() - (count - 1 - rows[-1].item())) <= 1


def divided(tree, tmp_path):
    """The images that training and its loss see, and evaluation; as sets of bytes."""
    trainer = training.Trainer(tree, tmp_path, tiny.CPU, "./data")
    sets = [trainer.batches(split).images for split in ("train", "test")]
    sets += [trainer.images(split) for split in ("train", "test")]
    return [[image.numpy().tobytes() for image in images.read(0, len(images))] for images in sets]


def test_images_of_ones_own_are_divided(tmp_path, monkeypatch, capsys):
    """They are loaded once for both parts."""
    loaded, load = [], training.datasets.load
    monkeypatch.setattr(
        training.datasets, "load", lambda *args, **options: loaded.append(args) or load(*args, **options)
    )
    tree = tiny.config(data__dataset=str(tiny.write_pictures(tmp_path / "mine.npz", 40)))
    train, test, evaluated_train, evaluated_test = divided(tree, tmp_path)
    assert (len(train), len(test)) == (36, 4)
    assert not set(train) & set(test)
    assert {*train, *test} == {image.tobytes() for image in tiny.pictures(40)}
    assert (evaluated_train, evaluated_test) == (train, test)
    assert len(loaded) == 2, "by training and by an evaluation"
    line = "'mine': 4 of the 40 images are held back from training for the test loss; config.data.test_dataset names "
    assert capsys.readouterr().out.count(line) == 1


def test_a_folder_too_large_for_memory_is_divided_alike(tmp_path, monkeypatch):
    folder = tmp_path / "mine"
    folder.mkdir()
    for number, image in enumerate(tiny.pictures(30)):
        Image.fromarray(image).save(folder / f"{number:02}.png")
    tree = tiny.config(data__dataset=str(folder), training__batch_size=27)
    inside = divided(tree, tmp_path)
    monkeypatch.setattr("basics.image_sets.IN_MEMORY_BYTES", 100)
    assert divided(tree, tmp_path) == inside
    assert [len(images) for images in inside] == [27, 3, 27, 3]
    batches = training.Trainer(tree, tmp_path, tiny.CPU, "./data").batches("train")
    seen = ((batches.batch(0) + 1) * 127.5).round().to(torch.uint8)
    plain = {*inside[0], *(np.frombuffer(x, np.uint8).reshape(8, 8)[:, ::-1].tobytes() for x in inside[0])}
    assert {image.numpy().tobytes() for image in seen} <= plain


def test_test_images_can_be_named(tmp_path, capsys):
    tree = tiny.config(
        data__dataset=str(tiny.write_pictures(tmp_path / "mine.npz", 40)),
        data__test_dataset=str(tiny.write_pictures(tmp_path / "others.npz", 7, seed=5)),
    )
    train, test, _, evaluated = divided(tree, tmp_path)
    assert set(train) == {image.tobytes() for image in tiny.pictures(40)}
    assert test == evaluated == [image.tobytes() for image in tiny.pictures(7, seed=5)]
    assert capsys.readouterr().out == ""


def test_a_named_set_keeps_its_own_split(tmp_path, monkeypatch, capsys):
    asked, load = [], training.datasets.load
    path = str(tiny.write_pictures(tmp_path / "any.npz", 40))
    stand_in = lambda source, **options: asked.append((source, options["split"])) or load(path, **options)
    monkeypatch.setattr(training.datasets, "load", stand_in)
    assert [len(images) for images in divided(tiny.config(), tmp_path)] == [40] * 4
    assert asked == [("FASHION_MNIST", split) for split in ("train", "test")] * 2
    assert capsys.readouterr().out == ""


def test_few_images_are_not_divided_and_it_is_told(tmp_path, capsys):
    tree = tiny.config(data__dataset=str(tiny.write_pictures(tmp_path / "few.npz", 19)))
    assert [len(images) for images in divided(tree, tmp_path)] == [19] * 4
    assert "'few': 19 images are too few to hold some back, so the test loss is of the training" in (
        capsys.readouterr().out
    )


# ------------------------------------------------------------------------------------------ one training a folder


def test_two_trainings_in_one_folder(tree, data, tmp_path):
    """The second is refused while the first one writes, and loses nothing; then it goes on."""
    step = training.Trainer.train_step

    def second(self, x):
        if self.state.step == 4:
            command = "import sys, tiny; from basics import console; console.guard(lambda _: tiny.train(tiny.config("
            command += "data__dataset=sys.argv[1], model__dropout=0.1), sys.argv[2]), None)"
            outcomes.append(tiny.command("-c", command, data, tmp_path))
        return step(self, x)

    outcomes = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training.Trainer, "train_step", second)
        tiny.train(tree, tmp_path)
    ((code, _, err),) = outcomes
    assert code == 2
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert re.search(rf"{tmp_path} is being written to by .*process {os.getpid()}.*; wait until it ends", errors[0])
    assert results(tmp_path).keys() == WRITTEN


def test_a_training_that_ended_meanwhile_is_not_overwritten(tree, whole, tmp_path, monkeypatch):
    """The checkpoint changed between reading it and owning the folder."""
    owned = files.owned

    def late(folder):
        shutil.copytree(whole, folder, dirs_exist_ok=True)
        return owned(folder)

    monkeypatch.setattr(files, "owned", late)
    with pytest.raises(UserError, match=r"another run trained in .* just now; start this one again"):
        tiny.train(tree, tmp_path)
    assert tiny.same(results(tmp_path), results(whole))
