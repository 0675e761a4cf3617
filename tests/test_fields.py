"""The table of config fields: it covers the tree, agrees with the tables it names, and refuses what cannot be."""

import math
import re

import pytest
import tiny
from helpers import load_config
from ml_collections import ConfigDict
from test_configs import LEAVES, fields, load

import models
import sampling
import sde_lib
from basics.console import UserError
from configs import base
from configs.base import ABSENT, TREE, check
from configs.fields import FIELDS, Choice, Flag, NonZero, OneOf, Real, Text, Whole, Wholes, check_value
from configs.presets import NCSNPP, SUBVP, build
from lmd import evaluation, process, samples
from models import inference, layers, ncsnpp

KINDS = base._flat(FIELDS)


@pytest.mark.parametrize("path", LEAVES)
def test_every_config_passes(path):
    check(load(path).get_config())


def test_the_table_mirrors_the_tree():
    assert KINDS.keys() == base._flat(TREE).keys()
    for path, value in base._flat(TREE).items():
        assert value is ABSENT or KINDS[path].accepts(value), path


TABLES = {
    "model.name": models.MODELS,
    "model.nonlinearity": layers.ACTIVATIONS,
    "model.embedding_type": ncsnpp.EMBEDDINGS,
    "model.resblock_type": ncsnpp.BLOCKS,
    "model.progressive": ncsnpp.OUTPUTS,
    "model.progressive_input": ncsnpp.INPUTS,
    "model.progressive_combine": ncsnpp.COMBINE,
    "model.normalization": [ncsnpp.FIXED["normalization"]],
    "model.attention_type": [ncsnpp.FIXED["attention_type"]],
    "training.sde": sde_lib.SDES,
    "training.precision": inference.PRECISIONS,
    "training.compile": inference.CHOICES,
    "sampling.method": samples.METHODS,
    "sampling.predictor": sampling.PREDICTORS,
    "sampling.corrector": sampling.CORRECTORS,
    "sampling.sampler": [process.PUBLISHED, *process.SAMPLERS],
    "sampling.time_grid": sampling.TIME_GRIDS,
    "sampling.constraint": sampling.CONSTRAINTS,
    "sampling.lift": sampling.LIFTS,
    "optim.optimizer": ["adam"],
    "eval.bpd_dataset": evaluation.BPD_REPEATS,
}


def test_choices_are_those_of_the_tables():
    choices = {path: kind.names for path, kind in KINDS.items() if isinstance(kind, Choice)}
    assert choices.keys() == TABLES.keys()
    assert {path: set(names) for path, names in choices.items()} == {p: set(table) for p, table in TABLES.items()}
    assert KINDS["model.conv_size"] == OneOf((ncsnpp.FIXED["conv_size"],))


BAD = {  # of every kind some values that no field of the kind takes
    Whole: [-1, 2.0, True, "3", None, math.nan, math.inf, 10**400, 10**5000],
    Real: [math.nan, math.inf, -math.inf, "0.5", True, None, (1.0,), 10**400, 10**5000],
    NonZero: [0, math.nan, math.inf, "1", 10**400, 10**5000],
    Flag: [1, "True", None],
    Text: [3, None, "a\0b"],
    Choice: ["junk", 3, None],
    OneOf: [2, 0, True, 3.0, "3", 10**5000],
    Wholes: [3, (-1,), (1.5,), ("1",), (True,), None, (10**5000,)],
}


def whole():
    """A config with every field: a VP NCSN++."""
    every = {path: default for path, default in base._flat(TREE).items() if default is ABSENT}
    values = {
        "data.category": "bedroom",
        "data.tfrecords_path": "",
        "model.sigma_begin": 50.0,
        "optim.amsgrad": False,
        "data.dataset": "LSUN",
    }
    config = build(NCSNPP, SUBVP, values)
    assert {path for path, _ in fields(config)} >= every.keys()
    return config


