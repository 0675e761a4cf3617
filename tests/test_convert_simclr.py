"""Google's checkpoints: files that TensorFlow wrote, files that the writer below wrote, and damaged ones.

golden/simclr_tensorflow/ holds two small checkpoints of TensorFlow 2.21's tf.compat.v1.train.Saver: graphs of
tf.compat.v1.layers put together as SimCLRv2's (scopes base_model, head_contrastive, head_supervised; names of layers
left to TensorFlow; 2 channels; a MomentumOptimizer's slots and the global step), weights drawn at random.  The .npz
beside each holds what TensorFlow computed with it from (wave((3, 3, 32, 32), 0.4) + 1) / 2 in eval mode.
"""

import errno
import shutil
import struct
import subprocess
import sys

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
from helpers import GOLDEN, ROOT, fill_, tensor, wave

from basics import files
from basics.console import UserError
from metrics import simclr
from metrics.simclr_resnet import Architecture, ResNet
from scripts import convert_simclr, tensor_bundle

WRITTEN = GOLDEN / "simclr_tensorflow"
ARCHITECTURES = {
    "selective": Architecture((1, 2, 1, 1), 2, selective=True, classes=5),
    "plain": Architecture((1, 1, 1, 1), 2, selective=False, classes=5),
}


# ------------------------------------------------------------------------------------------ written by TensorFlow


@pytest.fixture(params=ARCHITECTURES)
def converted(request):
    """What TensorFlow computed, and our conversion."""
    content, architecture = convert_simclr.convert(WRITTEN / f"{request.param}-250228")
    assert architecture == ARCHITECTURES[request.param]
    network = ResNet(architecture).eval().requires_grad_(False)
    network.load_state_dict(content["resnet"])
    return np.load(WRITTEN / f"{request.param}.npz"), network, content["head"]


