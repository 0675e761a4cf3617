"""benchmarks/speed.py: each part at the smallest size, what its table holds, and whose clock and memory it reads."""

import argparse

import pytest
import torch
from helpers import load_config
from tiny import config, write_checkpoint, write_pictures

from basics.console import UserError
from benchmarks import machine, speed

COMPARED = "part, version, precision, ms, spread, evaluations/s, images/s, GFLOP/s, share, rate, first s, GB"
TABLES = {  # part -> columns, and the second column's entries
    "evaluation": (COMPARED, ["plain", "ours", "ours-bf16"]),
    "training": (COMPARED, ["plain", "ours", "ours-bf16"]),
    "reconstruction": (COMPARED, ["plain", "ours", "ours-bf16"]),
    "fast": (COMPARED, ["ours", "ours-bf16"]),
    "likelihood": ("part, version, seconds, spread, bits/dim, evaluations, rate", ["plain", "ours"]),
    "noise": ("part, draws, ms, spread, of the network", ["keyed", "global"]),
    "resampling": ("part, filter, channels, from, to, plain ms, ours ms, rate", ["down", "up"]),
    "growth": (
        "part, of, number, seconds, of proportion",
        [name for name in ("images", "steps", "repetitions", "pixels") for _ in range(4)],
    ),
}
IN_TURNS = machine.in_turns
RATES = {"fp32": 1e9, "tf32": 2e9, "bf16": 4e9}


def here(build, versions, arguments, rounds):
    """As `machine.in_turns`, in this process."""
    clock = machine.clock()
    calls = {version: build(version, *arguments) for version in versions}
    return {name: ([clock.seconds(call) for _ in range(rounds + 1)], clock.peak()) for name, call in calls.items()}


@pytest.fixture
def path(tmp_path):
    """The tiny config's file."""
    (tmp_path / "config.py").write_text("from tiny import config as get_config")
    return str(tmp_path / "config.py")


@pytest.fixture
def options(path, tmp_path, monkeypatch):
    """The command's, at the least size on the CPU, everything in this process."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(machine, "in_turns", here)
    monkeypatch.setattr(speed, "matrix_rate", lambda clock, precision: RATES[precision])
    monkeypatch.setattr(speed, "keep_freed_memory", lambda: None)
    monkeypatch.setattr(speed, "SHAPES", [(3, 8)])
    files = {"ckpt_path": write_checkpoint(tmp_path / "a.pth"), "images": write_pictures(tmp_path / "a.npz", 5)}
    sizes = {"batch_size": 2, "steps": 2, "rounds": 1}
    return argparse.Namespace(config=path, versions="plain,ours,ours-bf16", **files, **sizes)


@pytest.mark.parametrize("name", ["batch_size", "steps", "rounds"])
@pytest.mark.parametrize("value", ["0", "-1", "2.5", "many"])
def test_numbers_that_measure_nothing_are_refused(name, value, capsys):
    with pytest.raises(SystemExit) as exit_:
        speed.main([f"--{name}={value}"])
    assert exit_.value.code == 2
    assert f"argument --{name}: '{value}' is no whole number from 1 on" in capsys.readouterr().err


def test_a_config_that_is_not_there(options):
    with pytest.raises(UserError, match="no config can be read"):
        speed.main(["--config", "nowhere.py", "--parts", "evaluation"])


def test_every_part_is_tested():
    assert TABLES.keys() == speed.PARTS.keys()


@pytest.mark.parametrize("part", TABLES)
def test_every_part_has_its_rows_and_columns(part, options):
    rows = list(speed.PARTS[part](options, machine.clock()))
    columns, entries = TABLES[part]
    assert {", ".join(row) for row in rows} == {columns}
    assert [list(row.values())[:2] for row in rows] == [[part, entry] for entry in entries]


@pytest.mark.parametrize(
    ("part", "steps", "evaluations", "per_image"),
    [("evaluation", 1, 1, 1), ("training", 1, 1, 1), ("reconstruction", 2, 2, 1000), ("fast", 1, 20, 20)],
)
def test_figures_are_those_of_the_median(part, steps, evaluations, per_image, options, monkeypatch):
    """Of the seconds after the warm-up; two images, and the plain version twice as slow."""
    seconds = {"plain": [9.0, 8.0, 4.0, 2.0], "ours": [7.0, 4.0, 2.0, 1.0], "ours-bf16": [7.0, 4.0, 2.0, 1.0]}
    monkeypatch.setattr(machine, "in_turns", lambda build, versions, *_: {v: (seconds[v], 3e9) for v in versions})
    row = {row["version"]: row for row in speed.PARTS[part](options, machine.clock())}["ours"]
    work = 2 * evaluations * speed.operations(config(), part == "training")
    expected = {"ms": 2000 / steps, "evaluations/s": evaluations, "images/s": evaluations / per_image}
    expected |= {"GFLOP/s": work / 2e9, "share": work / 2e9, "first s": 7.0, "GB": 3.0}
    assert {name: row[name] for name in expected} == pytest.approx(expected)
    assert row["spread"] == f"{1000 // steps}-{4000 // steps}"
    assert row["rate"] == (None if part == "fast" else 2.0)


def test_operations_are_those_of_the_plain_training_step():
    x = speed.images(config(), 3)
    step = speed.plain_training(config(), x, 1)
    assert machine.flops(step) == 3 * speed.operations(config(), True)


def test_another_sde_has_ours_alone_and_its_corrector_counts(options):
    path = "ve/cifar10_ncsnpp_continuous.py"
    ours = [name for name in speed.VERSIONS if name != "plain"]
    assert [name for name in speed.VERSIONS if speed._has(name, "training", load_config(path))] == ours
    assert speed.amounts("reconstruction", options, load_config(path)) == (2, 4, 2000)


def test_command_prints_what_it_measured_in_processes_of_their_own(path, monkeypatch, capsys):
    monkeypatch.setattr(speed, "keep_freed_memory", lambda: None)
    monkeypatch.setattr(speed, "matrix_rate", lambda clock, precision: RATES[precision])
    speed.main([f"--config={path}", "--batch_size=2", "--parts=evaluation,noise", "--rounds=1"])
    first, evaluation, rate, heading, plainly, ours, second, keyed, _ = capsys.readouterr().out.splitlines()
    assert first == f"{path}, batch 2; {machine.clock().describe()}"
    assert evaluation == f"an evaluation of an image: {speed.operations(config(), False) / 1e9:.3f} GFLOP"
    assert rate == "fp32 matrix product: 1 GFLOP/s"
    assert heading.split() == COMPARED.replace(",", "").split()
    assert [line.split()[1] for line in (plainly, ours, second, keyed)] == ["plain", "ours", "draws", "keyed"]
    assert len({len(line) for line in (heading, plainly, ours)}) == 1


def test_failing_process_ends_the_command(options):
    with pytest.raises(RuntimeError, match="a process of the benchmark failed"):
        IN_TURNS(speed.call_of, ["ours"], ("no such part", options), 1)


@pytest.mark.parametrize("flag", ["--parts=evaluation,speed", "--versions=theirs", "--versions=ours-tf32"])
def test_unknown_names_are_refused(flag, options):
    with pytest.raises(UserError):
        speed.main([flag])


class Event:
    """In place of a GPU's: notes what happens in its time, and lies 5 ms before the next."""

    log = []

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.log.append("event")

    def elapsed_time(self, later):
        return 5.0


