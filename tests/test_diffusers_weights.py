"""Diffusers' DDPM weights: the same numbers as diffusers, and a word about everything that cannot be used."""

import json
import warnings

import pytest
import torch
from helpers import close, fill_, golden, load_config, wave
from safetensors.torch import load_file, save_file

from basics.console import UserError
from models.ddpm import DDPM
from storage import diffusers_weights
from storage.diffusers_weights import CONFIG, SCHEDULER, WEIGHTS

NAMES_OF_OLD = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}

# config.json of google/ddpm-cifar10-32, without fields that it leaves to diffusers' defaults.
CIFAR10 = {
    "_class_name": "UNet2DModel",
    "_diffusers_version": "0.0.4",
    "act_fn": "silu",
    "attention_head_dim": None,
    "block_out_channels": [128, 256, 256, 256],
    "center_input_sample": False,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "in_channels": 3,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-06,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 32,
    "time_embedding_type": "positional",
    "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
}
FACES_256 = {
    **CIFAR10,
    "block_out_channels": [128, 128, 256, 256, 512, 512],
    "down_block_types": ["DownBlock2D"] * 4 + ["AttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "AttnUpBlock2D"] + ["UpBlock2D"] * 4,
    "sample_size": 256,
}
TINY = {
    **CIFAR10,
    "block_out_channels": [32, 64],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "sample_size": 16,
}


def write(folder, config, weights=None, scheduler=None):
    """A diffusers folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(json.dumps(config))
    if weights is not None:
        save_file(weights, folder / WEIGHTS)
    if scheduler is not None:
        (folder / SCHEDULER).write_text(json.dumps(scheduler))
    return folder


def random_weights(folder):
    """Random weights for the config in a folder, by diffusers' names and in its shapes."""
    net = DDPM(diffusers_weights.read_config(folder), attention_up="all")
    weights = {}
    for name, (value, turned) in diffusers_weights.name_table(net).items():
        value = value.detach().t() if turned else value.detach()
        weights[name] = (value[..., None, None] if name.endswith("conv_shortcut.weight") else value).clone()
    return {name: value.contiguous() for name, value in weights.items()}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A whole folder of the tiny config, and its weights; neither is to be changed."""
    folder = write(tmp_path_factory.mktemp("tiny"), TINY)
    weights = random_weights(folder)
    return write(folder, TINY, weights), weights


def old_name(name):
    for new, old in NAMES_OF_OLD.items():
        name = name.replace(new, old)
    return name


# ------------------------------------------------------------------------------------------- diffusers' own outputs


@pytest.mark.parametrize("case", ["rgb", "grey"])
@pytest.mark.parametrize("rename", [str, old_name], ids=["names of now", "old names"])
def test_outputs_are_those_of_diffusers(case, rename, tmp_path):
    """Two and three levels, attention on the first, last and both; [0, 1] and [-1, 1]; labels 0, 500 and 999."""
    numbers = golden("diffusers_ddpm")
    shapes = json.loads(str(numbers[f"{case}_shapes"]))
    weights = fill_({name: torch.empty(shape) for name, shape in shapes})
    config = json.loads(str(numbers[f"{case}_config"]))
    folder = write(tmp_path, config, {rename(name): value for name, value in weights.items()})
    net = diffusers_weights.load(folder, diffusers_weights.read_config(folder)).eval()
    x = wave((3, config["in_channels"], 16, 16), 0.5)
    with torch.no_grad():
        y = net(x, torch.tensor(numbers["labels"]))
    close(y, numbers[f"{case}_output"])  # 1e-5 of the largest: float32 sums in another order


LIVE = {
    "two blocks a level": {"layers_per_block": 2},
    "one head by its size": {"attention_head_dim": 64},
    "attention nowhere but in the middle": {
        "down_block_types": ["DownBlock2D"] * 2,
        "up_block_types": ["UpBlock2D"] * 2,
    },
    "attention everywhere, grey, [0, 1]": {
        "block_out_channels": [32, 32, 64],
        "down_block_types": ["AttnDownBlock2D"] * 3,
        "up_block_types": ["AttnUpBlock2D"] * 3,
        "in_channels": 1,
        "out_channels": 1,
        "center_input_sample": True,
    },
}


@pytest.fixture(scope="module")
def unet():
    """Diffusers' UNet2DModel."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its own dependencies
        reason = "diffusers, which to compare with, is not installed"
        return pytest.importorskip("diffusers", reason=reason, exc_type=ImportError).UNet2DModel


@pytest.mark.parametrize("options", LIVE.values(), ids=LIVE)
def test_outputs_equal_the_installed_diffusers(unet, options, tmp_path):
    torch.manual_seed(0)
    theirs = unet(**{name: value for name, value in {**TINY, **options}.items() if name[0] != "_"}).eval()
    theirs.save_pretrained(tmp_path)
    net = diffusers_weights.load(tmp_path, diffusers_weights.read_config(tmp_path)).eval()
    x, labels = wave((3, theirs.config.in_channels, 16, 16), 0.5), torch.tensor([0, 500, 999])
    with torch.no_grad():
        close(net(x, labels), theirs(x, labels).sample)  # as above
    assert sum(p.numel() for p in net.parameters()) == sum(p.numel() for p in theirs.parameters())


def test_the_installed_diffusers_reads_old_names_the_same(unet, tiny, tmp_path):
    folder, weights = tiny
    write(tmp_path, TINY, {old_name(name): value for name, value in weights.items()})
    theirs, ours = unet.from_pretrained(tmp_path).eval(), diffusers_weights.load(folder, read(folder)).eval()
    x, labels = wave((1, 3, 16, 16), 0.5), torch.tensor([7])
    with torch.no_grad():
        close(ours(x, labels), theirs(x, labels).sample)


# ---------------------------------------------------------------------------------------------------------- configs


def read(folder):
    return diffusers_weights.read_config(folder)


@pytest.mark.parametrize(
    ("content", "leaf"),
    [
        (CIFAR10, "vp/ddpm/cifar10.py"),
        (FACES_256, "vp/ddpm/celebahq.py"),
        (FACES_256, "vp/ddpm/church.py"),
        (FACES_256, "vp/ddpm/bedroom.py"),
    ],
)
def test_published_weights_go_with_the_configs_here(content, leaf, tmp_path):
    scheduler = {"_class_name": "DDPMScheduler", "beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"}
    folder = write(tmp_path, content, scheduler=scheduler)
    assert diffusers_weights.differences(read(folder), load_config(leaf)) == []


def test_parameters_of_the_cifar10_network(tmp_path):
    with torch.device("meta"):
        net = DDPM(read(write(tmp_path, CIFAR10)), attention_up="all")
    assert sum(p.numel() for p in net.parameters()) == 35_746_307  # as diffusers counts


def test_a_scheduler_gives_the_noise_schedule(tmp_path):
    scheduler = {"beta_start": 0.0002, "beta_end": 0.03, "num_train_timesteps": 500}
    config = read(write(tmp_path, TINY, scheduler=scheduler))
    assert (config.model.beta_min, config.model.beta_max, config.model.num_scales) == (0.1, 15.0, 500)
    assert (config.training.sde, config.training.continuous) == ("vpsde", False)


def test_without_a_scheduler_the_noise_schedule_is_ddpm_s(tmp_path):
    config = read(write(tmp_path, TINY))
    assert (config.model.beta_min, config.model.beta_max, config.model.num_scales) == (0.1, 20.0, 1000)


def test_a_pipeline_s_folder(tiny, tmp_path):
    write(tmp_path / "unet", TINY, tiny[1])
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler" / SCHEDULER).write_text(json.dumps({"beta_end": 0.01}))
    for folder in (tmp_path, tmp_path / "unet"):
        assert read(folder).model.beta_max == 10.0
        assert diffusers_weights.load(folder, read(folder)).nf == 32


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("time_embedding_type", "fourier"),
        ("freq_shift", 0),
        ("flip_sin_to_cos", True),
        ("mid_block_type", None),
        ("mid_block_scale_factor", 1.414),
        ("downsample_padding", 1),
        ("downsample_type", "resnet"),
        ("upsample_type", "resnet"),
        ("act_fn", "relu"),
        ("norm_num_groups", 16),
        ("norm_eps", 1e-5),
        ("resnet_time_scale_shift", "scale_shift"),
        ("add_attention", False),
        ("class_embed_type", "timestep"),
        ("num_class_embeds", 10),
        ("sample_size", None),
        ("sample_size", [16, 32]),
        ("sample_size", 15),
        ("in_channels", 4),
        ("out_channels", 6),
        ("block_out_channels", [32, 48]),
        ("block_out_channels", [64, 96]),
        ("down_block_types", ["DownBlock2D", "SkipDownBlock2D"]),
        ("up_block_types", ["UpBlock2D", "AttnUpBlock2D"]),
        ("attention_head_dim", 8),
        ("time_embedding_dim", 64),
        ("layers_per_block", 0),
    ],
)
def test_what_our_ddpm_cannot_express_is_refused_by_name(field, value, tmp_path):
    with pytest.raises(UserError, match=f"{field} is .*cannot express"):
        read(write(tmp_path, {**TINY, field: value}))


