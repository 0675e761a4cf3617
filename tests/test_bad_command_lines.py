"""Wrong command lines of the commands: one line that says what to do, exit code 2, nothing written."""

import os
import re

import numpy as np
import pytest
import tiny
from helpers import ROOT

from basics.console import EXIT_USER_ERROR

CONFIG = f"--config={ROOT / tiny.CONFIG_FILE}"
TRAIN = ["main", "--mode=train", "--workdir=out", "--device=cpu"]
EVAL = ["main", "--mode=eval", "--workdir=out", "--device=cpu", CONFIG]
RECON = ["recon", CONFIG, "--workdir=out", "--ckpt_path=k.pth", "--in_domain=photos.npz", "--device=cpu"]
DETECT = ["detect", "--device=cpu"]
CALIBRATE = ["calibrate", CONFIG, "--ckpt_path=k.pth", "--in_domain=photos.npz", "--detector=out", "--device=cpu"]
PREDICT = ["predict", "--output=out", "--detector=nowhere", "--images=photos.npz", "--device=cpu"]
DECIDE = ["predict", "--output=out"]
CONFIGS = {  # file -> what is in it
    "syntax.py": "def get_config(:\n",
    "raises.py": "import math\n\n\ndef get_config():\n    return math.sqrt(-1)\n",
    "name.py": "x = 1\ny = undefined\n",
    "import.py": "import no_such_package\n",
    "exits.py": "import sys\n\nsys.exit(0)\n",
    "exits_later.py": "def get_config():\n    raise SystemExit('bye')\n",
    "lacks.py": "config = {}\n",
    "no_function.py": "get_config = 3\n",
    "dict.py": "def get_config():\n    return {'seed': 1}\n",
    "none.py": "def get_config():\n    pass\n",
    "takes.py": "def get_config(which):\n    pass\n",
    "recursion.py": "def get_config():\n    return get_config()\n",
    "assertion.py": "assert False\n",
    "type_error.py": "def get_config():\n    return 1 + 'a'\n",
    "os_error.py": "open('nowhere.txt')\n",
    "empty.py": "",
    "frozen.py": "from ml_collections import FrozenConfigDict as F\n\n\ndef get_config():\n    return F({'a': 1})\n",
    "two\nlines.py": "a = b\n",
}
LONG = "n" * 300
SMALL = ROOT / "tests" / "golden" / "results_small"

