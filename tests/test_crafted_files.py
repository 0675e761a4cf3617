"""Damaged and crafted files of weights: each is refused in one line that names it and a remedy, and nothing changes."""

import contextlib
import copy
import io
import json
import pickle
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import save

import losses
import models
from basics import tensor_files
from basics.console import UserError
from configs.base import to_dict
from metrics import weights
from scripts import tensor_bundle
from storage.arrays import read_arrays
from storage.checkpoints import load_ema_weights, read_checkpoint, restore_state, write_checkpoint

CONFIG = to_dict(tiny.config())
NAN, HUGE = float("nan"), 10**400


@pytest.fixture(scope="module")
def content(tmp_path_factory):
    """What a checkpoint after two steps holds."""
    config = tiny.config()
    state = losses.create_state(config, models.create_model(config))
    for parameter in state.net.parameters():
        parameter.grad = torch.full_like(parameter, 1e-3)
    state.optimizer.step()
    state.step, state.ema.num_updates = 1, 1
    path = tmp_path_factory.mktemp("crafted") / "checkpoint.pth"
    data = {"fingerprint": "ab", "images": 3, "source": "photos"}
    write_checkpoint(path, state, to_dict(config), config.seed, data)
    return torch.load(path, weights_only=True)


def nested(depth):
    value = {}
    for _ in range(depth):
        value = {"a": value}
    return value


def doubled(times):
    """A list that would be 2^times long if it were written out, in a few bytes."""
    value = []
    for _ in range(times):
        value = [value, value]
    return value


def put(*path_and_value):
    """A change of a nested entry."""
    *path, name, value = path_and_value

    def change(content):
        for key in path:
            content = content[key]
        content[name] = value

    return change


def fill(value, *path):
    def change(content):
        for key in path:
            content = content[key]
        content.view(-1)[0] = value

    return change


WEIGHT = "module.all_modules.2.bias"  # (32,)
EVERY_READER = {  # what neither reconstructing nor training can use
    "model is text": (put("model", "weights"), "no tensors by name"),
    "a weight is text": (put("model", WEIGHT, "0"), "no tensors by name"),
    "a weight's name is a number": (put("model", 3, torch.zeros(2)), "no tensors by name"),
    "a weight of whole numbers": (put("model", WEIGHT, torch.zeros(32, dtype=torch.int64)), "is of torch.int64"),
    "a complex weight": (put("model", WEIGHT, torch.zeros(32, dtype=torch.complex64)), "is of torch.complex64"),
    "a sparse weight": (put("model", WEIGHT, torch.zeros(32).to_sparse()), "no dense tensor"),
    "one number a trillion times": (put("model", WEIGHT, torch.zeros(1).expand(10**12)), "no dense tensor"),
    "a weight of another shape": (put("model", WEIGHT, torch.zeros(31)), r"is \(31,\), the config's is \(32,\)"),
    "two weights of one name": (put("model", "_orig_mod." + WEIGHT, torch.zeros(32)), "two weights of one name"),
    "EMA is a list": (put("ema", [1]), "no tensors by name"),
    "EMA's weights are numbers": (put("ema", "shadow_params", [1.0, 2.0]), "no tensors by name"),
    "EMA's weights are a table": (put("ema", "shadow_params", {}), "no tensors by name"),
    "EMA of whole numbers": (
        put("ema", "shadow_params", 0, torch.zeros(128, 32).int()),
        "EMA weight 0 is of torch.int",
    ),
    "EMA of another shape": (put("ema", "shadow_params", 0, torch.zeros(2)), r"EMA weight 0 is \(2,\)"),
    "EMA of NaN": (fill(NAN, "ema", "shadow_params", 3), "NaN or infinite weights"),
    "EMA too large for float32": (
        lambda c: c["ema"]["shadow_params"].__setitem__(1, torch.full((128,), 1e300, dtype=torch.float64)),
        "NaN or infinite weights",
    ),
    "step is text": (put("step", "many"), "its step is no whole number"),
    "step is negative": (put("step", -1), "its step is no whole number"),
    "step is huge": (put("step", HUGE), "its step is no whole number"),
    "step is NaN": (put("step", NAN), "its step is no whole number"),
    "step is true": (put("step", True), "its step is no whole number"),
    "config is text": (put("config", "vp"), "its config is no table"),
    "config is empty": (put("config", {}), "its config lacks data.image_size"),
    "config has another section": (put("config", "net", {}), "has a part 'net'"),
    "config's section is a number": (put("config", "model", 3), "has a part 'model'"),
    "config's names are numbers": (put("config", "model", 3, 4), "fields without names"),
    "config lacks the SDE": (lambda c: c["config"]["training"].pop("sde"), r"its config lacks training\.sde"),
    "config nests": (put("config", "model", "nf", nested(50)), r"model\.nf is neither a number nor text"),
    "config doubles": (put("config", "model", "ch_mult", doubled(60)), r"model\.ch_mult is neither"),
    "config holds tensors": (put("config", "model", "nf", torch.zeros(3)), r"model\.nf is neither"),
    "config holds NaN": (put("config", "model", "beta_max", NAN), r"model\.beta_max is neither"),
    "config holds huge numbers": (put("config", "model", "nf", HUGE), r"model\.nf is neither"),
    "config holds text for a number": (put("config", "model", "nf", "32"), r"model\.nf is of another type"),
    "config holds a number for text": (put("config", "training", "sde", 3), "names no network or no SDE"),
    "config of another size": (put("config", "data", "image_size", 64), r"data\.image_size: 64 there, 8 here"),
    "randomness is a list": (put("randomness", [1]), "its part randomness is no table"),
    "seed is text": (put("randomness", "seed", "x"), "its seed is no whole number"),
    "precision is a list": (put("precision", [1]), "its precision is no word"),
    "precision is long": (put("precision", "x" * 999), "its precision is no word"),
    "data is text": (put("data", "photos"), "its part data is no table"),
    "data without a fingerprint": (put("data", {"images": 3}), "no fingerprint"),
}


