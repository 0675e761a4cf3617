"""benchmarks/gpu.py and benchmarks/levers.py: every trial at the smallest size on the CPU, without a compiler."""

import contextlib
import json
import subprocess

import pytest
import tiny
import torch
import torch.nn.functional as F
from helpers import load_config, small

import losses
import models
import sde_lib
from basics.console import UserError
from benchmarks import gpu, levers, machine
from models import inference
from models.score import ScoreModel


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """The least of a bench, on a CPU that is said to have TF32 and with a compiler that leaves things as they are."""
    (tmp_path / "config.py").write_text("from tiny import config as get_config")
    config, checkpoint = str(tmp_path / "config.py"), tiny.write_checkpoint(tmp_path / "a.pth")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    monkeypatch.setattr(inference, "has_tf32", lambda device: True)
    sizes = {"evaluations": 2, "training": 2, "many": 3, "likelihood": 1, "rounds": 1, "matrix_seconds": 0.01}
    return gpu.Bench(machine.CpuClock(), config, config, ckpt_path=checkpoint, **sizes)


def run(bench, tmp_path, plan=None, seconds=1e6):
    return list(gpu.run(plan or gpu.trials(), bench, tmp_path, seconds))


def in_this_process(command, check, capture_output):
    assert check
    assert capture_output
    if command[1] == "-c":
        exec(command[2], {})


def test_every_trial_has_its_figures(bench, tmp_path, monkeypatch):
    monkeypatch.setattr(subprocess, "run", in_this_process)
    rows = run(bench, tmp_path)
    assert [row for row in rows if "note" in row] == []
    assert [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()] == rows
    expected = {"evaluation": "error", "training": "share", "fast": "images/s", "likelihood": "seconds"}
    for row in rows:
        if column := expected.get(row["part"]):
            assert row[column] > 0 or (column, row["version"]) in {("error", "plain fp32"), ("error", "tf32")}
    errors = {row["version"]: row["error"] for row in rows if row["part"] == "evaluation"}
    assert errors["plain fp32"] < 1e-5  # the same network, written plainly
    assert max(errors.values()) < 0.05  # bfloat16 has 8 bits of mantissa


def test_what_fails_or_does_not_fit_leaves_a_note(bench, tmp_path):
    def broken(bench, trial):
        raise RuntimeError("no such kernel\nand more")

    plan = [
        gpu.Trial("a", "b", 1, broken),
        gpu.Trial("c", "d", 60, broken),
        gpu.Trial("e", "f", 1, lambda *_: {"ms": 1}),
    ]
    notes = [row.get("note") for row in run(bench, tmp_path, plan, seconds=50)]
    assert notes == ["failed: RuntimeError: no such kernel", "left out: takes about 60 s, 50 s are left", None]


def test_a_device_without_tf32_has_no_times_of_it(bench, tmp_path, monkeypatch):
    monkeypatch.setattr(inference, "has_tf32", lambda device: False)
    rows = run(bench, tmp_path, [trial for trial in gpu.trials() if trial.version == "tf32"])
    assert [row["part"] for row in rows] == ["evaluation", "training"]
    for row in rows:
        assert row["note"].startswith("failed: UserError: tf32 is arithmetic of newer GPUs, which cpu does not have")
        assert "ms" not in row


def test_command_rehearses_on_a_cpu_and_says_where_the_rows_are(bench, tmp_path, monkeypatch, capsys):
    with pytest.raises(UserError, match="torch sees no GPU"):
        gpu.main([f"--output={tmp_path / 'out'}"])
    with pytest.raises(UserError, match="no part called 'speed'; there are ceilings, evaluation"):
        gpu.main([f"--output={tmp_path / 'out'}", "--rehearse", "--parts=speed"])
    monkeypatch.setattr(gpu, "rehearsal", lambda clock: bench)
    gpu.main([f"--output={tmp_path / 'out'}", "--rehearse", "--parts=ceilings,fast"])
    table = (tmp_path / "out" / "table.md").read_text().splitlines()
    assert [line.split(" | ")[0] for line in table[4:]] == ["| ceilings", "| fast", "| fast"]
    assert f"as a table: {tmp_path / 'out' / 'table.md'}" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"out holds the rows of an earlier run; give another --output"):
        gpu.main([f"--output={tmp_path / 'out'}", "--rehearse", "--parts=fast"])