@pytest.mark.parametrize("field", ["norm_eps", "freq_shift", "flip_sin_to_cos", "downsample_padding"])
def test_a_missing_field_has_diffusers_default_which_is_another(field, tmp_path):
    with pytest.raises(UserError, match=f"{field} is .*cannot express"):
        read(write(tmp_path, {name: value for name, value in TINY.items() if name != field}))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("beta_schedule", "squaredcos_cap_v2"),
        ("prediction_type", "v_prediction"),
        ("trained_betas", [0.1]),
        ("rescale_betas_zero_snr", True),
    ],
)
def test_another_noise_schedule_is_refused_by_name(field, value, tmp_path):
    with pytest.raises(UserError, match=f"{field} is"):
        read(write(tmp_path, TINY, scheduler={field: value}))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({**TINY, "_class_name": "UNet2DConditionModel"}, "is of a UNet2DConditionModel"),
        ({**TINY, "encoder_hid_dim": 3}, "does not know: encoder_hid_dim"),
        ({**TINY, "block_out_channels": "wide"}, "wrong type"),
        ({**TINY, "block_out_channels": [32]}, "wrong type or number"),
        ([1, 2], "no table"),
    ],
)
def test_a_broken_or_foreign_config_is_refused(content, message, tmp_path):
    with pytest.raises(UserError, match=message):
        read(write(tmp_path, content))


