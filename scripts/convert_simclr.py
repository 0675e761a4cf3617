"""Converts Google's SimCLRv2 checkpoints to the weights that the metric SIMCLR reads.

    gsutil cp -r gs://simclr-checkpoints/simclrv2/pretrained/r50_1x_sk1 .
    python -m scripts.convert_simclr r50_1x_sk1 pretrained/r50_1x_sk1.pth

TensorFlow numbers the layers in the order in which they were made: base_model/conv2d,
base_model/conv2d_1, ...; so are the layers of our network.  Every weight's shape is checked.
What optimisers and averages keep (base_model/conv2d/kernel/Momentum) is left out.
"""

import argparse
import re
import sys
from pathlib import Path

import numpy as np
import torch

from basics.console import UserError, guard, say
from metrics import simclr_resnet, weights
from scripts.tensor_bundle import Bundle

BASE, CLASSIFIER, HEAD = "base_model", "head_supervised/linear_layer", "head_contrastive"
NORM = {"weight": "gamma", "bias": "beta", "running_mean": "moving_mean", "running_var": "moving_variance"}
ORDER = {4: (3, 2, 0, 1), 2: (1, 0)}  # axes of kernels: (h, w, in, out) to (out, in, h, w), (in, out) to (out, in)


def main(argv):
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m scripts.convert_simclr", description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint", help="prefix of a TensorFlow checkpoint (without .index), or its folder")
    parser.add_argument("out", type=Path, help="the file to write, such as pretrained/r50_1x_sk1.pth")
    arguments = parser.parse_args(argv)
    content, architecture = convert(find_prefix(Path(arguments.checkpoint)))
    weights.write(arguments.out, content)
    say(
        f"{arguments.out}: {sum(architecture.blocks) * 3 + 2} layers, width {architecture.channels / 64:g}, "
        f"{'with' if architecture.selective else 'without'} selective kernels"
    )


def find_prefix(path):
    """The checkpoint's prefix: `path`, also when it names one of the files, or the only one in the folder `path`.

    Raises:
        UserError: the folder holds no checkpoint, or several.
    """
    if not path.is_dir():
        return path.with_suffix("") if re.fullmatch(r"\.(index|meta|data-\d+-of-\d+)", path.suffix) else path
    found = sorted(path.glob("*.index"))
    if len(found) != 1:
        names = ", ".join(str(name.with_suffix("")) for name in found)
        raise UserError(f"{path} holds {f'several checkpoints, give one of: {names}' if found else 'no *.index file'}")
    return found[0].with_suffix("")


def convert(prefix):
    """Reads a checkpoint.

    Args:
        prefix: path of the files without .index and .data-*.

    Returns:
        tuple: {'resnet': state dict, 'head': state dict} and the `simclr_resnet.Architecture`.  `head` is the
        projection of the contrastive loss, a linear layer without bias, a batch norm and, but for the last, a ReLU
        per step (`layers.0`, `layers.1`, ...); it is empty where the checkpoint has none.

    Raises:
        UserError: the checkpoint is missing, damaged, or not of a SimCLRv2 network.
    """
    bundle = Bundle(prefix)
    layers = _layers(bundle, BASE)
    kernels = {name: bundle.entries[f"{name}/kernel"].shape for name in layers if "kernel" in layers[name]}
    if len(kernels) < 3 or any(len(shape) != 4 or 0 in shape for shape in kernels.values()):
        raise UserError(f"{prefix}.index holds no SimCLRv2 network (convolutions named {BASE}/conv2d/kernel)")
    architecture = infer(list(kernels.values()), _outputs(bundle, f"{CLASSIFIER}/dense/kernel"))
    with torch.device("meta"):
        network = simclr_resnet.ResNet(architecture)
    norms = [name for name in layers if "kernel" not in layers[name]]
    resnet = _read(bundle, network, _pair(network, list(kernels), norms, prefix))
    return {"resnet": resnet, "head": _read_head(bundle, architecture.features)}, architecture


def _outputs(bundle, kernel):
    """The size of a dense kernel's last axis; 0 where there is no such kernel."""
    return bundle.entries[kernel].shape[-1] if kernel in bundle.entries and bundle.entries[kernel].shape else 0


def _layers(bundle, scope):
    """Layers right below a scope, in the order they were made: `{name: {its variables}}`."""
    layers = {}
    for name in bundle.entries:
        layer, _, variable = name.rpartition("/")
        if layer.rpartition("/")[0] == scope and variable in ("kernel", *NORM.values()):
            layers.setdefault(layer, set()).add(variable)
    return dict(sorted(layers.items(), key=lambda item: _number(item[0])))