def moment(name, value):
    return put("optimizer", "state", 0, name, value)


TRAINING = {  # what reconstructing does not look at
    "weights of NaN": (fill(NAN, "model", WEIGHT), "NaN or infinite weights"),
    "EMA without a count": (lambda c: c["ema"].pop("num_updates"), "the EMA's number of updates is no whole number"),
    "EMA of a negative count": (put("ema", "num_updates", -3), "the EMA's number of updates is no whole number"),
    "EMA's decay is NaN": (put("ema", "decay", NAN), "the EMA's decay is no number from 0 to 1"),
    "EMA's decay is text": (put("ema", "decay", "slow"), "the EMA's decay is no number"),
    "optimizer is a list": (put("optimizer", []), "no single group"),
    "optimizer is empty": (put("optimizer", {}), "no single group"),
    "two groups": (lambda c: c["optimizer"]["param_groups"].append({}), "no single group"),
    "a group without parameters": (put("optimizer", "param_groups", 0, "params", None), "are no list of numbers"),
    "parameters by name": (put("optimizer", "param_groups", 0, "params", ["a"]), "are no list of numbers"),
    "fewer parameters": (lambda c: c["optimizer"]["param_groups"][0]["params"].pop(), r"the optimizer has \d+ param"),
    "lr is text": (put("optimizer", "param_groups", 0, "lr", "fast"), "the optimizer's lr is no number"),
    "eps is NaN": (put("optimizer", "param_groups", 0, "eps", NAN), "the optimizer's eps is no number"),
    "state is a list": (put("optimizer", "state", [1]), "is no table of its parameters"),
    "state of an unknown parameter": (put("optimizer", "state", 999, {}), "is no table of its parameters"),
    "state of a parameter missing": (lambda c: c["optimizer"]["state"].pop(2), "lacks parameter 2"),
    "state is text": (put("optimizer", "state", 0, "x"), "has no exp_avg and exp_avg_sq"),
    "a moment missing": (lambda c: c["optimizer"]["state"][0].pop("exp_avg_sq"), "has no exp_avg and exp_avg_sq"),
    "a moment of another shape": (moment("exp_avg", torch.zeros(2)), r"exp_avg is \(2,\), the config's is"),
    "a second moment of another shape": (moment("exp_avg_sq", torch.zeros(2)), r"exp_avg_sq is \(2,\)"),
    "a moment of whole numbers": (moment("exp_avg", torch.zeros(128, 32).int()), "has no exp_avg and exp_avg_sq"),
    "one number for all": (moment("exp_avg", torch.zeros(1).expand(128, 32)), "has no exp_avg and exp_avg_sq"),
    "a moment of NaN": (fill(NAN, "optimizer", "state", 0, "exp_avg"), "exp_avg holds NaN"),
    "a negative square": (fill(-1.0, "optimizer", "state", 0, "exp_avg_sq"), "exp_avg_sq holds negative numbers"),
    "Adam's step is text": (moment("step", "x"), "step is no number"),
    "Adam's step is a row": (moment("step", torch.zeros(3)), "step is no number"),
    "Adam's step is negative": (moment("step", torch.tensor(-1.0)), "step is no number from 0"),
    "Adam's step is infinite": (moment("step", torch.tensor(float("inf"))), "step is no number"),
}