def test_a_file_that_is_no_json_is_refused(tmp_path):
    (tmp_path / CONFIG).write_text("{")
    with pytest.raises(UserError, match="no JSON"):
        read(tmp_path)


def test_a_folder_without_a_config_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"no config\.json"):
        read(tmp_path)


def test_attention_on_the_way_up_must_be_known(tmp_path):
    with pytest.raises(UserError, match="choose one of: last, all"):
        DDPM(read(write(tmp_path, TINY)), attention_up="first")


# ---------------------------------------------------------------------------------------------------------- weights


def test_a_config_of_another_network_is_refused_with_what_to_set(tiny):
    with pytest.raises(UserError) as error:
        diffusers_weights.load(tiny[0], load_config("vp/ddpm/cifar10_continuous.py"))
    for row in ("data.image_size: 16 there, 32 here", "model.nf: 32 there, 128 here", "training.continuous: false"):
        assert row in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("conv_in.bias"), "conv_in.bias is missing"),
        (lambda w: w.update(extra=torch.zeros(1)), "extra is unknown"),
        (lambda w: w.update({"conv_in.bias": torch.zeros(7)}), r"conv_in.bias has the shape \(7,\)"),
        (lambda w: w["conv_in.bias"].fill_(float("nan")), "1 tensor, conv_in.bias first"),
    ],
    ids=["missing", "unknown", "shape", "nan"],
)
def test_weights_that_do_not_fit_are_refused_by_name(change, message, tiny, tmp_path):
    weights = {name: value.clone() for name, value in tiny[1].items()}
    change(weights)
    folder = write(tmp_path, TINY, weights)
    with pytest.raises(UserError, match=message):
        diffusers_weights.load(folder, read(folder))


