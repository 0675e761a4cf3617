"""Every config equals the published one and can be overridden, field by field, on the command line."""

import gzip
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
from absl import flags
from ml_collections import ConfigDict, config_flags

from configs.base import ABSENT, TREE, from_dict, to_dict
from configs.presets import build, without

ROOT = Path(__file__).parent.parent
PUBLISHED = json.loads(gzip.decompress((ROOT / "tests/golden/configs.json.gz").read_bytes()))
SMALL = "configs/subvp/fashion_mnist_small.py"
LEAVES = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "configs").glob("*/**/*.py"))


def load(path):
    spec = importlib.util.spec_from_file_location("leaf", ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def fields(config, prefix=""):
    """(path, value) of every leaf field."""
    for name, value in config.items():
        if isinstance(value, ConfigDict):
            yield from fields(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def parse(path, *overrides):
    """The config that a command line gives."""
    values = flags.FlagValues()
    command = ["program", f"--config={ROOT / path}", *overrides]
    config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=command)
    values(command)
    return values.config


def test_leaves_are_the_published_ones_and_the_small_one():
    assert sorted([*PUBLISHED, SMALL]) == LEAVES


OURS = {  # fields of this program alone, with the values that are the published behaviour, up to precision
    "data": {"test_dataset": ""},
    "training": {"precision": "auto", "compile": "auto"},
    "optim": {"cooldown": 0},
    "sampling": {
        "sampler": "published", "steps": 0, "time_grid": "uniform", "t_start": 1.0, "t_end": 0.0, "eta": 1.0,
        "constraint": "replace", "returns": 0, "lift": "mask",
    },
}  # fmt: skip


@pytest.mark.parametrize("path", PUBLISHED)
def test_values_equal_the_published_ones(path):
    expected = {**PUBLISHED[path], "device": "auto"}
    expected |= {section: {**expected[section], **fields} for section, fields in OURS.items()}
    assert to_dict(load(path).get_config()) == expected


@pytest.mark.parametrize("path", LEAVES)
def test_docstring_gives_the_command(path):
    assert f" python main.py --config {path} --workdir results/" in " ".join(load(path).__doc__.split())


@pytest.mark.parametrize("path", LEAVES)
def test_types_are_json_and_tuples_and_the_same_everywhere(path):
    for name, value in fields(load(path).get_config()):
        section, _, field = name.rpartition(".")
        assert type(value) in (int, float, bool, str, tuple), name
        assert not isinstance(value, tuple) or all(type(item) is int for item in value), name
        default = (TREE[section] if section else TREE)[field]
        assert default is ABSENT or type(value) is type(default), name


OTHER = {bool: lambda v: not v, int: lambda v: v + 7, float: lambda v: v + 0.5, str: lambda v: v + "_x"}


def other(value):
    """Another value of the same type."""
    return (1, 2) if isinstance(value, tuple) else OTHER[type(value)](value)


@pytest.mark.parametrize("path", LEAVES)
def test_every_field_can_be_overridden(path):
    changed = {name: other(value) for name, value in fields(load(path).get_config())}
    config = parse(path, *(f"--config.{name}={value}" for name, value in changed.items()))
    assert dict(fields(config)) == changed


def test_no_field_of_the_tree_is_left_out_by_all_configs():
    seen = {name for path in LEAVES for name, _ in fields(load(path).get_config())}
    tree = {f"{s}.{n}" for s, section in TREE.items() if isinstance(section, dict) for n in section}
    assert seen == tree | {"seed", "device"}


@pytest.mark.parametrize(
    ("override", "name", "value"),
    [
        ('--config.model.ch_mult="(1,2)"', "ch_mult", (1, 2)),
        ("--config.model.ch_mult=(1, 2)", "ch_mult", (1, 2)),
        ("--config.model.attn_resolutions=8,", "attn_resolutions", (8,)),
        ("--config.model.attn_resolutions=()", "attn_resolutions", ()),
        ("--config.model.sigma_max=50.5", "sigma_max", 50.5),
        ("--config.model.sigma_max=60", "sigma_max", 60.0),
        ("--noconfig.model.conditional", "conditional", False),
        ("--config.model.nf=64", "nf", 64),
    ],
)
def test_forms_of_an_override(override, name, value):
    assert parse("configs/subvp/cifar10_ddpm_continuous.py", override.replace('"', "")).model[name] == value


@pytest.mark.parametrize(
    "override", ["--config.model.nf=many", "--config.model.nofield=1", "--config.training.n_iters=1e3"]
)
def test_wrong_overrides_are_refused(override):
    with pytest.raises((flags.Error, AttributeError)):
        parse(SMALL, override)


@pytest.mark.parametrize("path", LEAVES)
def test_dict_round_trip_through_json(path):
    config = load(path).get_config()
    again = from_dict(json.loads(json.dumps(to_dict(config))))
    assert list(fields(again)) == list(fields(config))
    assert [type(value) for _, value in fields(again)] == [type(value) for _, value in fields(config)]


def test_later_parts_win_and_the_tree_stays_as_it_was():
    config = build({"model.nf": 8, "seed": 1}, {"model.nf": 16}, without("model.dropout"))
    assert (config.model.nf, config.seed, "dropout" in config.model) == (16, 1, False)
    assert (TREE["model"]["nf"], TREE["seed"], TREE["model"]["dropout"]) == (128, 42, 0.1)


def test_a_part_with_an_unknown_field_is_a_bug():
    with pytest.raises(KeyError, match=r"model\.nfs"):
        build({"model.nfs": 8})


def test_a_program_reads_a_leaf_from_any_folder(tmp_path):
    """The leaves import configs.presets: the folder of the program is on sys.path, wherever it is started."""
    for name in ("configs", "basics"):
        (tmp_path / name).symlink_to(ROOT / name)
    program = tmp_path / "program.py"
    program.write_text(
        "from absl import app, flags\nfrom ml_collections import config_flags\n"
        "config_flags.DEFINE_config_file('config')\n"
        "app.run(lambda _: print(flags.FLAGS.config.training.batch_size))\n"
    )
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    command = [sys.executable, str(program), f"--config={ROOT / SMALL}", "--config.training.batch_size=3"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "3"
