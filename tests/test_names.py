"""Names that a terminal would obey, a console cannot print or a picture takes for a formula: the commands work."""

import csv
import json
import os
from pathlib import Path

import pytest
import tiny
from helpers import ROOT
from PIL import Image

from basics import files
from lmd import training_log
from storage.results_folder import ResultsFolder
from storage.scores import read_results
from storage.tables import write_csv

COMMANDS = "main", "recon", "detect"
NAMES = {  # what it is -> the name as bytes; the encoding of the console; how the console shows it
    "no UTF-8, terminal codes, half a formula": (b"caf\xe9\x1b[31m $x_", "utf-8", r"caf\xe9\x1b[31m $x_"),
    "beyond ASCII, a spreadsheet's formula": ("=é$\\frac$".encode(), "ascii", r"=\xe9$\frac$"),
    "beyond the letters, quotes, a line break, another direction": (
        '\N{PARTY POPPER}é\'s \n"x" \u202e`y`'.encode(),
        "latin-1",
        r"""\U0001f389é's \n"x" \u202e`y`""",
    ),
}


def folders(parent, name):
    """A folder called `name` with images of two sides, also called so, each with a file that is no image."""
    folder = parent / os.fsdecode(name)
    for side, seed in (("near", 0), ("far", 1)):
        images = folder / f"{os.fsdecode(name)}{side}"
        images.mkdir(parents=True)
        for number, picture in enumerate(tiny.pictures(4, seed)):
            Image.fromarray(picture).save((images / f"{os.fsdecode(name)}{number}.bmp").open("wb"), "BMP")
        (images / f"{os.fsdecode(name)} bad.bmp").write_text("no image")
    return folder


def commands(folder, name):
    """Training, reconstruction and scoring within the folder, with the name wherever there may be one."""
    config = tiny.config_flags(training__n_iters=2, training__snapshot_freq=2, model__num_scales=2)
    config[0] = f"--config={ROOT / tiny.CONFIG_FILE}"
    work, tag = folder / "work", os.fsdecode(name)
    near, far = folder / f"{tag}near", folder / f"{tag}far"
    return {
        "main": ["--mode=train", *config, f"--config.data.dataset={near}", f"--workdir={work}"],
        "recon": [
            *config, f"--ckpt_path={work}/checkpoints/checkpoint_1.pth", f"--in_domain={near}",
            f"--out_of_domain={far}", f"--workdir={folder}", f"--mask_identifier={tag}", "--save_mask",
        ],
        "detect": [f"--result_path={folder / f'center_{tag}_reps1'}", "--metric=MSE"],
    }  # fmt: skip


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """Name -> its folder, and command -> exit code, standard output, standard error."""
    made, rows = {}, []
    for what, (name, encoding, _) in NAMES.items():
        made[what] = folders(tmp_path_factory.mktemp("names"), name)
        for command, words in commands(made[what], name).items():
            rows.append([command, [*words, "--device=cpu"], made[what].parent, encoding])
    done = iter(tiny.forked(rows, tmp_path_factory.mktemp("table")))
    return {what: (made[what], {command: next(done) for command in COMMANDS}) for what in NAMES}


@pytest.mark.parametrize("what", NAMES)
def test_every_name_works_in_every_command(what, outcomes):
    folder, done = outcomes[what]
    shown = NAMES[what][2]
    for command, (code, out, err) in done.items():
        assert code == 0, err
        assert "Traceback" not in err, err
        assert "\x1b" not in out + err.replace("\x1b[A", ""), command  # tqdm goes up a line
        assert "\u202e" not in out + err
        assert shown in out, command
    assert done["main"][1].splitlines()[-1].startswith("trained: ")
    assert shown in done["main"][2]  # the file that was left out
    log = (folder / "work" / "stdout.txt").read_text(encoding="utf-8")
    assert "training_loss" in log
    assert "\x1b" not in log
    results = folder / f"center_{os.fsdecode(NAMES[what][0])}_reps1"
    pictures = ["histogram_MSE.png", "pictures_MSE.png", "roc_MSE.png"]
    assert sorted(path.name for path in results.glob("*_MSE.png")) == pictures
    assert read_results(results)["images"] == {"pos": 4, "neg": 4}
    assert ResultsFolder(results).manifest()["sides"]["pos"]["dataset"].endswith(f"{os.fsdecode(NAMES[what][0])}near")


def test_a_folder_that_tensorboard_cannot_write_to_is_told(outcomes):
    told = ["warning: TensorBoard cannot write below" in done["main"][2] for _, done in outcomes.values()]
    assert told == [True, False, False]


def test_the_log_of_a_training_takes_any_line(tmp_path, capsys):
    (tmp_path / os.fsdecode(b"\xe9")).mkdir()
    log = training_log.Log(tmp_path / os.fsdecode(b"\xe9"), 0)
    log.line("a\x1b[31mb \udce9 \N{PARTY POPPER}")
    log.scalar("loss", 1.0, 3)
    log.close()
    text = (tmp_path / os.fsdecode(b"\xe9") / "stdout.txt").read_text(encoding="utf-8")
    assert "a\\x1b[31mb \\xe9 \N{PARTY POPPER}\n" in text
    assert "step: 3, loss: 1.00000e+00\n" in text


def test_files_with_any_name_in_them(tmp_path):
    """Text files are UTF-8 whatever is in them; JSON gives names back exactly."""
    files.write_text(tmp_path / "text", "caf\udce9 é")
    assert (tmp_path / "text").read_bytes() == b"caf\\udce9 \xc3\xa9"
    files.write_json(tmp_path / "json", {"name": "caf\udce9 é \x1b"})
    assert json.loads((tmp_path / "json").read_text(encoding="ascii")) == {"name": "caf\udce9 é \x1b"}


FORMULAS = ["=1+1", "+1+cmd", "-1+cmd|' /C calc'!A0", "@SUM(1)", "\t=1", "\r=1"]


def test_a_table_never_holds_a_formula(tmp_path):
    numbers = [-0.5, "-0.5", "-1e-05", "-inf", 3, "+2"]
    harmless = ["name", "a=b", "1-2", ""]
    write_csv(tmp_path / "t.csv", ["x", "=y"], [[*FORMULAS], [*numbers], [*harmless], ['\udce9,\n"']])
    with Path(tmp_path / "t.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    assert rows[1] == [*(f"'{formula}" for formula in FORMULAS[:4]), r"\t=1", r"\r=1"]
    assert rows[2] == [str(number) for number in numbers]
    assert rows[3] == harmless
    assert rows[4] == ['\\xe9,\\n"']