def test_half_precision_weights_become_float32(tiny, tmp_path):
    folder = write(tmp_path, TINY, {name: value.half() for name, value in tiny[1].items()})
    net = diffusers_weights.load(folder, read(folder))
    assert net.conv_in.weight.dtype == torch.float32
    torch.testing.assert_close(net.conv_in.weight, tiny[1]["conv_in.weight"], rtol=1e-3, atol=1e-6)  # 11 bits


def nested(depth):
    return '{"a":' * depth + "1" + "}" * depth


CRAFTED = {  # config.json as a dict of changes to TINY, or as text
    "empty": ("", "no JSON"),
    "deep nesting": (nested(10**5), "no JSON"),
    "a million digits": ('{"sample_size": ' + "1" * 10**6 + "}", "no JSON"),
    "NaN": ('{"dropout": NaN}', "no JSON"),
    "bytes that are no text": (b"\xff\xfe{}", "no JSON"),
    "two megabytes": ("{}" + " " * (2 << 20), "too large for a config"),
    "text": ('"hello"', "no table"),
    "class is a table": ({"_class_name": {"a": ["b" * 9999]}}, "is of a"),
    "an empty name": ({"": 1}, "does not know"),
    "no channels": ({"block_out_channels": []}, "wrong type or number"),
    "channels of zero": ({"block_out_channels": [0, 0]}, "wrong type or number"),
    "channels as text": ({"block_out_channels": ["32", "64"]}, "wrong type or number"),
    "channels nested": ({"block_out_channels": [[32], [64]]}, "wrong type or number"),
    "channels negative": ({"block_out_channels": [-32, -64]}, "wrong type or number"),
    "channels huge": ({"block_out_channels": [32, 32 << 60]}, "wrong type or number"),
    "channels are a table": ({"block_out_channels": {"0": 32}}, "wrong type or number"),
    "levels are numbers": ({"down_block_types": [1, 2]}, "down_block_types is"),
    "levels nested": ({"down_block_types": [["DownBlock2D"], {}]}, "wrong type or number"),
    "levels are text": ({"down_block_types": "DownBlock2D"}, "wrong type or number"),
    "a thousand levels": (
        {"block_out_channels": [32] * 1000, "down_block_types": ["DownBlock2D"] * 1000},
        "wrong type",
    ),
    "layers huge": ({"layers_per_block": 10**9}, "wrong type or number"),
    "layers as text": ({"layers_per_block": "2"}, "wrong type or number"),
    "layers broken": ({"layers_per_block": 1.5}, "wrong type or number"),
    "layers none": ({"layers_per_block": None}, "wrong type or number"),
    "size huge": ({"sample_size": 2**60}, "sample_size is"),
    "size nested": ({"sample_size": [[16], [16]]}, "sample_size is"),
    "size as text": ({"sample_size": "16"}, "sample_size is"),
    "size of three": ({"sample_size": [16, 16, 16]}, "sample_size is"),
    "size negative": ({"sample_size": -16}, "sample_size is"),
    "colours true": ({"in_channels": True, "out_channels": True}, "wrong type or number"),
    "colours nested": ({"in_channels": [3]}, "wrong type or number"),
    "dropout as text": ({"dropout": "much"}, "wrong type or number"),
    "dropout of two": ({"dropout": 2}, "wrong type or number"),
    "centre as text": ({"center_input_sample": "yes"}, "wrong type or number"),
    "heads nested": ({"attention_head_dim": [8]}, "wrong type or number"),
    "times nested": ({"time_embedding_dim": {"a": 1}}, "time_embedding_dim is"),
    "activation nested": ({"act_fn": [["silu"]]}, "act_fn is"),
}