def outside(kind):
    """Values just beyond the bounds of a kind."""
    if isinstance(kind, Whole):
        return [kind.low - 1] + ([] if kind.high is None else [kind.high + 1])
    if isinstance(kind, Real):
        bounds = [(kind.low, -1e-9), (kind.high, 1e-9), (kind.above, 0), (kind.below, 0)]
        return [bound + step * max(1, abs(bound)) for bound, step in bounds if bound is not None]
    if isinstance(kind, Wholes):
        return (
            [(kind.low - 1,), (kind.high + 1,), (1,) * 65]
            + ([()] if kind.count else [])
            + ([(0, 0)] if kind.low == 0 else [])
        )
    return []


@pytest.mark.parametrize("path", KINDS)
def test_every_field_is_refused_a_wrong_value_by_name(path):
    kind = KINDS[path]
    devices = ["", "cuda:", "cuda:-1", "cuda:9999", "cuda:\u0663", "tpu"]
    bad = [*BAD[type(kind)], *outside(kind), *(devices if path == "device" else [])]
    for value in bad:
        tree = whole().to_dict()
        check(ConfigDict(tree))
        section, _, name = path.rpartition(".")
        (tree[section] if section else tree)[name] = value
        config = ConfigDict(tree)
        with pytest.raises(UserError) as error:
            check(config)
        text = str(error.value)
        assert f"config.{path}" in text, value
        assert "\n" not in text
        assert re.search(r"it must be|choose one of", text), text


CASES = {  # the bounds are told
    ("model.nf", 0): "config.model.nf is 0; it must be an int from 4 to 8192",
    ("model.nf", -32): "config.model.nf is -32; it must be an int from 4 to 8192",
    ("model.num_scales", 0): "config.model.num_scales is 0; it must be an int from 1 to 1000000",
    ("model.ema_rate", 1.5): "config.model.ema_rate is 1.5; it must be a finite number of at least 0 and at most 1",
    ("model.ema_rate", math.nan): "config.model.ema_rate is nan; it must be a finite number of at least 0",
    ("model.dropout", 1.0): "config.model.dropout is 1.0; it must be a finite number of at least 0 and below 1",
    ("model.ch_mult", (1, 0)): "config.model.ch_mult is (1, 0); it must be a tuple of one or more ints from 1 to ",
    (
        "model.attn_resolutions",
        (8.0,),
    ): "config.model.attn_resolutions is (8.0,); it must be a tuple of ints from 1 ",
    ("training.n_iters", -1): "config.training.n_iters is -1; it must be an int from 0 to 1000000000000",
    ("sampling.steps", -3): "config.sampling.steps is -3; it must be an int from 0 to 1000000",
    ("sampling.snr", 0.0): "config.sampling.snr is 0.0; it must be a finite number above 0",
    ("sampling.n_steps_each", -1): "config.sampling.n_steps_each is -1; it must be an int from 1 to 1000",
    ("optim.lr", -1.0): "config.optim.lr is -1.0; it must be a finite number above 0",
    ("optim.warmup", -1): "config.optim.warmup is -1; it must be an int from 0 to 1000000000000",
    ("optim.grad_clip", math.nan): "config.optim.grad_clip is nan; it must be a finite number other than 0",
    ("data.image_size", 0): "config.data.image_size is 0; it must be an int from 1 to 8192",
    ("data.image_size", 100_000): "config.data.image_size is 100000; it must be an int from 1 to 8192",
    ("data.num_channels", 2): "config.data.num_channels is 2; it must be 1 or 3",
    ("seed", -1): "config.seed is -1; it must be an int from 0 to 9223372036854775807",
    ("device", "gpu"): "config.device is 'gpu'; it must be auto, cpu, cuda or cuda:i",
    ("model.name", "unet"): "unknown model (config.model.name) 'unet'; choose one of: ddpm, ncsnpp",
    ("eval.bpd_dataset", "valid"): "unknown split (config.eval.bpd_dataset) 'valid'; choose one of: train, test",
    ("eval.begin_ckpt", 27): "config.eval.begin_ckpt is 27; it must be at most config.eval.end_ckpt, which is 26",
    ("model.beta_min", 30.0): "config.model.beta_min is 30.0; it must be at most config.model.beta_max, which is 20.0",
    ("model.sigma_min", 50.0): "config.model.sigma_min is 50.0; it must be below config.model.sigma_max, which is 50.0",
}


