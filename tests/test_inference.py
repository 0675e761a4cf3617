"""The engine of reconstruction: precision, compilation, background threads, and going on with less memory."""

import contextlib
import threading
import types
import weakref

import pytest
import tiny
import torch
from helpers import small
from tiny import CPU, SIZE

import metrics.mse
import models
import sde_lib
from basics.background import Background
from basics.console import UserError
from lmd import distances, evaluation
from lmd.process import PRESETS
from lmd.reconstructor import Reconstructor
from models import inference, layers, memory
from models.score import ScoreModel
from storage.results_folder import ResultsFolder


@pytest.fixture
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


GPU = torch.device("cuda")


def test_what_precisions_come_to(monkeypatch):
    """The manifest records this, so that a GPU does not continue in bfloat16 what a CPU began in float32."""
    assert [inference.resolve(name, CPU) for name in ("fp32", "bf16", "auto")] == ["fp32", "bf16", "fp32"]
    asked = []
    monkeypatch.setattr(torch.cuda, "device", lambda device: asked.append(device) or contextlib.nullcontext())
    for able, auto in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, able=able: able)
        monkeypatch.setattr(torch.cuda, "is_tf32_supported", lambda able=able: able)
        assert inference.resolve("auto", GPU) == auto
        assert inference.has_tf32(GPU) == able
    assert asked == [GPU] * 4, "torch answers for the current GPU, which may be another"
    assert not inference.has_tf32(CPU)
    with pytest.raises(UserError, match="tf32 is arithmetic of newer GPUs, which cuda does not have; use --precision"):
        inference.resolve("tf32", GPU)
    with pytest.raises(UserError, match="tf32 is arithmetic of newer GPUs, which cpu does not have; use --precision"):
        inference.resolve("tf32", CPU)


def switches():
    """torch's two: whether float32 convolutions and matrix products may be in TF32."""
    return torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32


def test_float32_is_float32_wherever_it_is_computed(network, monkeypatch):
    """torch's own convolutions on a GPU are in TF32, which is 1.3e-3 off; nothing changes outside."""
    before = switches()
    for precision, expected in (("fp32", False), ("tf32", True), ("bf16", False)):
        with inference.arithmetic(precision):
            assert switches() == (expected, expected)
            with inference.arithmetic("fp32"):
                assert switches() == (False, False)
            assert switches() == (expected, expected)
        assert switches() == before
    seen, forward = [], type(network).forward

    def watched(self, x, labels):
        seen.append((switches(), torch.is_autocast_enabled("cpu")))
        return forward(self, x, labels)

    monkeypatch.setattr(type(network), "forward", watched)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    for precision in ("fp32", "bf16"):
        inference.prepare(network, CPU, precision)(images(), LABELS)
    assert seen == [((False, False), False)] * 2


def test_distances_losses_and_training_say_what_they_compute_in(monkeypatch, tmp_path, capsys):
    """Distances and evaluation in strict float32, training in what its config says; its first line tells."""
    from lmd import training

    def switched(*arguments):
        seen.append(switches())
        return arguments[0] if arguments else None

    class Tool(metrics.mse.MSE):
        compare = lambda self, orig, recon: switched((orig - recon).square().mean(dim=(1, 2, 3)))

    seen = []
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    distances.distances_of([Tool(CPU)], images(), [images()], CPU)
    monkeypatch.setattr(inference, "has_tf32", lambda device: True)
    step = training.Trainer.train_step
    monkeypatch.setattr(training.Trainer, "train_step", lambda self, x: [step(self, x), switched()][0])
    source = str(tiny.write_pictures(tmp_path / "pictures.npz", 8))
    changes = {"training__n_iters": 1, "training__snapshot_sampling": False, "training__precision": "tf32"}
    tree = tiny.config(data__dataset=source, **changes)
    tiny.train(tree, tmp_path / "run")
    assert ", cpu, tf32" in (tmp_path / "run" / "stdout.txt").read_text()
    monkeypatch.setattr(training.Trainer, "loss_on", lambda self, x, *words: [1.0, switched()][0])
    tree.eval.begin_ckpt = tree.eval.end_ckpt = 0
    evaluation.evaluate(tree, tmp_path / "run", "eval", CPU, "./data")
    assert set(seen[:1] + seen[3:]) == {(False, False)}
    assert seen[1:3] == [(True, True)] * 2


