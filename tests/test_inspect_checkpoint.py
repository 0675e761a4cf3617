"""What scripts/inspect_checkpoint.py says of every kind of checkpoint, and the files it converts to."""

import gzip
import importlib.util
import json
import subprocess
import sys

import pytest
import tiny
import torch
from helpers import GOLDEN, ROOT, load_config
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import losses
import models
from basics.console import UserError
from configs.base import to_dict
from storage import diffusers_weights
from storage.checkpoints import load_ema_weights, read_checkpoint, write_checkpoint

SHAPES = json.loads(gzip.decompress((GOLDEN / "state_dict_shapes.json.gz").read_bytes()))
SCRIPT = ROOT / "scripts/inspect_checkpoint.py"
PUBLISHED = GOLDEN / "train_small_checkpoint.pth"  # written by the published code

_spec = importlib.util.spec_from_file_location("inspect_checkpoint", SCRIPT)
tool = importlib.util.module_from_spec(_spec)
sys.modules["inspect_checkpoint"] = tool
_spec.loader.exec_module(tool)

# A config file of PUBLISHED's network.
CONFIG_SOURCE = """
from configs.presets import CIFAR10, DDPM, SUBVP, build

def get_config():
    return build(CIFAR10, DDPM, SUBVP, {part})
"""
PUBLISHED_PART = {
    "data.image_size": 16,
    "model.nf": 32,
    "model.ch_mult": (1, 1),
    "model.num_res_blocks": 1,
    "model.attn_resolutions": (8,),
    "model.dropout": 0.0,
}