def test_gpu_is_timed_by_its_events_and_measured_by_its_allocator(options, monkeypatch):
    """With stand-ins for torch.cuda: nothing of the CPU's clock, resident set or name is in a row."""
    with monkeypatch.context() as patch:  # for this alone: Adam would believe it, too
        patch.setattr(torch.cuda, "is_available", lambda: True)
        clock = machine.clock()
    assert clock.device == torch.device("cuda")
    monkeypatch.setattr(machine.GpuClock, "device", torch.device("cpu"))
    monkeypatch.setattr(machine, "clock", lambda: clock)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: Event.log.append("wait"))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 7e9)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(machine, "time", None)
    monkeypatch.setattr(machine, "resource", None)
    clock.seconds(lambda: Event.log.append("call"))
    assert Event.log == ["wait", "event", "call", "event", "wait"]
    assert clock.describe() == f"a GPU, torch {torch.__version__}"
    options.versions = "plain,ours-tf32,ours-bf16"
    for row, precision in zip(speed.compare("training", options, clock), ("fp32", "tf32", "bf16"), strict=True):
        assert (row["ms"], row["spread"], row["GB"], row["precision"]) == (5.0, "5-5", 7.0, precision)
        assert row["share"] == pytest.approx(row["GFLOP/s"] * 1e9 / RATES[precision])
    assert next(speed.keyed_noise(options, clock))["ms"] == 5.0


@pytest.mark.parametrize(
    ("precision", "dtype"), [("fp32", torch.float32), ("tf32", torch.float32), ("bf16", torch.bfloat16)]
)
def test_matrix_rate_is_of_the_precision(precision, dtype, monkeypatch):
    class Clock(machine.CpuClock):
        matrix_size = 4

        def seconds(self, call):
            assert call().dtype == dtype
            assert torch.backends.cuda.matmul.allow_tf32 == (precision == "tf32")
            return 2.0

    assert machine.matrix_rate(Clock(), precision, 0.01) == 2 * 4**3 / 2.0