def test_every_number_of_things_has_an_upper_bound():
    counts = {path: kind.high for path, kind in KINDS.items() if isinstance(kind, (Whole, Wholes))}
    assert None not in counts.values()


def test_the_width_of_a_network_is_bounded():
    config = whole()
    config.model.nf, config.model.ch_mult = 8192, (1, 128)
    with pytest.raises(UserError, match=r"ch_mult \(1, 128\) times config\.model\.nf 8192 makes 1,048,576 channels"):
        check(config)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}={case[1]}")
def test_the_bounds_are_told(case):
    config = whole()
    config.update_from_flattened_dict({case[0]: case[1]})
    with pytest.raises(UserError) as error:
        check(config)
    assert str(error.value).startswith(CASES[case])


def drop(config, path):
    section, _, name = path.rpartition(".")
    del (config[section] if section else config)[name]


def add(path, value=1):
    def change(config):
        section, _, name = path.rpartition(".")
        with config.unlocked():
            (config[section] if section else config)[name] = value

    return change


STRUCTURE = {  # what a user's own config file may get wrong
    "no section": (lambda c: drop(c, "sampling"), "the config lacks config.sampling; add it"),
    "no field": (lambda c: drop(c, "model.nf"), "the config lacks config.model.nf; add it (usually 128)"),
    "no field of ours": (lambda c: drop(c, "sampling.eta"), "the config lacks config.sampling.eta; add it (usually 1"),
    "no top field": (lambda c: drop(c, "seed"), "the config lacks config.seed; add it"),
    "no field of the network": (lambda c: drop(c, "model.fir"), "lacks config.model.fir, which config.model.name=nc"),
    "no field of the SDE": (lambda c: drop(c, "model.beta_min"), "which config.training.sde=subvpsde needs; add it"),
    "a typo": (add("training.batchsize"), "unknown field config.training.batchsize; did you mean config.training.bat"),
    "another section": (add("training.lr"), "unknown field config.training.lr; did you mean config.optim.lr?"),
    "a top typo": (add("sede"), "unknown field config.sede; did you mean config.seed?"),
    "nothing like it": (add("model.qqqq"), "unknown field config.model.qqqq; remove it (configs/base.py lists all"),
    "a number for a section": (add("model"), "config.model is 1; it must be a section of fields"),
}  # fmt: skip


@pytest.mark.parametrize("name", STRUCTURE)
def test_missing_and_unknown_fields_are_named(name):
    change, message = STRUCTURE[name]
    config = whole()
    with config.ignore_type():
        change(config)
    with pytest.raises(UserError, match=re.escape(message)):
        check(config)


def test_a_plain_dict_is_no_config():
    with pytest.raises(UserError, match=r"get_config\(\) of the config file gave a dict; have it return a ConfigDict"):
        check({"seed": 1})


def test_discrete_training_of_too_few_scales():
    config = tiny.config(training__sde="vpsde", training__continuous=False, model__num_scales=20)
    with pytest.raises(UserError, match="num_scales is 20; discrete training on the VP SDE needs more than 20"):
        check(config)
    config.model.num_scales = 21
    check(config)


@pytest.mark.parametrize(
    ("path", "changes", "message"),
    [
        ("ve/cifar10_ncsnpp_continuous.py", {"training.continuous": False}, "the embedding 'fourier' cannot take the"),
        ("ve/cifar10_ddpm.py", {"training.continuous": True}, "on the VE SDE the network is told the noise level, but"),
        (
            "ve/cifar10_ncsnpp_continuous.py",
            {"model.embedding_type": "positional"},
            "divides by that of a step whose number it is told (config.model.scale_by_sigma)",
        ),
    ],
)
def test_networks_that_cannot_read_their_labels(path, changes, message):
    """The logarithm of the number 0, and a noise level taken for a place in the table of noise levels."""
    config = load_config(path)
    check(config)
    config.update_from_flattened_dict(changes)
    with pytest.raises(UserError, match=re.escape(message)):
        check(config)


@pytest.mark.parametrize("value", [math.nan, math.inf, 0.0, -1.0])
def test_numbers_of_flags(value):
    with pytest.raises(UserError, match=r"--memory_gb is \S+; it must be a finite number above 0"):
        check_value("--memory_gb", value, Real(above=0))