def config_file(folder, **changes):
    """A config file of the published checkpoint's network; `changes` as in `model__nf=64`."""
    part = {**PUBLISHED_PART, **{name.replace("__", "."): value for name, value in changes.items()}}
    path = folder / f"config{len(list(folder.glob('config*.py')))}.py"
    path.write_text(CONFIG_SOURCE.format(part=part))
    return str(path)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A checkpoint of main.py at step 3, with averages unlike the weights, and its config."""
    config, path = tiny.config(), tmp_path_factory.mktemp("trained") / "checkpoint_1.pth"
    torch.manual_seed(0)
    state = losses.create_state(config, models.create_model(config))
    for value in state.ema.state_dict()["shadow_params"]:
        value.normal_()
    state.step = 3
    write_checkpoint(path, state, to_dict(config), seed=1)
    return path, config


def output(capsys, *arguments):
    """What the tool prints, as (label, text) rows."""
    tool.main([str(argument) for argument in arguments])
    return [(row[2:17].strip(" :"), row[17:].strip()) for row in capsys.readouterr().out.splitlines()[1:]]


def metadata(path):
    with safe_open(path, framework="pt") as file:
        return file.metadata()


# ------------------------------------------------------------------------------------------------------- inspecting


def test_a_published_checkpoint(capsys, tmp_path):
    config = config_file(tmp_path)
    rows = output(capsys, PUBLISHED, "--config", config)
    assert rows[0] == ("format", "training checkpoint of Score-SDE, as published")
    assert "ddpm, 32 channels times 1-1" in rows[1][1]
    count = sum(v.numel() for v in read_checkpoint(PUBLISHED)["ema"]["shadow_params"])
    assert rows[2] == ("parameters", f"{count:,} in 132 tensors")
    assert rows[3] == ("steps", "5")
    assert rows[4][1].startswith("the file does not say")
    assert rows[5] == ("weights", "all finite")
    assert rows[6:] == [("fits", f"{config} (subvpsde, continuous times, 1000 steps)")]


def test_all_that_differs_from_one_config_is_listed(capsys, tmp_path):
    config = config_file(tmp_path, model__attn_resolutions=())
    rows = output(capsys, PUBLISHED, "--config", config)[6:]
    assert rows[0] == ("does not fit", config)
    names = [text for _, text in rows[1:]]
    assert any(text.endswith("is unknown here") for text in names)
    assert names[-1].startswith("132 EMA weights there, ")
    assert len(names) > 10


def test_the_closest_configs_are_listed_where_none_fits(capsys):
    rows = output(capsys, PUBLISHED)[6:]
    assert [label for label, _ in rows] == ["does not fit", ""] * 3 + ["fits"]
    assert rows[0][1] == "configs/subvp/fashion_mnist_small.py"
    assert "configs/vp/ddpm/cifar10.py" in rows[2][1]  # all of one network in one row
    assert rows[1][1].count("; ") == 3
    assert rows[-1][1].startswith("none of the ")


def test_a_checkpoint_of_a_config_of_ones_own_fits_what_it_carries(capsys, trained):
    ((label, text),) = output(capsys, trained[0])[6:]
    assert label == "fits"
    assert text.startswith("the config that it carries (subvpsde, continuous times, 3 steps), which is none of the ")


def test_a_checkpoint_of_main_says_its_sde_and_what_differs(capsys, trained):
    path, config = trained
    rows = dict(output(capsys, path, "--config", "configs/vp/ddpm/cifar10.py")[:6])
    assert rows["format"] == "training checkpoint of main.py"
    assert rows["SDE"] == "subvpsde, continuous times, 3 steps"
    checkpoint = tool.read(path)
    assert tool.differences(checkpoint, config) == []
    found = tool.differences(checkpoint, load_config("vp/ddpm/cifar10.py"))
    assert 'training.sde: "subvpsde" there, "vpsde" here' in found
    assert not any("all_modules" in row for row in found)  # which follow from the above
    config = tiny.config(training__sde="vpsde")
    assert tool.differences(checkpoint, config) == ['training.sde: "subvpsde" there, "vpsde" here']


@pytest.fixture(scope="module")
def leaves():
    return tool.leaves()


@pytest.mark.parametrize("architecture", SHAPES["architectures"])
def test_a_published_network_fits_the_configs_it_is_published_for(architecture, leaves):
    weights = {name: torch.empty(shape, device="meta") for name, shape in SHAPES["architectures"][architecture]}
    fixed = {"sigmas", "all_modules.0.W"}  # Fourier frequencies are not trained, so they have no average
    averages = [value for name, value in weights.items() if name not in fixed]
    checkpoint = tool.Checkpoint("", weights, averages, 0, None, {})
    fitting = {name for name, leaf in leaves.items() if not tool.differences(checkpoint, leaf)}
    assert fitting == {name for name, owned in SHAPES["config_to_architecture"].items() if owned == architecture}


def test_another_number_of_scales_matters_where_the_network_divides_by_sigma():
    config = load_config("ve/cifar10_ddpm.py")
    with torch.device("meta"):
        net = models.create_model(config)
    checkpoint = tool.Checkpoint("", dict(net.state_dict()), list(net.parameters()), 0, None, {})
    config.model.num_scales = 10
    assert tool.differences(checkpoint, config) == ["sigmas: (1000,) there, (10,) here"]
    config.model.scale_by_sigma = False
    assert tool.differences(checkpoint, config) == []


def test_weights_that_are_not_finite_are_named(capsys, trained, tmp_path):
    content = torch.load(trained[0], weights_only=True)
    content["ema"]["shadow_params"][4][0] = float("nan")
    content["model"]["module.all_modules.2.bias"][0] = float("inf")
    torch.save(content, tmp_path / "bad.pth")
    rows = dict(output(capsys, tmp_path / "bad.pth", "--config", "configs/subvp/fashion_mnist_small.py")[:6])
    assert rows["weights"] == "NaN or infinite: all_modules.2.bias, EMA weight 4"
    with pytest.raises(UserError, match="NaN"):
        tool.main([str(tmp_path / "bad.pth"), "--to", str(tmp_path / "out.safetensors")])
    assert not (tmp_path / "out.safetensors").exists()


@pytest.fixture
def folder(tmp_path):
    """A folder of diffusers' with a small network, as copied from its publisher."""
    level = {"down_block_types": ["AttnDownBlock2D"], "up_block_types": ["AttnUpBlock2D"], "block_out_channels": [32]}
    like_ddpm = {"norm_eps": 1e-6, "downsample_padding": 0, "flip_sin_to_cos": False, "freq_shift": 1}
    sizes = {"sample_size": 8, "layers_per_block": 1, "attention_head_dim": None}
    content = {"_class_name": "UNet2DModel", **level, **like_ddpm, **sizes}
    path = tmp_path / "diffusers"
    path.mkdir()
    (path / diffusers_weights.CONFIG).write_text(json.dumps(content))
    net = tool.DDPM(diffusers_weights.read_config(path), attention_up="all")
    table = diffusers_weights.name_table(net)
    weights = {name: (p.t() if turned else p).detach().contiguous() for name, (p, turned) in table.items()}
    save_file(weights, path / diffusers_weights.WEIGHTS)
    return path