@pytest.mark.parametrize(
    ("device", "compiled", "expected"),
    [
        ("cpu", False, torch.channels_last),
        ("cpu", True, torch.channels_last),
        ("cuda", False, torch.contiguous_format),
        ("cuda", True, torch.channels_last),
    ],
)
def test_layouts(device, compiled, expected):
    """An eager network on a GPU runs NCHW."""
    assert inference.layout(torch.device(device), compiled) == expected


@pytest.mark.parametrize(
    ("choice", "device", "evaluations", "operations", "expected"),
    [
        ("auto", CPU, 10**9, 12.04e9, False),
        ("auto", GPU, 290_000, 12.04e9, False),
        ("auto", GPU, 300_000, 12.04e9, True),
        ("auto", GPU, 512_000, 0.494e9, False),  # a small network: it would be done before it is compiled
        ("on", CPU, 1, 12.04e9, True),
        ("on", GPU, 0, 12.04e9, False),  # nothing is left to be made
        ("off", GPU, 10**9, 12.04e9, False),
    ],
)
def test_what_is_compiled(choice, device, evaluations, operations, expected):
    network = types.SimpleNamespace(device=device, operations=lambda shape: operations)
    assert inference.worth_compiling(choice, network, evaluations, (3, 32, 32)) == expected


def test_operations_are_counted_for_one_image(network):
    """More than the multiplications and additions of the last convolution, and all of one image."""
    prepared = inference.prepare(network, CPU)
    last = [m for m in network.modules() if isinstance(m, torch.nn.Conv2d)][-1].weight
    pixels = images()[0, 0].numel()
    assert prepared.operations(images().shape[1:]) > 2 * last.numel() * pixels > 0


def test_an_unknown_choice_is_told_before_any_work(tmp_path):
    for options, message in (
        ({"compiled": "maybe"}, r"unknown choice \(--compile\) 'maybe'; choose one of: auto, on, off"),
        ({"precision": "fp16"}, "unknown precision"),
        ({"precision": "tf32"}, "which cpu does not have"),
        ({"memory_gb": float("nan")}, "--memory_gb must be a number above 0, not nan"),
        ({"memory_gb": float("inf")}, "--memory_gb must be a number above 0, not inf"),
        ({"memory_gb": 0.0}, "--memory_gb must be a number above 0, not 0"),
    ):
        with pytest.raises(UserError, match=message):
            tiny.reconstruct(tmp_path / "run", tmp_path / "none.pth", {"pos": "none"}, **options)
    assert not (tmp_path / "run").exists()


def test_the_missing_evaluations_are_counted(monkeypatch, tmp_path, capsys):
    """9 images in batches of 4, 2 repetitions, 3 steps; when one batch is there, those of the others."""
    counted, checkpoint = [], tiny.write_checkpoint(tmp_path / "checkpoint.pth")
    count = lambda choice, network, evaluations, shape: counted.append((choice, evaluations))
    monkeypatch.setattr(inference, "worth_compiling", count)
    source = tiny.write_pictures(tmp_path / "squares.npz", 9)
    folder = tiny.reconstruct(tmp_path / "run", checkpoint, {"pos": source})
    (folder / "pos" / "batch_1.pth").unlink()
    tiny.reconstruct(tmp_path / "run", checkpoint, {"pos": source}, compiled="on")
    tiny.reconstruct(tmp_path / "run", checkpoint, {"pos": source})  # nothing is missing
    assert counted == [("auto", 9 * 2 * 3), ("on", 4 * 2 * 3)]


def test_run_records_what_auto_came_to(tmp_path):
    checkpoint, source = tiny.write_checkpoint(tmp_path / "c.pth"), tiny.write_pictures(tmp_path / "squares.npz", 2)
    for precision in ("auto", "bf16"):
        folder = tiny.reconstruct(tmp_path / precision, checkpoint, {"pos": source}, precision=precision)
        recorded = ResultsFolder(folder).manifest()["settings"]["precision"]
        assert recorded == {"auto": "fp32", "bf16": "bf16"}[precision]


@torch.no_grad()
def test_a_compiled_network_gives_the_same():
    """One level of residual and attention blocks: compiling takes seconds for each further one."""
    network = models.create_model(small("subvp/cifar10_ddpm_continuous.py", ch_mult=(1,), attn_resolutions=(16,)))
    tiny.randomise(network)
    compiled = inference.prepare(network, CPU, compiled=True)
    torch.testing.assert_close(compiled(images(), LABELS), network(images(), LABELS), rtol=1e-3, atol=1e-4)