ROWS = {
    "two seeds": ([*TRAIN, CONFIG, "--seed=1", "--config.seed=2"], r"error: --seed and --config.seed say the same"),
    # config files
    "syntax": ([*TRAIN, "--config=syntax.py"], r"the config syntax\.py fails with SyntaxError in line 1: .*correct it"),
    "raises": ([*TRAIN, "--config=raises.py"], r"raises\.py fails with ValueError in line 5: math domain error; corr"),
    "undefined name": ([*TRAIN, "--config=name.py"], r"name\.py fails with NameError in line 2: name 'undefined' is"),
    "import": ([*TRAIN, "--config=import.py"], r"import\.py fails with ModuleNotFoundError in line 1: No module named"),
    "exits": ([*TRAIN, "--config=exits.py"], r"the config exits\.py ends the program in line 3; take the exit out"),
    "exits later": ([*TRAIN, "--config=exits_later.py"], r"exits_later\.py ends the program in line 2; take the exit"),
    "lacks": ([*TRAIN, "--config=lacks.py"], r"lacks\.py has no function get_config; the files in configs/ show how"),
    "no function": ([*TRAIN, "--config=no_function.py"], r"no_function\.py has no function get_config"),
    "plain dict": ([*TRAIN, "--config=dict.py"], r"get_config of dict\.py returns a dict, not an ml_collections\.Conf"),
    "nothing": ([*TRAIN, "--config=none.py"], r"get_config of none\.py returns nothing, not an ml_collections\.Config"),
    "frozen": ([*TRAIN, "--config=frozen.py"], r"get_config of frozen\.py returns a FrozenConfigDict, not an ml_coll"),
    "takes": ([*TRAIN, "--config=takes.py"], r"takes\.py fails with TypeError.*missing 1 required positional argument"),
    "recursion": ([*TRAIN, "--config=recursion.py"], r"recursion\.py fails with RecursionError in line 2"),
    "assertion": ([*TRAIN, "--config=assertion.py"], r"assertion\.py fails with AssertionError in line 1"),
    "type error": ([*TRAIN, "--config=type_error.py"], r"type_error\.py fails with TypeError in line 2"),
    "os error": ([*TRAIN, "--config=os_error.py"], r"os_error\.py fails with FileNotFoundError in line 1: .*nowhere"),
    "empty config file": ([*TRAIN, "--config=empty.py"], r"empty\.py has no function get_config"),
    "two lines": ([*TRAIN, "--config=two\nlines.py"], r"two lines\.py fails with NameError in line 1"),
    "binary": ([*TRAIN, "--config=photos.npz"], r"the config photos\.npz fails with SyntaxError"),
    "folder": ([*TRAIN, "--config=."], r"no config can be read \('\.' is no file\); give --config a file such as"),
    "pipe": ([*TRAIN, "--config=pipe"], r"no config can be read \('pipe' is no file\)"),
    "missing": ([*TRAIN, "--config=nowhere.py"], r"no config can be read \(.*'nowhere\.py'\); give --config a file"),
    "missing at home": ([*TRAIN, "--config=~/nowhere.py"], r"no config can be read \(.*'/[^~]*/nowhere\.py'\)"),
    "too long a config": ([*TRAIN, f"--config={LONG}"], r"no config can be read \(.*File name too long"),
    "a text for a config that takes none": ([*TRAIN, f"{CONFIG}:text"], r"TypeError: get_config\(\) takes 0"),
    "empty config": ([*TRAIN, "--config="], "no config can be read"),
    "config in recon": ([*RECON, "--config=dict.py"], r"get_config of dict\.py returns a dict"),
    "field of a section": ([*TRAIN, CONFIG, "--config.model=3"], "--config.model must be set field by field, such as"),
    "field before the config": ([*TRAIN, "--config.seed=3", CONFIG], "config.seed"),
    "field with a typo": ([*TRAIN, CONFIG, "--config.model.nff=3"], r'field: nff \(did you mean "nf" instead of "nff"'),
    "section with a typo": ([*TRAIN, CONFIG, "--config.modell.nf=3"], r'field: modell \(did you mean "model" inst'),
    "field with an escape": ([*TRAIN, CONFIG, "--config.model.n\x1b=3"], r"no such field: model\.n\\x1b; configs/base"),
    "choice with an escape": ([*TRAIN, CONFIG, "--config.model.name=\x1b"], r"\(config\.model\.name\) '\\x1b'; choose"),
    "number with an escape": ([*TRAIN, CONFIG, "--config.seed=\x1b"], r"seed must be a whole number, not '\\x1b'"),
    "text with a backslash": ([*TRAIN, CONFIG, r"--config.device=a\b"], r"config\.device is 'a\\b'; it must be auto"),
    "tuple with an escape": ([*TRAIN, CONFIG, "--config.model.ch_mult=(1,\x1b"], r"\(1,\\x1b as a tuple; write one as"),
    "field of a text": ([*TRAIN, CONFIG, "--config.seed=abc"], "--config.seed must be a whole number, not 'abc'"),
    "empty field": ([*TRAIN, CONFIG, "--config.data.dataset="], r"flag --config\.data\.dataset is empty"),
    "field with a zero byte": ([*TRAIN, CONFIG, "--config.data.dataset=a\0b"], r"--config\.data\.dataset holds a zero"),
    # paths
    "empty workdir": ([*TRAIN, CONFIG, "--workdir="], "flag --workdir is empty; give it a value or leave it out"),
    "blank workdir": ([*TRAIN, CONFIG, "--workdir= "], "flag --workdir is empty"),
    "workdir with a zero byte": ([*TRAIN, CONFIG, "--workdir=a\0b"], "flag --workdir holds a zero byte"),
    "too long a workdir": ([*TRAIN, CONFIG, f"--workdir={LONG}"], "File name too long"),
    "empty data_root": ([*TRAIN, CONFIG, "--data_root="], "flag --data_root is empty"),
    "empty eval_folder": ([*EVAL, "--eval_folder="], "flag --eval_folder is empty"),
    "empty workdir of recon": ([*RECON, "--workdir="], "flag --workdir is empty"),
    "empty ckpt_path": ([*RECON, "--ckpt_path="], "flag --ckpt_path is empty"),
    "empty in_domain": ([*RECON, "--in_domain="], "flag --in_domain is empty"),
    "empty out_of_domain": ([*RECON, "--out_of_domain="], "flag --out_of_domain is empty"),
    "empty mask file": ([*RECON, "--mask_file_path="], "flag --mask_file_path is empty"),
    "empty mask folder": ([*RECON, "--save_mask", "--mask_save_dir="], "flag --mask_save_dir is empty"),
    "empty identifier": ([*RECON, "--mask_identifier="], "flag --mask_identifier is empty"),
    "zero byte in in_domain": ([*RECON, "--in_domain=a\0b"], "flag --in_domain holds a zero byte"),
    "too long a checkpoint": ([*RECON, f"--ckpt_path={LONG}"], "File name too long|is missing|no checkpoint"),
    "too long a mask": ([*RECON, f"--mask_file_path={LONG}"], ""),
    "empty result_path": ([*DETECT, "--result_path="], "flag --result_path is empty"),
    "too long a result_path": ([*DETECT, f"--result_path={LONG}"], "File name too long"),
    "no results folder": ([*DETECT, "--result_path=nowhere"], "there is no results folder at nowhere"),
    "result_path at home": ([*DETECT, "--result_path=~/nowhere"], "there is no results folder at /[^~]*/nowhere"),
    "result_path is a file": ([*DETECT, "--result_path=photos.npz"], "there is no results folder at photos.npz"),
    "empty simclr_path": ([*DETECT, "--result_path=.", "--simclr_path="], "flag --simclr_path is empty"),
    # numbers
    "memory nan": ([*RECON, "--memory_gb=nan"], "flag --memory_gb=nan: a number within 64 bits is expected"),
    "memory inf": ([*RECON, "--memory_gb=inf"], "flag --memory_gb=inf: a number within 64 bits is expected"),
    "memory below 0": ([*RECON, "--memory_gb=-1"], "--memory_gb=-1"),
    "ratio nan": ([*RECON, "--mask_type=random", "--mask_ratio=nan"], "flag --mask_ratio=nan: a share between 0"),
    "t_start nan": ([*RECON, "--config.sampling.t_start=nan"], "config.sampling.t_start is nan; it must be a finite"),
    "t_end inf": ([*RECON, "--config.sampling.t_end=-inf"], "config.sampling.t_end is -inf; it must be a finite"),
    "huge batch": ([*RECON, f"--batch_size={10**30}"], r"--batch_size=10{30}: 10{30} is not an integer in the range"),
    "huge seed": ([*TRAIN, CONFIG, f"--seed={10**30}"], "flag --seed=10{30}: a number within 64 bits"),
    "huge reps": ([*DETECT, "--result_path=.", f"--reps={10**30}"], "flag --reps=10{30}: a number within 64 bits"),
    "no reps": ([*DETECT, "--result_path=.", "--reps=0"], "--reps must be at least 1, not 0"),
    "too many resamples": ([*DETECT, "--result_path=.", "--bootstrap=10000001"], "--bootstrap must be at most 1"),
    "text for a number": ([*RECON, "--batch_size=many"], "error: --batch_size must be a whole number, not 'many'$"),
    "fraction for an integer": ([*RECON, "--batch_size=2.5"], "--batch_size must be a whole number, not '2.5'"),
    "nothing for an integer": ([*PREDICT, "--max_images="], "--max_images must be a whole number, not ''"),
    "misleading text": ([*DETECT, "--reps=x: could not convert string to float: y"], "--reps must be a whole number"),
    "field of a number": ([*TRAIN, CONFIG, "--config.sampling.t_end=abc"], r"t_end must be a number, not 'abc'$"),
    "workers": ([*TRAIN, CONFIG, "--workers=-1"], "--workers=-1: -1 is not an integer in the range"),
    # choices and combinations
    "mode": (["main", CONFIG, "--workdir=out", "--mode=trian"], "--mode=trian: value should be one of <train|eval>"),
    "device": (["main", CONFIG, "--workdir=out", "--mode=train", "--device=gpu"], "unknown device 'gpu'; choose"),
    "empty device": (["main", CONFIG, "--workdir=out", "--mode=train", "--device="], "flag --device is empty"),
    "detect device": (["detect", f"--result_path={SMALL}", "--metric=MSE", "--device=gpu"], "unknown device 'gpu'"),
    "metric": ([*DETECT, "--result_path=.", "--metric=PSNR"], "unknown metric 'PSNR'; choose one of: MSE, SSIM"),
    "no metric": ([*DETECT, "--result_path=.", "--metric="], "--metric names no metric|unknown metric ''"),
    "metric with an escape": ([*DETECT, "--result_path=.", "--metric=\x1b[31m"], r"unknown metric '\\x1b\[31M'"),
    "resize type": ([*DETECT, "--result_path=.", "--resize_type=linear"], "--resize_type=linear: value should be one"),
    "boolean": ([*RECON, "--save_mask=perhaps"], "--save_mask must be true or false, not 'perhaps'"),
    "unknown flag": ([*RECON, "--reps=3"], "Unknown command line flag 'reps'"),
    "unknown flag with an escape": ([*TRAIN, "--\x1b[31mx=1"], r"Unknown command line flag '\\x1b\[31mx'"),
    "flag without value": (["detect", "--result_path"], "Missing value for flag --result_path"),
    "a word too many": ([*DETECT, "--result_path=.", "\x1b[31m"], r"unexpected argument '\\x1b\[31m'; flags are"),
    "no flags": (["main"], "error: --config, --workdir, --mode are needed; --help says what they are$"),
    "no flags of detect": (["detect"], "--result_path is needed; --help says what it is"),
    # calibrate.py and predict.py
    "no flags of calibrate": (["calibrate"], "error: --ckpt_path, --in_domain, --detector are needed; --help"),
    "no detector to write": ([*CALIBRATE[:4], "--device=cpu"], "--detector is needed; --help says what it is"),
    "no held-back images": ([*CALIBRATE[:3], "--detector=out"], "--in_domain is needed; --help says what it is"),
    "empty detector": ([*CALIBRATE, "--detector="], "flag --detector is empty; give it a value or leave it out"),
    "detector that is a file": ([*CALIBRATE, "--detector=photos.npz"], "photos.npz is there already and holds no det"),
    "detector that is a folder": ([*CALIBRATE, "--detector=."], r"\. is there already and holds no detector"),
    "no checkpoint of calibrate": (CALIBRATE, "there is no checkpoint at k.pth; check the path"),
    "its config": (["calibrate", "--ckpt_path=k.pth", *CALIBRATE[3:]], "there is no checkpoint at k.pth"),
    "unknown method": ([*CALIBRATE, "--method=lmx"], r"unknown method \(--method\) 'lmx'; choose one of: auto, "),
    "unknown setting": ([*CALIBRATE, "--method=lmd:foo=3"], "--method: lmd:foo=3: there is no setting 'foo'; the set"),
    "half a setting": ([*CALIBRATE, "--method=lmd:reps"], "error: --method: 'lmd:reps': settings are written name="),
    "text for a setting": ([*CALIBRATE, "--method=lmd:num_blocks=x"], "--method: lmd:num_blocks=x: num_blocks is"),
    "settings of auto": ([*CALIBRATE, "--method=auto:reps=3"], "error: --method auto has no settings; leave them out"),
    "two methods": ([*CALIBRATE, "--method=lmd:reps=3,nll"], "error: --method names 2 methods; a detector has one"),
    "rate nan": ([*CALIBRATE, "--false_alarm_rate=nan"], "flag --false_alarm_rate=nan: a share between 0 and 1 is"),
    "discovery nan": ([*PREDICT, "--false_discovery_rate=nan"], "--false_discovery_rate=nan: a share between 0 and 1"),
    "fit share nan": ([*CALIBRATE, "--fit_share=nan"], "flag --fit_share=nan: a share between 0 and 1 is"),
    "negative card": ([*CALIBRATE, "--card_images=-1"], "--card_images=-1: -1 is not a non-negative integer"),
    "calibrate's device": ([*CALIBRATE, "--device=gpu"], "unknown device 'gpu'; choose"),
    "no flags of predict": (["predict"], "--output is needed; --help says what it is"),
    "nothing to decide about": (DECIDE, "there is no folder out; give --detector and --images to fill it"),
    "no predictions": (["predict", "--output=."], r"there are no predictions in \. \(no outcome\.json\); run predict"),
    "output is a file": (["predict", "--output=photos.npz"], "there is no folder photos.npz"),
    "no such detector": (PREDICT, r"there is no detector in nowhere \(no detector\.json\); make one by calibrate\.py"),
    "images missing": ([*DECIDE, "--detector=d"], "--images is missing; give both --detector and --images, or"),
    "detector missing": ([*DECIDE, "--images=d"], "--detector is missing; give both"),
    "two ways to flag": (
        [*PREDICT, "--false_alarm_rate=0.1", "--false_discovery_rate=0.1"], "are two ways to flag; leave one out",
    ),
    "workers of nothing": ([*DECIDE, "--workers=2"], "--workers has no effect without --detector and --images; leave"),
    "device of nothing": ([*DECIDE, "--device=cpu"], "--device has no effect without --detector and --images"),
    "few of nothing": ([*DECIDE, "--max_images=2"], "--max_images has no effect without --detector and --images"),
    "rate in words": ([*DECIDE, "--false_alarm_rate=low"], "--false_alarm_rate must be a number, not 'low'$"),
    "a word too many for predict": ([*DECIDE, "photos.npz"], "unexpected argument 'photos.npz'; flags are written"),
    "flag file": ([*TRAIN, "--flagfile=nowhere"], "Unable to open flagfile: .*'nowhere'"),
    "flag file that is a folder": ([*TRAIN, "--flagfile=."], "Unable to open flagfile"),
    "binary flag file": ([*TRAIN, "--flagfile=photos.npz"], "decode"),
    "flag file of detect": ([*DETECT, "--flagfile=nowhere"], "Unable to open flagfile: .*'nowhere'"),
}  # fmt: skip


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """Name -> exit code, standard output, standard error, and what is in the folder then."""
    folders, rows = {}, []
    for name, (words, _) in ROWS.items():
        folders[name] = tmp_path_factory.mktemp("row")
        fill(folders[name])
        rows.append([words[0], words[1:], folders[name], "utf-8"])
    done = tiny.forked(rows, tmp_path_factory.mktemp("table"))
    return dict(zip(ROWS, zip(done, folders.values(), strict=True), strict=True))


def fill(folder):
    """What the rows name."""
    for name, text in CONFIGS.items():
        (folder / name).write_text(text)
    np.savez(folder / "photos.npz", images=tiny.pictures(4))
    os.mkfifo(folder / "pipe")


def before():
    return {*CONFIGS, "photos.npz", "pipe"}


@pytest.mark.parametrize("name", ROWS)
def test_one_line_that_says_what_to_do(name, outcomes):
    (code, out, err), folder = outcomes[name]
    assert code == EXIT_USER_ERROR, err
    assert out == ""
    assert err.startswith("error: "), err
    assert err.count("\n") == 1, err
    assert "Traceback" not in err
    assert re.search(ROWS[name][1], err), err
    assert "\x1b" not in err
    assert {path.name for path in folder.iterdir()} == before()