def test_a_folder_of_diffusers(capsys, folder, tmp_path):
    rows = output(capsys, folder, "--config", "configs/vp/ddpm/cifar10.py")
    assert rows[0][1].startswith("folder of diffusers' (UNet2DModel)")
    assert rows[1][1].startswith("ddpm, 32 channels times 1,")
    assert rows[4] == ("SDE", "vpsde, discrete times, 1000 steps")
    assert rows[6] == ("does not fit", "configs/vp/ddpm/cifar10.py")
    assert ("", "data.image_size: 8 there, 32 here") in rows
    assert tool.differences(tool.read(folder), diffusers_weights.read_config(folder)) == []
    with pytest.raises(UserError, match="takes the folder"):
        tool.main([str(folder), "--to", str(tmp_path / "out.safetensors")])
    with pytest.raises(UserError, match="name the folder"):
        tool.main([str(folder / diffusers_weights.WEIGHTS)])


# ------------------------------------------------------------------------------------------------------- converting


def test_conversion_keeps_the_averages_the_config_and_the_notes(capsys, trained, tmp_path):
    path, config = trained
    target = tmp_path / "new" / "ema.safetensors"
    tool.main([str(path), "--to", str(target), "--note", "command=main.py --x=1", "--note", "data=squares"])
    averages = torch.load(path, weights_only=True)["ema"]["shadow_params"]
    net = models.create_model(config)
    assert load_ema_weights(target, net, to_dict(config)) == 3
    for average, parameter in zip(averages, net.parameters(), strict=True):
        assert torch.equal(average, parameter)
    text = metadata(target)
    assert json.loads(text.pop("config")) == to_dict(config)
    assert text == {"step": "3", "command": "main.py --x=1", "data": "squares"}
    capsys.readouterr()
    rows = dict(output(capsys, target, "--config", "configs/vp/ddpm/cifar10.py")[:8])
    assert rows["format"] == "EMA weights (safetensors)"
    assert (rows["steps"], rows["data"]) == ("3", "squares")


def test_a_converted_file_can_be_given_further_notes(trained, tmp_path):
    path, _ = trained
    target = str(tmp_path / "ema.safetensors")
    tool.main([str(path), "--to", target, "--note", "data=squares", "--note", "loss=0.1"])
    before = load_file(target)
    tool.main([target, "--to", target, "--note", "loss=0.2"])
    text, after = metadata(target), load_file(target)
    assert (text["data"], text["loss"], text["step"]) == ("squares", "0.2", "3")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_published_checkpoint_is_converted_by_a_config(tmp_path):
    target = tmp_path / "ema.safetensors"
    with pytest.raises(UserError, match="name it with --config"):
        tool.main([str(PUBLISHED), "--to", str(target)])
    tool.main([str(PUBLISHED), "--to", str(target), "--config", config_file(tmp_path)])
    found = list(load_file(target).values())
    assert len(found) == 132
    assert metadata(target)["step"] == "5"
    with pytest.raises(UserError, match="does not fit"):
        tool.main([str(PUBLISHED), "--to", str(target), "--config", config_file(tmp_path, model__nf=64)])


