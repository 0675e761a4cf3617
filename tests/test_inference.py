"""The engine of reconstruction: precision, compilation, background threads, and going on with less memory."""

import threading

import pytest
import tiny
import torch
from helpers import small
from tiny import CPU, SIZE

import models
import recon
import sampling
import sde_lib
import storage
from console import UserError
from models import inference, layers
from models.score import ScoreModel


@pytest.fixture(scope="module")
def network():
    net = models.create_model(small("subvp/cifar10_ddpm_continuous.py"))
    tiny.randomise(net)
    return net


def images(count=3):
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(1))


LABELS = torch.tensor([400.0])


@torch.no_grad()
def test_precisions(network):
    """bfloat16 has 8 bits of mantissa: about 1 % after some twenty layers.  Results are float32 all the same."""
    expected = network.eval()(images(), LABELS)
    exact = inference.prepare(network, CPU, "fp32")(images(), LABELS)
    # channels-last convolutions sum in another order
    torch.testing.assert_close(exact, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(inference.prepare(network, CPU, "auto")(images(), LABELS), exact)  # no bf16 on a CPU by itself
    reduced = inference.prepare(network, CPU, "bf16")(images(), LABELS)
    assert reduced.dtype == torch.float32
    assert 0 < (reduced - expected).norm() / expected.norm() < 0.03


def test_what_auto_comes_to(monkeypatch):
    """The manifest records this, so that a GPU does not continue in bfloat16 what a CPU began in float32."""
    assert [inference.resolve(name, CPU) for name in ("fp32", "bf16", "auto")] == ["fp32", "bf16", "fp32"]
    for able, expected in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, able=able: able)
        assert inference.resolve("auto", torch.device("cuda")) == expected


@torch.no_grad()
def test_a_compiled_network_gives_the_same(network):
    compiled = inference.prepare(network, CPU, compiled=True)
    torch.testing.assert_close(compiled(images(), LABELS), network(images(), LABELS), rtol=1e-3, atol=1e-4)


def test_what_cannot_be_prepared_is_told(network, monkeypatch):
    from torch._dynamo.exc import TorchDynamoException

    with pytest.raises(UserError, match=r"unknown precision .*'fp16'; choose one of: fp32, bf16, auto"):
        inference.prepare(network, CPU, "fp16")

    def broken(*arguments):
        raise TorchDynamoException("no C++ compiler found\nand much more")

    monkeypatch.setattr(torch, "compile", lambda net, mode: broken)
    with pytest.raises(UserError, match=r"cannot be compiled here \(no C\+\+ compiler found\); leave --compile out"):
        inference.prepare(network, CPU, compiled=True)(images(), LABELS)


