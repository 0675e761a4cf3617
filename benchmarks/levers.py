"""Ways to make a GPU work faster that `benchmarks.gpu` measures, and that the program itself does not use.

A CUDA graph launches everything that a call does at once, which is what small networks and training steps wait for;
unlike a compiler it is there after a few calls.  A normalisation with its shift and swish as one kernel reads and
writes its images once, and in the layout that convolutions are fastest in.
"""

import functools

import torch
import torch.nn.functional as F

import losses
import sde_lib
from models import create_model, inference, layers
from models.score import ScoreModel

WARM_UP = 3  # calls before a graph is captured: libraries choose their algorithms and allocate in the first ones
SHAPES = 64  # of images that the fused normalisation is compiled for, at most


def capture(call, device):
    """What call() does, launched at once as a CUDA graph; on a CPU, which has none, `call` itself.

    Args:
        call: a function of no arguments, always on the same tensors, that does not wait for the GPU.
        device: torch.device.

    Returns:
        A function of no arguments, whose result is overwritten by its next call.
    """
    if device.type == "cpu":
        return call
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(WARM_UP):
            call()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()

    def replay():
        graph.replay()
        return result

    return replay


def norm_swish(x, shift, weight, bias, groups, eps):
    """swish(group_norm(x + shift)) in plain operations with float32 inside, for a compiler to make one kernel of.

    Args:
        x: (B, C, H, W).
        shift: (B or 1, C), or None.
        weight, bias: (C,).
        groups: of the normalisation.
        eps: added to the variances.

    Returns:
        (B, C, H, W) of x's type.
    """
    values = x.float() if shift is None else x.float() + shift.float()[:, :, None, None]
    variance, mean = torch.var_mean(values.unflatten(1, (groups, -1)), dim=(2, 3, 4), correction=0, keepdim=True)
    normed = (values.unflatten(1, (groups, -1)) - mean) * (variance + eps).rsqrt()  # (B, groups, C/groups, H, W)
    scaled = normed.flatten(1, 2) * weight.float()[:, None, None] + bias.float()[:, None, None]
    return F.silu(scaled).to(x.dtype)


def fuse_norms(net):
    """Has all normalisations with swish of a network compiled, each as one kernel; nothing else."""
    import torch._dynamo  # here, as it takes seconds

    torch._dynamo.config.recompile_limit = SHAPES
    fused = torch.compile(norm_swish, dynamic=False)
    for module in net.modules():
        if isinstance(module, layers.NormAct) and module.act is F.silu:
            module.forward = functools.partial(_fused_forward, fused, module)
    return net


def _fused_forward(fused, module, x, shift=None):
    return fused(x, shift, module.weight, module.bias, module.num_groups, module.eps)


def captured_training(config, x, precision):
    """A training step as one CUDA graph: gradient, clipping, Adam and EMA; the draws are filled in before.

    The learning rate and the EMA's decay are those of the captured step, so this is for timing alone.

    Args:
        config: the config tree.
        x: (B, C, H, W) on the device.
        precision: 'bf16', 'tf32' or 'fp32'.

    Returns:
        A function of no arguments that does a step and gives its loss, a float.
    """
    config = config.copy_and_resolve_references()
    config.optim.warmup = 0
    sde, net = sde_lib.create_sde(config), create_model(config).train().to(x.device)
    state, loss = losses.create_state(config, net), losses.create_loss(config, sde)
    for group in state.optimizer.param_groups:
        group["capturable"] = x.device.type == "cuda"
    model = ScoreModel(inference.InPrecision(net, x.device, precision), sde, config.training.continuous)
    draw = functools.partial(losses.Draws.keyed, x.shape, sde.N, config.seed, "train", device=x.device)
    given = draw(0)
    step = capture(lambda: losses.train_step(state, loss, model, x, given, config), x.device)
    numbers = iter(range(1, 10**9))

    def train():
        fresh = draw(next(numbers))
        for name in ("uniform", "labels", "normal"):
            getattr(given, name).copy_(getattr(fresh, name))
        return step().item()

    return train