def resume(path):
    """Tries to; the state must be as before."""
    config = tiny.config()
    state = losses.create_state(config, models.create_model(config))
    before = copy.deepcopy((state.net.state_dict(), state.ema.state_dict(), state.optimizer.state_dict(), state.step))
    try:
        restore_state(path, state, CONFIG, config.seed)
    except UserError:
        after = state.net.state_dict(), state.ema.state_dict(), state.optimizer.state_dict(), state.step
        assert tiny.same(before, after)
        raise


def reconstruct(path):
    net = models.create_model(tiny.config())
    before = copy.deepcopy(net.state_dict())
    try:
        load_ema_weights(path, net, CONFIG)
    except UserError:
        assert tiny.same(before, net.state_dict())
        raise


def refuses(read, path, message):
    with pytest.raises(UserError, match=message) as error:
        read(path)
    text = str(error.value)
    assert "\n" not in text
    assert str(path) in text
    assert len(text) < 700
    assert "; " in text  # then the remedy


@pytest.fixture
def write(content, tmp_path):
    def write(change):
        changed = copy.deepcopy(content)
        change(changed)
        torch.save(changed, tmp_path / "crafted.pth")
        return tmp_path / "crafted.pth"

    return write


def test_the_checkpoint_itself_is_good(write):
    path = write(lambda content: None)
    reconstruct(path)
    resume(path)


@pytest.mark.parametrize("name", EVERY_READER)
def test_no_reader_takes_it(name, write):
    change, message = EVERY_READER[name]
    path = write(change)
    refuses(reconstruct, path, message)
    refuses(resume, path, message)


@pytest.mark.parametrize("name", TRAINING)
def test_training_does_not_continue_from_it(name, write):
    """`exp_avg` of another shape crashed the interpreter: fused Adam trusts shapes."""
    change, message = TRAINING[name]
    path = write(change)
    reconstruct(path)
    refuses(resume, path, message)


# --------------------------------------------------------------------------------------------- the files themselves