@pytest.mark.parametrize("channels", [32, 64])
@pytest.mark.parametrize("edge", [8, 32])
@torch.no_grad()
def test_normalisation_is_the_same_by_either_way(edge, channels):
    """At inference large images go through torch's own group normalisation, small ones through ours."""
    generator = torch.Generator().manual_seed(0)
    norm = layers.NormAct(32, channels, torch.nn.functional.silu)
    norm.weight.uniform_(0.5, 2, generator=generator)
    x = torch.randn(2, channels, edge, edge, generator=generator).contiguous(memory_format=torch.channels_last)
    shift = torch.randn(1, channels, generator=generator)
    kept = x.clone()
    expected = torch.nn.functional.silu(
        torch.nn.functional.group_norm((x + shift[:, :, None, None]).double(), 32, norm.weight.double(), None, norm.eps)
        + norm.bias[:, None, None]
    )
    torch.testing.assert_close(norm(x, shift).double(), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(x, kept)


# ----------------------------------------------------------------------------------------------------- background


def test_background_work_is_done_one_at_a_time_and_waited_for():
    done, release = [], threading.Event()

    def slow():
        release.wait(10)
        done.append("slow")

    with recon.Background() as background:
        background.submit(slow)
        release.set()
        assert background.submit(lambda: "result").result() == "result"
        background.submit(done.append, "last")
    assert done == ["slow", "last"]


def test_a_failure_in_the_background_ends_the_work():
    done = []

    def fail():
        raise UserError("the disk is full")

    def work(*then):
        with recon.Background() as background:
            background.submit(fail)
            for each in then:
                background.submit(done.append, each)

    for then in ((), ("second",)):
        with pytest.raises(UserError, match="the disk is full"):
            work(*then)
    assert done == []


def test_a_full_disk_while_writing_leaves_whole_batches(monkeypatch, tmp_path):
    """The writer's error comes out of the run; a second run makes what is missing."""
    checkpoint = tiny.write_checkpoint(tmp_path / "checkpoint.pth")
    source = tiny.write_pictures(tmp_path / "squares.npz", 9)
    whole = tiny.reconstruct(tmp_path / "one" / "whole", checkpoint, {"pos": source})

    write = storage.ResultsFolder.write_batch

    def full(folder, side, index, *tensors):
        if index == 1:
            raise UserError("cannot write: no space left on device")
        write(folder, side, index, *tensors)

    with monkeypatch.context() as patched:
        patched.setattr(storage.ResultsFolder, "write_batch", full)
        with pytest.raises(UserError, match="no space left"):
            tiny.reconstruct(tmp_path / "two" / "again", checkpoint, {"pos": source})
    again = tiny.reconstruct(tmp_path / "two" / "again", checkpoint, {"pos": source})
    for path in sorted(whole.glob("pos/*")):
        assert tiny.same(torch.load(path), torch.load(again / "pos" / path.name))


# --------------------------------------------------------------------------------------------------------- memory


def reconstructor(limit, corrector="none"):
    """A reconstructor on a device that runs out of memory beyond `limit` trajectories, and the sizes that it tried."""
    config = tiny.config(sampling__corrector=corrector, model__num_scales=4)
    net = models.create_model(config)
    tiny.randomise(net)
    tried = []

    def limited(x, labels):
        tried.append(len(x))
        if len(x) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return net(x, labels)

    model = ScoreModel(limited, sde_lib.create_sde(config))
    mask = recon.MaskOptions("checkerboard_alt")
    return recon.Reconstructor(config, model, mask, 2, 0, CPU, rows=8), tried


@torch.no_grad()
def test_out_of_memory_halves_the_trajectories_and_changes_nothing():
    pixels = torch.from_numpy(tiny.pictures(5))[:, None]
    enough, _ = reconstructor(limit=100)
    scarce, tried = reconstructor(limit=3)
    expected = enough(pixels, 0)
    found = scarce(pixels, 0)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-4)
    assert tried[:2] == [8, 4]
    assert set(tried[2:]) == {2}


def test_too_little_memory_for_anything_is_told():
    pixels = torch.from_numpy(tiny.pictures(5))[:, None]
    for limit, corrector in ((0, "none"), (4, "langevin")):  # Langevin keeps the 5 images together
        tight, _ = reconstructor(limit, corrector)
        with pytest.raises(UserError, match="too little memory for this batch; lower --batch_size"):
            tight(pixels, 0)


# -------------------------------------------------------------------------------------------------------- presets


@pytest.mark.parametrize("name", sampling.PRESETS)
def test_a_preset_from_the_command_line_to_the_scores(name, tmp_path):
    checkpoint = tiny.write_checkpoint(tmp_path / "checkpoint.pth")
    source = tiny.write_pictures(tmp_path / "squares.npz", 4)
    flags = [*tiny.config_flags(), f"--ckpt_path={checkpoint}", f"--in_domain={source}", f"--out_of_domain={source}"]
    flags += ["--mask_type=checkerboard_alt", f"--workdir={tmp_path / 'run'}", f"--sampler={name}"]
    code, out, err = tiny.command("recon.py", *flags)
    assert code == 0, err
    reps = sampling.PRESETS[name][1]
    folder = tmp_path / "run" / f"checkerboard_alt_blocks4_reps{reps}"
    assert f"--reps {reps}" in out
    batch = torch.load(folder / "pos" / "batch_0.pth")
    assert len(batch["recon"]) == reps
    known = batch["masked"][0] != 0
    torch.testing.assert_close(batch["recon"][0][known], batch["orig"][known])
    assert batch["recon"][0].shape[-1] == SIZE