def test_features_are_tensorflows(converted):
    """Every layer is in its place: two layers exchanged would change the features."""
    expected, network, _ = converted
    features = network((wave((3, 3, 32, 32), 0.4) + 1) / 2)
    torch.testing.assert_close(features, tensor(expected["features"]), rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(network.fc(features), tensor(expected["logits"]), rtol=1e-5, atol=2e-6)


def test_head_is_tensorflows(converted):
    expected, _, head = converted
    x = tensor(expected["features"])
    for step in range(3):
        norm = [head[f"layers.{3 * step + 1}.{name}"] for name in ("running_mean", "running_var", "weight", "bias")]
        x = F.batch_norm(F.linear(x, head[f"layers.{3 * step}.weight"]), *norm)
        x = x if step == 2 else x.relu()
    assert len(head) == 3 * 6
    torch.testing.assert_close(x, tensor(expected["projection"]), rtol=1e-5, atol=2e-6)


def test_checksums_agree_with_tensorflows():
    bundle = tensor_bundle.Bundle(WRITTEN / "plain-250228")
    assert len(bundle.entries) == 163
    total = sum(bundle.read(name).nbytes for name in bundle.entries)  # reading checks each
    assert total == (WRITTEN / "plain-250228.data-00000-of-00001").stat().st_size
    assert bundle.read("global_step") == 0
    assert bundle.read("global_step").shape == ()


def test_command_line(tmp_path):
    shutil.copytree(WRITTEN, tmp_path / "source")
    out = tmp_path / "made" / "small.pth"
    command = [sys.executable, "-m", "scripts.convert_simclr"]
    with pytest.raises(UserError, match=r"several checkpoints, give one of: .*plain-250228, .*selective-250228"):
        convert_simclr.main([str(tmp_path / "source"), str(out)])
    for path in (tmp_path / "source").glob("plain*"):
        path.unlink()
    done = subprocess.run([*command, tmp_path / "source", out], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == f"{out}: 17 layers, width 0.03125, with selective kernels\n"
    assert [path.name for path in out.parent.iterdir()] == ["small.pth"]
    metric = simclr.SimCLR(torch.device("cpu"), resize_type="none", path=out)
    features = metric.prepare((wave((3, 3, 32, 32), 0.4) + 1) / 2)
    torch.testing.assert_close(features, F.normalize(tensor(np.load(WRITTEN / "selective.npz")["features"])))


# -------------------------------------------------------------------------------------------------- written here


def varint(number):
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes([*out, number])


def field(number, value):
    """A field of a protocol buffer: an integer or bytes; zeros are left out, as TensorFlow does."""
    if isinstance(value, bytes):
        return varint(number << 3 | 2) + varint(len(value)) + value
    return varint(number << 3) + varint(value) if value else b""


def checksum(data):
    """Masked CRC-32C, a bit at a time."""
    register = 0xFFFFFFFF
    for byte in data:
        register ^= byte
        for _ in range(8):
            register = register >> 1 ^ (0x82F63B78 if register & 1 else 0)
    register ^= 0xFFFFFFFF
    return ((register >> 15 | register << 17) + 0xA282EAD8) & 0xFFFFFFFF


def write_block(file, rows, interval, compression=0):
    """Appends a block of LevelDB's table format to a bytearray; returns its handle."""
    block, restarts, before = bytearray(), [], b""
    for number, (key, value) in enumerate(rows):
        shared = 0
        if number % interval == 0:
            restarts.append(len(block))
        else:
            while shared < min(len(key), len(before)) and key[shared] == before[shared]:
                shared += 1
        block += varint(shared) + varint(len(key) - shared) + varint(len(value)) + key[shared:] + value
        before = key
    block += struct.pack(f"<{len(restarts) + 1}I", *restarts, len(restarts))
    handle = varint(len(file)) + varint(len(block))
    block.append(compression)
    file += block + struct.pack("<I", checksum(block))
    return handle


def write_table(path, rows, per_block=7, compression=0):
    file, index = bytearray(), []
    rows = sorted(rows.items())
    for start in range(0, len(rows), per_block):
        chunk = rows[start : start + per_block]
        index.append((chunk[-1][0], write_block(file, chunk, 4, compression)))
    footer = write_block(file, [], 1) + write_block(file, index, 1)
    file += footer.ljust(40, b"\0") + struct.pack("<Q", 0xDB4775248B80FB57)
    path.write_bytes(file)


HEADER = field(1, 2) + field(3, field(1, 1))  # two shards, producer version 1


def write_bundle(prefix, arrays, header=HEADER, shards=2, **table):
    """A checkpoint of float32 and int64 arrays, dealt out to two data files."""
    data, rows = [bytearray() for _ in range(shards)], {b"": header}
    for number, (name, array) in enumerate(sorted(arrays.items())):
        shard, raw = number % shards, array.tobytes()
        shape = b"".join(field(2, field(1, size)) for size in array.shape)
        place = field(3, shard) + field(4, len(data[shard])) + field(5, len(raw))
        crc = varint(6 << 3 | 5) + struct.pack("<I", checksum(raw))
        rows[name.encode()] = field(1, 9 if array.dtype == np.int64 else 1) + field(2, shape) + place + crc
        data[shard] += raw
    write_table(prefix.with_name(prefix.name + ".index"), rows, **table)
    for shard, content in enumerate(data):
        prefix.with_name(f"{prefix.name}.data-{shard:05d}-of-{shards:05d}").write_bytes(content)
    return prefix


SMALL = Architecture((1, 3, 1, 1), 2, selective=True, classes=3)


def layer_name(kind, number):
    return f"base_model/{kind}_{number}" if number else f"base_model/{kind}"


def as_tensorflow(state):
    """A state dict's variables in TensorFlow's names and order of axes, with optimiser slots and a step."""
    arrays, counts = {"global_step": np.array(7)}, {"conv2d": 0, "batch_normalization": 0}
    norms = {"weight": "gamma", "bias": "beta", "running_mean": "moving_mean", "running_var": "moving_variance"}
    for name, value in state.items():
        array, last = value.numpy(), name.rpartition(".")[2]
        if name.startswith("fc."):
            theirs = f"head_supervised/linear_layer/dense/{'kernel' if last == 'weight' else 'bias'}"
            arrays[theirs] = array.T.copy()
        elif array.ndim == 4:
            arrays[f"{layer_name('conv2d', counts['conv2d'])}/kernel"] = array.transpose(2, 3, 1, 0).copy()
            counts["conv2d"] += 1
        elif last in norms:
            arrays[f"{layer_name('batch_normalization', counts['batch_normalization'])}/{norms[last]}"] = array
            counts["batch_normalization"] += last == "running_var"
    slots = {f"{name}/Momentum": 0 * array for name, array in arrays.items() if name.startswith("base_model/conv2d")}
    return arrays | slots


@pytest.fixture(scope="module")
def small_state():
    return fill_(ResNet(SMALL).state_dict())


@pytest.fixture(scope="module")
def small_arrays(small_state):
    return as_tensorflow(small_state)


def test_checkpoint_written_here(tmp_path, small_state, small_arrays):
    """Ten layers and more (conv2d_10 sorts before conv2d_2), several blocks, two shards, no head."""
    content, architecture = convert_simclr.convert(write_bundle(tmp_path / "model.ckpt-7", small_arrays))
    assert architecture == SMALL
    assert content["head"] == {}
    assert list(content["resnet"]) == list(small_state)
    for name, value in content["resnet"].items():
        assert torch.equal(value, small_state[name]), name
        assert value.is_contiguous()


def test_without_classifier(tmp_path, small_arrays):
    arrays = {name: array for name, array in small_arrays.items() if not name.startswith("head")}
    content, architecture = convert_simclr.convert(write_bundle(tmp_path / "x", arrays))
    assert architecture.classes == 0
    assert not any(name.startswith("fc.") for name in content["resnet"])


@pytest.mark.parametrize("given", ["model.ckpt-7", "model.ckpt-7.index", "model.ckpt-7.data-00000-of-00002", ""])
def test_prefix(tmp_path, small_arrays, given):
    write_bundle(tmp_path / "model.ckpt-7", {})
    assert convert_simclr.find_prefix(tmp_path / given) == tmp_path / "model.ckpt-7"


@pytest.mark.parametrize("data", [b"123456789", bytes(range(4)), bytes(32), bytes(range(256)) * 33])
def test_crc32c(data):
    assert tensor_bundle._masked(tensor_bundle.crc32c(data)) == checksum(data)
    if data == b"123456789":
        assert tensor_bundle.crc32c(data) == 0xE3069283  # the check value of the polynomial's catalogues


# ---------------------------------------------------------------------------------------------------- bad input


def refused(prefix, message):
    with pytest.raises(UserError, match=message) as error:
        convert_simclr.convert(prefix)
    assert "\n" not in str(error.value)


def flipped(data, place, bits):
    return data[:place] + bytes([data[place] ^ bits]) + data[place:][1:]


INDEX, DATA, MORE_DATA = "x.index", "x.data-00000-of-00002", "x.data-00001-of-00002"
BAD_INDEX = "x.index is no checkpoint index or is damaged"
DAMAGED = {  # a file, what becomes of its bytes, and what is said
    "data gone": (MORE_DATA, None, "cannot read .*x.data-00001-of-00002: No such file"),
    "data cut": (DATA, lambda data: data[: len(data) // 2], "truncated or damaged .at base_model/"),
    "data, a bit": (DATA, lambda data: flipped(data, 1001, 4), "truncated or damaged"),
    "index empty": (INDEX, lambda data: b"", BAD_INDEX),
    "index cut short": (INDEX, lambda data: data[:20], BAD_INDEX),
    "index cut": (INDEX, lambda data: data[:1000], BAD_INDEX),
    "index, first bits": (INDEX, lambda data: flipped(data, 3, 0x55), BAD_INDEX),
    "index, inner bits": (INDEX, lambda data: flipped(data, 500, 0x55), BAD_INDEX),
    "index, last bits": (INDEX, lambda data: flipped(data, -3, 0x55), BAD_INDEX),
}


@pytest.mark.parametrize(("name", "damage", "message"), DAMAGED.values(), ids=DAMAGED)
def test_damaged_checkpoints(name, damage, message, tmp_path, small_arrays):
    prefix, path = write_bundle(tmp_path / "x", small_arrays), tmp_path / name
    data = path.read_bytes()
    path.write_bytes(damage(data)) if damage else path.unlink()
    refused(prefix, message)


def test_padding_of_the_index_means_nothing(tmp_path, small_arrays):
    prefix, path = write_bundle(tmp_path / "x", small_arrays), tmp_path / INDEX
    path.write_bytes(flipped(path.read_bytes(), -30, 0x55))
    convert_simclr.convert(prefix)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"compression": 1}, "it is compressed"), ({"header": field(1, 2) + field(2, 1)}, "big-endian")],
)
def test_unsupported_forms(options, message, tmp_path, small_arrays):
    refused(write_bundle(tmp_path / "x", small_arrays, **options), message)