def zipped(path, parts, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in parts.items():
            archive.writestr(name, data)


def parts_of(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    with zipfile.ZipFile(buffer) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def inflating(path):
    parts = parts_of({"model": torch.zeros(1 << 22)})
    zipped(path, parts, zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 100_000


def claiming(path):
    """Four numbers in the file, a hundred million in its table of contents."""
    parts = parts_of({"a": torch.zeros(4)})
    name = next(name for name in parts if name.endswith("data.pkl"))
    big = b"J" + (100_000_000).to_bytes(4, "little")
    parts[name] = parts[name].replace(b"K\x04t", big + b"t").replace(b"K\x04\x85", big + b"\x85")
    zipped(path, parts)


def flipped(path):
    torch.save({"a": torch.ones(5000)}, path)
    data = bytearray(path.read_bytes())
    data[10_000:10_500] = bytes(500)
    path.write_bytes(data)


PROTOCOL = b"\x80\x02"


def pickled(code):
    """A torch file of a pickle's code."""

    def write(path):
        parts = parts_of({})
        name = next(name for name in parts if name.endswith("data.pkl"))
        zipped(path, {**parts, name: PROTOCOL + code})

    return write


def numbers_of(type_, data):
    """A pickle of numpy.core.multiarray.scalar(dtype(type_), data)."""

    text = b"X" + struct.pack("<I", len(type_)) + type_
    return pickled(b"cnumpy.core.multiarray\nscalar\ncnumpy\ndtype\n" + text + b"\x85R" + data + b"\x86R.")


TORCH_FILES = {
    "inflates": (inflating, "claims to hold 16,777,.* bytes in a file of"),
    "claims more numbers than it has": (claiming, "is damaged or truncated"),
    "500 bytes zeroed": (flipped, "is damaged: the checksum of its part .*data/0 differs"),
    "a zip of nothing": (lambda path: zipped(path, {}), "is damaged|no torch file"),
    "a zip's head alone": (lambda path: path.write_bytes(b"PK\x03\x04" + bytes(100)), "is damaged or truncated"),
    "a NumPy object": (numbers_of(b"O", b"]"), "holds a NumPy type that is no number"),
    "a NumPy text of a gigabyte": (numbers_of(b"S1000000000", b"N"), "holds a NumPy type that is no number"),
    "a NumPy number without bytes": (numbers_of(b"<f8", b"N"), "is damaged"),
    "deep nesting, plain": (lambda path: path.write_bytes(PROTOCOL + b"]" * 10**5 + b"."), "is damaged|no torch"),
    "nested 10,000 deep": (pickled(b"]" * 9999 + b"a" * 9998 + b"."), "is damaged|is no checkpoint"),
    "an endless memo": (lambda path: path.write_bytes(b"\x80\x02]q\xff."), "is damaged|is no checkpoint"),
}


@pytest.mark.parametrize("name", TORCH_FILES)
def test_torch_files(name, tmp_path):
    make, message = TORCH_FILES[name]
    make(tmp_path / "crafted.pth")
    refuses(read_checkpoint, tmp_path / "crafted.pth", message)
    with contextlib.suppress(UserError):  # or a list, which each metric refuses itself
        weights.read(tmp_path / "crafted.pth", "the weights", "fetch them again")


SCALARS = [np.float64(1e-3), np.float32(0.5), np.float16(2), np.int64(-7), np.int32(5), np.uint8(200), np.bool_(True)]


@pytest.mark.parametrize("value", SCALARS, ids=lambda value: type(value).__name__)
@pytest.mark.parametrize("order", "<>")
def test_numpy_numbers_are_read(value, order, tmp_path):
    value = value.astype(value.dtype.newbyteorder(order))
    torch.save({"x": value, "twice": [value, value]}, tmp_path / "x.pth")
    found = tensor_files.read_torch(tmp_path / "x.pth")
    assert found["x"] == value
    assert found["x"].dtype == value.dtype
    assert found["twice"] == [value, value]


def test_numpy_numbers_in_a_checkpoint(write):
    def change(content):
        content["step"], content["ema"]["num_updates"] = np.int64(1), np.int32(1)
        content["ema"]["decay"] = np.float64(0.99)
        content["config"]["model"]["beta_max"] = np.float32(20.0)
        content["optimizer"]["param_groups"][0]["lr"] = np.float32(0.1)

    resume(write(change))
    reconstruct(write(change))


def test_arrays_that_inflate(tmp_path):
    np.savez_compressed(tmp_path / "a.npz", settings=np.array("{}"), x=np.zeros(1 << 20))
    with pytest.raises(UserError, match=r"a\.npz is damaged or truncated; delete it"):
        read_arrays(tmp_path / "a.npz", {})


# ----------------------------------------------------------------------------------------------------- safetensors


def tensors():
    return {"a": torch.zeros(2)}


def with_header(header, data=b""):
    return struct.pack("<Q", len(header)) + header + data


def of_config(text, **more):
    return save(tensors(), {"config": text, "step": "3", **more})


SAFETENSORS = {
    "empty": (b"", "is damaged or truncated"),
    "a huge header": (struct.pack("<Q", 1 << 60) + b"{}", "is damaged or truncated"),
    "a header of 90 MB announced": (struct.pack("<Q", 90_000_000) + b"{}" * 100, "is damaged or truncated"),
    "a header that nests": (with_header(b'{"a":' * 5000), "is damaged or truncated"),
    "a header of a list": (with_header(b"[1, 2]"), "is damaged or truncated"),
    "false offsets": (
        with_header(b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,800000000]}}', bytes(8)),
        "is damaged or truncated",
    ),
    "a false shape": (
        with_header(b'{"a":{"dtype":"F32","shape":[1000000000],"data_offsets":[0,8]}}', bytes(8)),
        "is damaged or truncated",
    ),
    "an unknown type": (
        with_header(b'{"a":{"dtype":"F99","shape":[2],"data_offsets":[0,8]}}', bytes(8)),
        "is damaged or truncated",
    ),
    "notes that are no text": (with_header(b'{"__metadata__":{"step":3}}'), "is damaged or truncated"),
    "whole numbers": (save({"a": torch.zeros(2, dtype=torch.int32)}), "holds a as torch.int32"),
    "bytes of eight bits": (save({"a": torch.zeros(2).to(torch.float8_e5m2)}), "holds a as torch.float8"),
    "config is no JSON": (of_config("{oh"), "its config or step is no JSON"),
    "config nests": (of_config('{"a":' * 10**5 + "1" + "}" * 10**5), "its config or step is no JSON"),
    "config is a list": (of_config("[1]"), "its config is no table"),
    "config is a number": (of_config("3"), "its config is no table"),
    "config's sections are lists": (of_config('{"model": []}'), "has a part 'model'"),
    "config without sections": (of_config("{}"), r"its config lacks data\.image_size"),
    "config holds NaN": (of_config('{"seed": NaN}'), "its config or step is no JSON"),
    "config holds a huge number": (of_config('{"seed": 1' + "0" * 300 + "}"), "its config's seed is neither"),
    "config holds one of a million digits": (
        of_config('{"seed": ' + "1" * 10**6 + "}"),
        "its config or step is no JSON",
    ),
    "step is text": (save(tensors(), {"step": '"three"'}), "its step is no whole number"),
    "step is a list": (save(tensors(), {"step": "[]"}), "its step is no whole number"),
    "step is negative": (save(tensors(), {"step": "-1"}), "its step is no whole number"),
    "step is infinite": (save(tensors(), {"step": "Infinity"}), "its config or step is no JSON"),
    "other weights": (save(tensors()), "does not fit the config: .* is missing"),
}


@pytest.mark.parametrize("name", SAFETENSORS)
def test_safetensors(name, tmp_path):
    data, message = SAFETENSORS[name]
    (tmp_path / "x.safetensors").write_bytes(data)
    refuses(reconstruct, tmp_path / "x.safetensors", message)


@pytest.mark.parametrize("seed", range(40))
def test_random_damage_is_one_line_or_nothing(seed, content, tmp_path):
    """Bytes changed at random, in a checkpoint's table of contents and anywhere in a safetensors file."""
    rng = np.random.default_rng(seed)
    parts = parts_of({**content, "model": {}, "ema": {"shadow_params": []}, "optimizer": {}})
    name = next(name for name in parts if name.endswith("data.pkl"))
    light = save({"a": torch.zeros(2)}, {"config": json.dumps(CONFIG), "step": "3"})
    for _ in range(10):
        body, other = bytearray(parts[name]), bytearray(light)
        for data in (body, other):
            for place in rng.integers(0, len(data), rng.integers(1, 6)):
                data[place] = rng.integers(256)
        zipped(tmp_path / "x.pth", {**parts, name: bytes(body)})
        (tmp_path / "x.safetensors").write_bytes(other)
        for path in (tmp_path / "x.pth", tmp_path / "x.safetensors"):
            with pytest.raises(UserError):
                reconstruct(path)


# -------------------------------------------------------------------------------------------- TensorFlow's bundles


def varint(number):
    out = b""
    while number > 127:
        out, number = out + bytes([number & 127 | 128]), number >> 7
    return out + bytes([number])


def sealed(block):
    checksum = tensor_bundle._masked(tensor_bundle.crc32c(block + b"\0"))
    return block + b"\0" + struct.pack("<I", checksum)


def block_of(rows):
    body = b"".join(varint(0) + varint(len(key)) + varint(len(value)) + key + value for key, value in rows)
    return body + struct.pack("<II", 0, 1)


def index_of(rows, handles=1):
    """An index file of one block of rows, which its table of blocks names so many times."""
    block = block_of(rows)
    handle = varint(0) + varint(len(block))
    table = block_of([(b"z", handle)] * handles)
    data = sealed(block) + sealed(table)
    footer = varint(0) + varint(0) + varint(len(block) + 5) + varint(len(table))
    return data + footer.ljust(40, b"\0") + struct.pack("<Q", tensor_bundle.MAGIC)


def entry(size, dims=(2,), offset=0, dtype=1):
    dims = b"".join(b"\x12" + bytes([len(d) + 1]) + b"\x08" + d for d in map(varint, dims))
    shape = b"\x12" + varint(len(dims)) + dims
    return b"\x08" + varint(dtype) + shape + b"\x20" + varint(offset) + b"\x28" + varint(size) + b"\x35" + bytes(4)


HEADER = (b"", b"\x08\x01")
BUNDLES = {
    "sizes beyond the file": (index_of([HEADER, (b"w", entry(8 << 40, (2 << 40,)))]), "truncated or damaged"),
    "shapes that overflow": (index_of([HEADER, (b"w", entry(8, (1 << 62, 8)))]), "partitioned or of a type"),
    "nothing": (index_of([HEADER, (b"w", entry(0, (0,)))]), "partitioned or of a type"),
    "an unknown type": (index_of([HEADER, (b"w", entry(8, dtype=77))]), "partitioned or of a type"),
    "an offset beyond the file": (index_of([HEADER, (b"w", entry(8, offset=1 << 60))]), "truncated or damaged"),
    "too many axes": (index_of([HEADER, (b"w", entry(4, (1,) * 40))]), "more than eight axes"),
    "one block a thousand times": (index_of([HEADER, (b"w", entry(8))], handles=1000), "its blocks overlap"),
    "a number of a million bytes": (index_of([HEADER, (b"w", b"\x08" + b"\xff" * 10**6 + b"\x01")]), "more than ten"),
    "shards as text": (index_of([(b"", b"\x0a\x01x"), (b"w", entry(8))]), "its number of shards"),
    "text for an offset": (index_of([HEADER, (b"w", b"\x22\x01x")]), "text where numbers belong"),
    "names that are no text": (index_of([HEADER, (b"\xff", entry(8))]), "is no checkpoint index"),
}


@pytest.mark.parametrize("name", BUNDLES)
def test_bundles(name, tmp_path):
    data, message = BUNDLES[name]
    (tmp_path / "b.index").write_bytes(data)
    (tmp_path / "b.data-00000-of-00001").write_bytes(bytes(8))
    with pytest.raises(UserError, match=message) as error:
        tensor_bundle.Bundle(tmp_path / "b").read("w")
    assert "\n" not in str(error.value)


def test_the_bundles_of_this_test_are_read(tmp_path):
    good = entry(8)[:-4] + struct.pack("<I", tensor_bundle._masked(tensor_bundle.crc32c(bytes(8))))
    (tmp_path / "b.index").write_bytes(index_of([HEADER, (b"w", good)]))
    (tmp_path / "b.data-00000-of-00001").write_bytes(bytes(8))
    assert tensor_bundle.Bundle(Path(tmp_path / "b")).read("w").tolist() == [0, 0]


def test_weights_of_metrics_must_be_finite(tmp_path):
    torch.save({"w": torch.tensor([1.0, NAN])}, tmp_path / "w.pth")
    with pytest.raises(UserError, match="numbers that are not finite"):
        weights.read(tmp_path / "w.pth", "the weights", "fetch them again")
    (tmp_path / "w.pth").write_bytes(pickle.dumps({"w": 1}, 2))
    with pytest.raises(UserError, match="are damaged, or hold more than tensors"):
        weights.read(tmp_path / "w.pth", "the weights", "fetch them again")