def _number(layer):
    """3 of base_model/conv2d_3; the first has none: 0."""
    found = re.search(r"_(\d{1,9})$", layer)
    return int(found.group(1)) if found else 0


def infer(kernels, classes):
    """The architecture of convolutions with these shapes (height, width, in, out), in the order they were made."""
    selective = kernels[0][0] == 3
    channels = kernels[2][3] if selective else kernels[0][3]
    inner = [channels * 2**group * (1 + selective) for group in range(4)]  # each block has one 3x3 convolution
    spatial = [shape[3] for shape in kernels[3 if selective else 1 :] if shape[0] == 3]
    return simclr_resnet.Architecture(tuple(spatial.count(width) for width in inner), channels, selective, classes)


def _pair(network, kernels, norms, prefix):
    """`{our name: TensorFlow's}` of every weight, matching layers in the order they were made.

    Raises:
        UserError: there are more layers of a kind on one side.
    """
    modules = list(network.named_modules())
    convs = [name for name, module in modules if isinstance(module, torch.nn.Conv2d)]
    batch_norms = [name for name, module in modules if isinstance(module, torch.nn.BatchNorm2d)]
    if (len(convs), len(batch_norms)) != (len(kernels), len(norms)):
        raise UserError(
            f"{prefix}.index holds {len(kernels)} convolutions and {len(norms)} batch norms; a SimCLRv2 network with "
            f"its first layers has {len(convs)} and {len(batch_norms)}"
        )
    names = {f"{ours}.weight": f"{theirs}/kernel" for ours, theirs in zip(convs, kernels, strict=True)}
    for ours, theirs in zip(batch_norms, norms, strict=True):
        names.update({f"{ours}.{entry}": f"{theirs}/{variable}" for entry, variable in NORM.items()})
    names.update({"fc.weight": f"{CLASSIFIER}/dense/kernel", "fc.bias": f"{CLASSIFIER}/dense/bias"})
    return names


def _read(bundle, network, names):
    """The state dict of a network on the meta device, from the variables that `names` gives for its weights."""
    state = {}
    for ours, expected in network.state_dict().items():
        if ours.endswith("num_batches_tracked"):
            state[ours] = torch.tensor(0)  # TensorFlow does not count
        else:
            state[ours] = _tensor(bundle, names[ours], tuple(expected.shape))
    return state


def _tensor(bundle, name, shape):
    """A variable as a float32 tensor of this shape, which is in PyTorch's order of axes.

    Raises:
        UserError: it is missing, has another shape, or holds numbers that are not finite.
    """
    if name not in bundle.entries:
        raise UserError(f"{bundle.prefix}.index lacks {name}; this is no SimCLRv2 checkpoint, or another version of it")
    values = bundle.read(name)
    values = values.transpose(ORDER.get(values.ndim))
    if values.shape != shape:
        raise UserError(f"{bundle.prefix}.index: {name} has shape {values.shape} in PyTorch's order, not {shape}")
    tensor = torch.from_numpy(np.array(values, "float32", order="C"))  # a copy: what was read may not be written to
    if not tensor.isfinite().all():
        raise UserError(f"{bundle.prefix}: {name} holds numbers that are not finite")
    return tensor


def _read_head(bundle, features):
    """The state dict of the projection head, whose steps are head_contrastive/nl_0, nl_1, ..."""
    state, width, step = {}, features, 0
    while out := _outputs(bundle, f"{HEAD}/nl_{step}/dense/kernel"):
        scope, layer, norm = f"{HEAD}/nl_{step}", f"layers.{3 * step}", f"layers.{3 * step + 1}"
        state[f"{layer}.weight"] = _tensor(bundle, f"{scope}/dense/kernel", (out, width))
        theirs = next((name for name in _layers(bundle, scope) if not name.endswith("/dense")), scope)
        for entry, variable in NORM.items():
            absent = entry == "bias" and f"{theirs}/{variable}" not in bundle.entries  # the last norm does not shift
            state[f"{norm}.{entry}"] = torch.zeros(out) if absent else _tensor(bundle, f"{theirs}/{variable}", (out,))
        state[f"{norm}.num_batches_tracked"] = torch.tensor(0)
        width, step = out, step + 1
    return state


if __name__ == "__main__":
    sys.exit(guard(main, sys.argv[1:]))