# ----------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.pth"], "there is no checkpoint at nowhere.pth"),
        (["nowhere.safetensors"], "there is no checkpoint at nowhere.safetensors"),
        ([str(SCRIPT)], "damaged or is no torch file"),
        ([str(ROOT / "configs")], "no config.json"),
        ([str(PUBLISHED), "--config", "nowhere.py"], "there is no config at nowhere.py"),
        ([str(PUBLISHED), "--config", str(ROOT / "pyproject.toml")], "pyproject.toml fails with SyntaxError in line 2"),
        ([str(PUBLISHED), "--config", str(ROOT / "basics/console.py")], "no function get_config"),
        ([str(PUBLISHED), "--note", "a=b"], "--note goes with --to"),
        ([str(PUBLISHED), "--to", "x.safetensors", "--note", "a"], "write KEY=TEXT"),
        ([str(PUBLISHED), "--to", "x.safetensors", "--note", "=a"], "write KEY=TEXT"),
        ([str(PUBLISHED), "--to", "x.safetensors", "--note", "step=7"], "other than config and step"),
        ([str(PUBLISHED), "--to", "x.pth"], "must end in .safetensors"),
    ],
)
def test_a_mistake_is_told(arguments, message):
    with pytest.raises(UserError) as error:
        tool.main(arguments)
    assert message in str(error.value)


def test_a_damaged_file_is_told(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"12345678901234567890")
    with pytest.raises(UserError, match="damaged"):
        tool.main([str(path)])
    save_file({"a": torch.zeros(1)}, path, {"config": "{"})
    with pytest.raises(UserError, match="no JSON"):
        tool.main([str(path)])


BROKEN_CONFIGS = {
    "raises": "raise ValueError('a\\nb')",
    "leaves": "import sys; sys.exit(3)",
    "is no Python": "def get_config(:",
    "raises when called": "def get_config(): return 1 / 0",
    "a plain dict": "def get_config(): return {}",
}


@pytest.mark.parametrize("name", BROKEN_CONFIGS)
def test_a_config_that_is_none_is_told(name, tmp_path):
    (tmp_path / "broken.py").write_text(BROKEN_CONFIGS[name] + "\n")
    with pytest.raises(UserError, match=r"broken\.py (fails with|ends the program|returns a dict)") as error:
        tool.main([str(PUBLISHED), "--config", str(tmp_path / "broken.py")])
    assert "\n" not in str(error.value)


def test_plain_weights_and_work_folders_are_told(trained, tmp_path, capsys):
    checkpoint = read_checkpoint(trained[0])
    torch.save(checkpoint["model"], tmp_path / "plain.pth")
    assert dict(output(capsys, tmp_path / "plain.pth"))["format"] == "plain weights, without moving averages"
    (tmp_path / "plain.pth").unlink()
    torch.save(checkpoint, tmp_path / "checkpoint_3.pth")
    assert "training checkpoint of main.py" in dict(output(capsys, tmp_path))["format"]


def test_a_config_that_lies_makes_no_network(trained, tmp_path):
    checkpoint = read_checkpoint(trained[0])
    checkpoint["config"]["model"]["num_res_blocks"] = 10**9
    torch.save(checkpoint, tmp_path / "lies.pth")
    with pytest.raises(UserError, match="more blocks than the file has weights"):
        tool.main([str(tmp_path / "lies.pth"), "--to", str(tmp_path / "x.safetensors")])


def test_on_the_command_line_a_mistake_is_one_line_and_exit_code_2(tmp_path):
    done = subprocess.run([sys.executable, SCRIPT, "nowhere.pth"], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: there is no checkpoint at nowhere.pth; check the path\n"