def test_a_compiled_network_is_compiled_for_images_not_for_calls(network, monkeypatch):
    """Neither other batch sizes nor one label for all, nor who watches it compile it anew; derivatives are the same."""
    from torch._dynamo.testing import CompileCounterWithBackend

    counter, compile_ = CompileCounterWithBackend("eager"), torch.compile
    monkeypatch.setattr(torch, "compile", lambda net, mode: compile_(net, backend=counter))
    prepared, seen, generator = inference.prepare(network, CPU, compiled=True), [], torch.Generator().manual_seed(0)
    for count in (2, 3, 5):
        x = torch.randn(count, *images().shape[1:], generator=generator)
        for labels in (LABELS[:1], LABELS[:1].expand(count)):
            with prepared.watched(lambda images: seen.append(images)), torch.no_grad():
                torch.testing.assert_close(prepared(x, labels), network(x, labels))
    assert seen == [2, 2, 3, 3, 5, 5]
    compiled = counter.frame_count
    assert compiled <= 2  # for two images, then for any number of them
    x = images().requires_grad_()
    gradients = [torch.autograd.grad(net(x, LABELS).square().sum(), x)[0] for net in (prepared, network)]
    torch.testing.assert_close(*gradients)
    assert counter.frame_count == compiled


def test_what_cannot_be_prepared_is_told(network, monkeypatch, capsys):
    from torch._dynamo.exc import TorchDynamoException

    with pytest.raises(UserError, match=r"unknown precision .*'fp16'; choose one of: fp32, tf32, bf16, auto"):
        inference.prepare(network, CPU, "fp16")

    def broken(*arguments):
        raise TorchDynamoException("no C++ compiler found\nand much more")

    monkeypatch.setattr(torch, "compile", lambda net, mode: broken)
    with pytest.raises(UserError, match=r"cannot be compiled here \(no C\+\+ compiler found\); leave --compile out"):
        inference.prepare(network, CPU, compiled=True)(images(), LABELS)
    prepared = inference.prepare(network, CPU)
    expected = prepared(images(), LABELS)
    prepared.compile(required=False)  # nobody asked for it: it goes on without
    assert torch.equal(prepared(images(), LABELS), expected)
    assert torch.equal(prepared(images(), LABELS), expected)
    assert capsys.readouterr().err.count("cannot be compiled here (no C++ compiler found); going on without") == 1


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

    with Background() as background:
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
        with Background() as background:
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

    write = ResultsFolder.write_batch

    def full(folder, side, index, *tensors):
        if index == 1:
            raise UserError("cannot write: no space left on device")
        write(folder, side, index, *tensors)

    with monkeypatch.context() as patched:
        patched.setattr(ResultsFolder, "write_batch", full)
        with pytest.raises(UserError, match="no space left"):
            tiny.reconstruct(tmp_path / "two" / "again", checkpoint, {"pos": source})
    again = tiny.reconstruct(tmp_path / "two" / "again", checkpoint, {"pos": source})
    for path in sorted(whole.glob("pos/*")):
        assert tiny.same(torch.load(path), torch.load(again / "pos" / path.name))


# --------------------------------------------------------------------------------------------------------- memory


def reconstructor(limit, corrector="none"):
    """A reconstructor on a device that runs out of memory beyond `limit` trajectories, and the sizes that it tried."""
    config = tiny.config(sampling__corrector=corrector, model__num_scales=4 if corrector == "none" else 24)
    net = models.create_model(config)
    tiny.randomise(net)
    tried = []

    def limited(x, labels):
        tried.append(len(x))
        if len(x) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return net(x, labels)

    model = ScoreModel(limited, sde_lib.create_sde(config))
    return Reconstructor(config, model, CPU, rows=8), tried


@torch.no_grad()
def test_out_of_memory_halves_the_trajectories_and_changes_nothing():
    pixels = torch.from_numpy(tiny.pictures(5))[:, None]
    enough, _ = reconstructor(limit=100)
    scarce, tried = reconstructor(limit=3)
    expected = tiny.inpainted(enough, pixels)
    torch.testing.assert_close(tiny.inpainted(scarce, pixels), expected, rtol=0, atol=1e-4)
    assert tried[:2] == [8, 4]
    assert set(tried[2:]) == {2}
    bold, tried = reconstructor(limit=3)
    bold.rows = 10**6  # 10 of which there are
    torch.testing.assert_close(tiny.inpainted(bold, pixels), expected, rtol=0, atol=1e-4)
    assert tried[:2] == [10, 5]
    assert set(tried[2:]) == {2}


