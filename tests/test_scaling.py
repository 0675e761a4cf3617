"""benchmarks/scaling.py: the figures from known seconds, and the commands that it times."""

import argparse
import subprocess

import pytest
import tiny
from helpers import ROOT

from basics.console import UserError
from benchmarks import machine, scaling


@pytest.fixture
def options(tmp_path):
    (tmp_path / "config.py").write_text("from tiny import config as get_config")
    files = {"config": str(tmp_path / "config.py"), "ckpt_path": tiny.write_checkpoint(tmp_path / "a.pth")}
    sizes = {"training_batch": 2, "steps": 8, "images": 4, "batch_size": 2}
    return argparse.Namespace(processes="1,2", **files, **sizes)


def test_figures_are_of_the_work_without_the_start(options, tmp_path, monkeypatch):
    """A start of 3 s; a step takes 1 s alone, 1.5 s beside another, 2 s shared with it; an image 1, 1.5 and 2 s."""
    seconds = {(1,): 1.0, (1, 1): 1.5, (2,): 2.0}
    clocked = lambda command, options, amount, groups, place: 3 + amount * seconds[tuple(groups)]
    monkeypatch.setattr(scaling, "_seconds", clocked)
    rows = [list(row.values()) for row in scaling.rows(options, tmp_path)]
    assert rows == [
        ["training", 1, 2.0, 2.0, 1.0, 1.0],
        ["training", 2, 2.0, pytest.approx(8 / 3), 0.75, 0.5],
        ["reconstruction", 1, 1.0, 1.0, 1.0, 1.0],
        ["reconstruction", 2, 1.0, pytest.approx(4 / 3), 0.75, 0.5],
    ]
    machine.show(scaling.rows(options, tmp_path))


def test_the_commands_do_what_is_said(options, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests"))  # for the tiny config
    assert scaling._seconds(scaling.training, options, 3, [1], tmp_path / "t") > 0
    assert "step: 3" not in (tmp_path / "t" / "0" / "log.txt").read_text()
    assert (tmp_path / "t" / "0" / "run" / "checkpoints" / "checkpoint_1.pth").is_file()
    assert scaling._seconds(scaling.recon, options, 3, [1], tmp_path / "r") > 0
    assert len(list((tmp_path / "r").glob("0/run/*/pos/batch_*.pth"))) == 2  # three images, two a file


def test_groups_run_under_torchrun_and_a_failure_is_told(options, tmp_path, monkeypatch):
    lines = []

    class Process:
        def __init__(self, line, stdout, stderr):
            stdout.write(b"a config\nthat is not there\n")
            lines.append(line[1:])

        def wait(self):
            return len(lines) - 1  # the first one is well

    monkeypatch.setattr(subprocess, "Popen", Process)
    assert scaling._seconds(scaling.recon, options, 3, [2], tmp_path / "a") > 0
    assert lines[0][:5] == ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "recon.py"]
    with pytest.raises(UserError, match="that was to be timed failed: that is not there"):
        scaling._seconds(scaling.training, options, 3, [1, 1], tmp_path / "b")
    assert lines[1][0] == "main.py"