@pytest.mark.parametrize("name", CRAFTED)
def test_crafted_configs_are_one_line(name, tmp_path):
    content, message = CRAFTED[name]
    folder = write(tmp_path, {**TINY, **content} if isinstance(content, dict) else TINY)
    if not isinstance(content, dict):
        (tmp_path / CONFIG).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message) as error:
        read(folder)
    text = str(error.value)
    assert "\n" not in text
    assert str(tmp_path) in text
    assert len(text) < 500


CRAFTED_SCHEDULES = {
    "steps as text": {"num_train_timesteps": "many"},
    "steps huge": {"num_train_timesteps": 10**12},
    "steps none": {"num_train_timesteps": None},
    "no steps": {"num_train_timesteps": 0},
    "beta as text": {"beta_start": "0.1"},
    "beta nested": {"beta_end": [0.02]},
    "beta negative": {"beta_start": -1.0},
    "betas the wrong way round": {"beta_start": 0.3, "beta_end": 0.1},
    "beta huge": {"beta_end": 1e300},
}


@pytest.mark.parametrize("name", CRAFTED_SCHEDULES)
def test_crafted_schedules_are_one_line(name, tmp_path):
    with pytest.raises(UserError, match="values of a wrong type or number") as error:
        read(write(tmp_path, TINY, scheduler=CRAFTED_SCHEDULES[name]))
    assert "\n" not in str(error.value)


def test_a_config_of_another_size_than_the_weights_makes_nothing_of_it(tiny, tmp_path):
    folder = write(tmp_path, {**TINY, "block_out_channels": [32 * 600, 32 * 1200]}, tiny[1])
    with pytest.raises(UserError, match=r"do not fit its config\.json"):
        diffusers_weights.load(folder, read(folder))


def test_a_weight_under_two_names_is_refused(tiny, tmp_path):
    name = next(name for name in tiny[1] if ".to_q." in name)
    folder = write(tmp_path, TINY, {**tiny[1], old_name(name): tiny[1][name].clone()})
    with pytest.raises(UserError, match="under its old and its new name"):
        diffusers_weights.load(folder, read(folder))


def test_whole_numbers_are_no_weights(tiny, tmp_path):
    folder = write(tmp_path, TINY, {**tiny[1], "conv_in.bias": torch.zeros(32, dtype=torch.int32)})
    with pytest.raises(UserError, match=r"conv_in\.bias as torch\.int32"):
        diffusers_weights.load(folder, read(folder))


def test_missing_and_damaged_weight_files_are_told(tiny, tmp_path):
    folder = write(tmp_path, TINY)
    with pytest.raises(UserError, match=f"there is no {WEIGHTS}"):
        diffusers_weights.load(folder, read(folder))
    (folder / "diffusion_pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(UserError, match="save_pretrained"):
        diffusers_weights.load(folder, read(folder))
    (folder / WEIGHTS).write_bytes((tiny[0] / WEIGHTS).read_bytes()[:1000])
    with pytest.raises(UserError, match="damaged"):
        diffusers_weights.load(folder, read(folder))


def test_the_whole_table_is_used_once(tiny):
    folder, weights = tiny
    net = diffusers_weights.load(folder, read(folder))
    table = diffusers_weights.name_table(net)
    assert set(table) == set(load_file(folder / WEIGHTS)) == set(weights)
    assert sorted(id(p) for p, _ in table.values()) == sorted(id(p) for p in net.parameters())
