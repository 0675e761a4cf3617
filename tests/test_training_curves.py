"""benchmarks/training_curves.py: its table from tables of compare.py, and what it refuses."""

import json
from pathlib import Path

import pytest
from PIL import Image

from basics.console import UserError
from benchmarks import training_curves


def write(folder, auc, fit=300):
    """A compare.json of two sets, the ROC-AUC of the second .2 lower; all intervals .1 wide."""
    numbers = lambda value: {"roc_auc": value, "roc_auc_low": value - 0.05, "roc_auc_high": value + 0.05}
    rows = [
        {"method": method, "out_of_domain": name, **numbers(auc - less)}
        for method in ("combined", "combined[lmd_ssim]", "another")
        for name, less in (("a", 0), ("b", 0.2))
    ]
    folder.mkdir()
    table = {"fit": fit, "in_domain": 100, "out_of_domain": {"a": 1, "b": 2}, "rows": rows}
    (folder / "compare.json").write_text(json.dumps(table))
    return str(folder)


def test_table_and_picture(tmp_path, capsys):
    folders = [
        write(tmp_path / name, auc) for name, auc in (("steps_1000", 0.9), ("steps_250", 0.8), ("images_9", 0.7))
    ]
    training_curves.main([*folders, f"--output={tmp_path / 'a.png'}"])
    _, *lines, told = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines if "combined" in line] == [
        ["images", "9", "combined", "0.600", "0.550", "0.650", "0.500"],
        ["steps", "250", "combined", "0.700", "0.650", "0.750", "0.600"],
        ["steps", "1000", "combined", "0.800", "0.750", "0.850", "0.700"],
    ]
    assert len(lines) == 6  # LMD by SSIM, too; no other method
    assert told == f"picture: {tmp_path / 'a.png'}"
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.width > 2 * picture.height  # two panels


@pytest.mark.parametrize("name", ["steps", "steps_many", "_5", "empty_3"])
def test_what_is_no_such_folder_is_refused(name, tmp_path):
    folder = str(tmp_path / name) if name == "empty_3" else write(tmp_path / name, 0.9)
    with pytest.raises(UserError, match=r"is no output of compare\.py called SERIES_NUMBER"):
        training_curves.main([folder])


@pytest.mark.parametrize("lacking", ["rows", "an interval"])
def test_tables_without_numbers_are_refused(lacking, tmp_path):
    """Such as those of other methods alone, and of a set of one image."""
    file = Path(write(tmp_path / "steps_1", 0.9)) / "compare.json"
    table = json.loads(file.read_text())
    if lacking == "rows":
        table["rows"] = [row for row in table["rows"] if row["method"] == "another"]
    else:
        table["rows"][0]["roc_auc_low"] = None
    file.write_text(json.dumps(table))
    with pytest.raises(UserError, match="steps_1 lacks ROC-AUCs or intervals of combined"):
        training_curves.main([str(file.parent)])


def test_tables_of_other_images_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"steps_2 scored other images than .*steps_1"):
        training_curves.main([write(tmp_path / "steps_1", 0.9), write(tmp_path / "steps_2", 0.9, fit=301)])