def test_a_run_that_is_stopped_leaves_its_table(bench, tmp_path, monkeypatch, capsys):
    def stopped(bench, trial):
        raise KeyboardInterrupt

    plan = [gpu.Trial("a", "b", 1, lambda *_: {"ms": 1}), gpu.Trial("c", "d", 1, stopped)]
    monkeypatch.setattr(gpu, "trials", lambda: plan)
    monkeypatch.setattr(gpu, "rehearsal", lambda clock: bench)
    with pytest.raises(KeyboardInterrupt):
        gpu.main([f"--output={tmp_path}", "--rehearse"])
    assert (tmp_path / "table.md").read_text().splitlines()[-1] == "| a | b | 1.00 |"
    assert [json.loads(line)["part"] for line in (tmp_path / "rows.jsonl").read_text().splitlines()] == ["a"]


def test_a_rehearsal_is_small():
    bench = gpu.rehearsal(machine.CpuClock())
    assert bench.large == bench.small == gpu.SMALL
    assert max(bench.evaluations, bench.training, bench.many) < 4
    assert load_config("subvp/cifar10_ddpm_continuous.py").model.nf == gpu.read_config(gpu.LARGE).model.nf


@pytest.mark.parametrize("shifted", [0, 1, 3])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_plain_form_of_the_fused_normalisation(shifted, dtype, tolerance):
    """Against torch's own; in bfloat16 both round their result to 8 bits."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 8, 4, 4, generator=generator).to(dtype, memory_format=torch.channels_last)
    shift = torch.randn(shifted, 8, generator=generator).to(dtype) if shifted else None
    weight, bias = torch.randn(2, 8, generator=generator).to(dtype)
    given = x.float() if shift is None else x.float() + shift.float()[:, :, None, None]
    expected = F.silu(F.group_norm(given, 2, weight.float(), bias.float(), 1e-6))
    found = levers.norm_swish(x, shift, weight, bias, 2, 1e-6)
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), expected, rtol=tolerance, atol=tolerance)


@torch.no_grad()
def test_fused_normalisations_give_the_same_network(bench):
    net = models.create_model(small("subvp/cifar10_ddpm_continuous.py")).eval()
    tiny.randomise(net)
    x, labels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)), torch.tensor([300.0])
    expected = net(x, labels)
    seen = []
    levers.fuse_norms(net).conv_out.register_forward_pre_hook(lambda module, given: seen.append(given[0].shape))
    torch.testing.assert_close(net(x, labels), expected, rtol=1e-4, atol=1e-5)
    assert seen
    assert all("forward" in vars(module) for module in net.modules() if type(module).__name__ == "NormAct")


def test_captured_training_is_training(bench):
    """On a CPU the step is not captured; it sees new draws each time all the same, and changes the weights."""
    config, x = tiny.config(optim__warmup=0), torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(1)
    step = levers.captured_training(config, x, "fp32")
    torch.manual_seed(1)
    net, sde = models.create_model(config).train(), sde_lib.create_sde(config)
    state, loss = losses.create_state(config, net), losses.create_loss(config, sde)
    for number in (1, 2, 3):
        draws = losses.Draws.keyed(x.shape, sde.N, config.seed, "train", number)
        expected = losses.train_step(state, loss, ScoreModel(net, sde, config.training.continuous), x, draws, config)
        assert step() == pytest.approx(expected.item(), rel=1e-5)


def test_capture_warms_up_aside_and_replays(monkeypatch):
    """With stand-ins for torch.cuda's, which note what happens."""
    log = []

    class Stream:
        wait_stream = lambda self, other: log.append("wait")

    class Graph:
        replay = lambda self: log.append("replay")

    @contextlib.contextmanager
    def within(what):
        log.append(type(what).__name__)
        yield
        log.append("end")

    stands_in = {"Stream": Stream, "current_stream": Stream, "CUDAGraph": Graph, "stream": within, "graph": within}
    for name, value in stands_in.items():
        monkeypatch.setattr(torch.cuda, name, value)
    results = iter("abcdef")
    replay = levers.capture(lambda: log.append("call") or next(results), torch.device("cuda"))
    assert log == ["wait", "Stream", "call", "call", "call", "end", "wait", "Graph", "call", "end"]
    assert [replay(), replay()] == ["d", "d"]
    assert log[-2:] == ["replay", "replay"]
    call = lambda: 1
    assert levers.capture(call, torch.device("cpu")) is call