def test_missing(tmp_path):
    refused(
        tmp_path / "x", "cannot read the TensorFlow checkpoint .*x.index: No such file or directory; check the path"
    )
    with pytest.raises(UserError, match=r"holds no \*.index file"):
        convert_simclr.find_prefix(tmp_path)


def test_partitioned_variable(tmp_path):
    """A variable with slices (field 7) has no bytes of its own."""
    rows = {b"": field(1, 1), b"a": field(1, 1) + field(2, field(2, field(1, 4))) + field(7, b"")}
    write_table(tmp_path / "x.index", rows)
    with pytest.raises(UserError, match="partitioned or of a type that is not supported"):
        tensor_bundle.Bundle(tmp_path / "x").read("a")


def kernel(*shape):
    return np.zeros(shape, np.float32)


NETWORKS = [  # the variable that is changed, its value or None where it is lacking, and what is said
    ("base_model/conv2d_5/kernel", kernel(3, 3, 2, 5), r"has shape \(5, 2, 3, 3\)"),
    ("base_model/conv2d_9/kernel", kernel(1, 1, 4, 5), r"\(5, 4, 1, 1\) in PyTorch's order, not"),
    ("base_model/conv2d_99/kernel", kernel(1, 1, 4, 4), "has 37 and 31"),
    ("base_model/batch_normalization_3/beta", None, "lacks base_model/batch_normalization_3/beta"),
    ("head_supervised/linear_layer/dense/bias", None, "lacks head_supervised/linear_layer/dense/bias"),
    ("base_model/conv2d/kernel", kernel(9), "holds no SimCLRv2 network"),
    ("base_model/batch_normalization/beta", np.full(1, np.nan, np.float32), "not finite"),
]


@pytest.mark.parametrize(("name", "array", "message"), NETWORKS)
def test_other_networks(tmp_path, small_arrays, name, array, message):
    arrays = {**small_arrays, name: array}
    if array is None:
        del arrays[name]
    refused(write_bundle(tmp_path / "x", arrays), message)


def test_no_network_at_all(tmp_path):
    refused(write_bundle(tmp_path / "x", {"global_step": np.array(3)}), "holds no SimCLRv2 network")


def test_unwritable_place(tmp_path, monkeypatch, capfd):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        convert_simclr.main([str(WRITTEN / "plain-250228"), str(tmp_path / "file" / "out.pth")])

    monkeypatch.setattr(files.os, "fsync", tiny.failing(errno.ENOSPC))
    with pytest.raises(UserError, match="No space left"):
        convert_simclr.main([str(WRITTEN / "plain-250228"), str(tmp_path / "out.pth")])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]
    assert capfd.readouterr().out == ""