FAILURES = {
    "GPU": (torch.OutOfMemoryError, "CUDA out of memory. Tried to allocate 2.00 GiB"),
    "cuDNN": (RuntimeError, "cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    "cuBLAS": (RuntimeError, "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    "driver": (RuntimeError, "CUDA error: out of memory"),
    "CPU": (RuntimeError, "[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried"),
    "another CPU": (RuntimeError, "DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."),
    "NumPy": (MemoryError, "Unable to allocate 8 GiB"),
}


def failure(name):
    """A new exception of that kind: an old one would hold on to what it went through."""
    kind, text = FAILURES[name]
    return kind(text)


@pytest.mark.parametrize("name", FAILURES)
def test_nothing_of_a_failed_attempt_lives_when_it_is_tried_again(name):
    """Of all forms that running out of memory has; a traceback would keep each tensor of every call it went through."""
    kept, alive, limit = [], [], 3

    def network(x, labels):
        alive.append([reference() is not None for reference in kept])
        activation = x * 2
        if len(x) > limit:
            kept.append(weakref.ref(activation))
            raise failure(name)
        return activation

    reconstruct, _ = reconstructor(limit)
    reconstruct.model = ScoreModel(network, reconstruct.model.sde)
    tiny.inpainted(reconstruct, torch.from_numpy(tiny.pictures(5))[:, None])
    assert len(kept) == 2  # 8 and 4 rows
    assert not any(any(each) for each in alive)


def test_other_errors_are_not_taken_for_it():
    for error in (RuntimeError("mat1 and mat2 must have the same dtype"), ValueError("out of memory"), KeyError("x")):
        assert not memory.ran_out(error)

        def fail(error=error):
            raise error

        with pytest.raises(type(error)):
            memory.attempt(fail)
        with pytest.raises(type(error)), memory.explained(CPU, "for this"):
            fail()
    assert memory.attempt(lambda: 3) == 3


@pytest.mark.parametrize("name", FAILURES)
def test_running_out_of_memory_elsewhere_is_one_line(name, monkeypatch):
    """In training, evaluation and scoring, which all go through this."""
    explained = memory.explained(CPU, "for this; do less")
    with pytest.raises(UserError, match="cpu has too little memory for this; do less"), explained:
        raise failure(name)

    class Tool(metrics.mse.MSE):
        def compare(self, orig, recon):
            raise failure(name)

    with pytest.raises(UserError, match="cpu has too little memory to compare these images; use --device cpu, or one"):
        distances.distances_of([Tool(CPU)], images(), [images()], CPU)


def test_a_training_without_enough_memory_is_one_line(tmp_path):
    fails = (
        "import runpy, sys, torch\nfrom lmd import training\n"
        "def fail(*_): raise torch.OutOfMemoryError('CUDA out of memory')\n"
        "training.Trainer.train_step = fail\nrunpy.run_path('main.py', run_name='__main__')"
    )
    source = tiny.write_pictures(tmp_path / "pictures.npz", 8)
    flags = [*tiny.config_flags(data__dataset=source), f"--workdir={tmp_path / 'run'}", "--mode=train", "--device=cpu"]
    code, _, err = tiny.command("-c", fails, *flags)
    assert code == 2
    assert err.splitlines()[-1] == (
        "error: cpu has too little memory for this training; lower --config.training.batch_size"
    )


class FakeGPU:
    """torch.cuda of a GPU with so many free bytes, on which a row needs `each` and any work `fixed`."""

    def __init__(self, monkeypatch, free, each, fixed=0):
        self.free, self.each, self.fixed, self.peak, self.tried = free, each, fixed, 0, []
        replaced = {
            "mem_get_info": lambda device: (free, free),
            "memory_reserved": lambda device: 5,
            "memory_allocated": lambda device: 5,
            "reset_peak_memory_stats": lambda device: None,
            "max_memory_allocated": lambda device: 5 + self.peak,
            "empty_cache": lambda: None,
        }
        for name, function in replaced.items():
            monkeypatch.setattr(torch.cuda, name, function)

    def work(self, rows):
        self.tried.append(rows)
        self.peak = self.fixed + rows * self.each
        if self.peak > self.free:
            raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize(
    ("free", "each", "fixed", "options", "rows", "tried"),
    [
        (10**9, 10**6, 0, {}, 800, [1, 32]),  # 80 % of what is free
        (10**9, 10**6, 0, {"most": 100}, 100, [1, 32]),
        (10**9, 10**6, 0, {"most": 7}, 7, [1, 7]),
        (10**9, 10**6, 0, {"memory_gb": 0.1}, 100, [1, 25]),  # a budget of one's own
        (10**9, 10**6, 0, {"memory_gb": 5.0}, 1000, [1, 32]),  # which is more than there is
        (10**9, 3 * 10**8, 0, {}, 2, [1, 1]),
        (10**9, 10**9, 0, {}, 1, [1, 1]),  # just one
        (10**9, 10**6, 3.2 * 10**7, {}, 400, [1, 6]),  # what does not grow with the rows is shared by them
    ],
)
def test_rows_are_learned_from_what_few_need(free, each, fixed, options, rows, tried, monkeypatch):
    gpu = FakeGPU(monkeypatch, free, each, fixed)
    found = memory.rows_that_fit(gpu.work, GPU, **{"most": 10**6, **options})
    assert gpu.tried == tried
    assert found == rows if not fixed else 100 < found < 800


def test_a_gpu_that_holds_nothing_is_told(monkeypatch):
    gpu = FakeGPU(monkeypatch, 10**9, 2 * 10**9)
    with pytest.raises(UserError, match=r"cuda has too little memory for one image: 1\.0 GB are free"):
        memory.rows_that_fit(gpu.work, GPU, 10)
    gpu = FakeGPU(monkeypatch, 10**9, 10**8)
    with pytest.raises(UserError, match=r"--memory_gb 0\.05 is too little: one image needs about 0\.100"):
        memory.rows_that_fit(gpu.work, GPU, 10, memory_gb=0.05)


def test_what_is_measured_is_what_is_done(monkeypatch):
    """Two steps of the same process, with lift, constraint and corrector, of as many trajectories as are asked for."""
    reconstruct, tried = reconstructor(limit=100, corrector="langevin")
    works = []
    monkeypatch.setattr(memory, "rows_that_fit", lambda work, device, most, gb: works.append((work, most, gb)) or 6)
    reconstruct.learn_rows(10)
    assert reconstruct.rows == 8  # the CPU's stay
    monkeypatch.setattr(reconstruct, "device", GPU)
    reconstruct.learn_rows(10, 2.0)
    assert reconstruct.rows == 6
    [(work, most, gb)] = works
    assert (most, gb) == (10, 2.0)
    monkeypatch.setattr(reconstruct, "device", CPU)
    work(3)
    assert tried == [3] * 4  # predictor and corrector, twice


def test_too_little_memory_for_anything_is_told():
    pixels = torch.from_numpy(tiny.pictures(5))[:, None]
    for limit, corrector in ((0, "none"), (4, "langevin")):  # Langevin keeps the 5 images together
        tight, _ = reconstructor(limit, corrector)
        remedy = "choose another --device"  # which all commands have
        with pytest.raises(UserError, match=f"too little memory for this batch; {remedy}"):
            tiny.inpainted(tight, pixels)


# -------------------------------------------------------------------------------------------------------- presets


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_from_the_command_line_to_the_scores(name, tmp_path):
    checkpoint = tiny.write_checkpoint(tmp_path / "checkpoint.pth")
    source = tiny.write_pictures(tmp_path / "squares.npz", 4)
    flags = [*tiny.config_flags(), f"--ckpt_path={checkpoint}", f"--in_domain={source}", f"--out_of_domain={source}"]
    flags += ["--mask_type=checkerboard_alt", f"--workdir={tmp_path / 'run'}", f"--sampler={name}"]
    code, out, err = tiny.command("recon.py", *flags)
    assert code == 0, err
    reps = PRESETS[name][1]
    folder = tmp_path / "run" / f"checkerboard_alt_blocks4_reps{reps}"
    assert f"--reps {reps}" in out
    batch = torch.load(folder / "pos" / "batch_0.pth")
    assert len(batch["recon"]) == reps
    known = batch["masked"][0] != 0
    torch.testing.assert_close(batch["recon"][0][known], batch["orig"][known])
    assert batch["recon"][0].shape[-1] == SIZE
