"""A network made ready for inference: layout, precision, compilation."""

import torch

from console import UserError, choose

# What --precision says -> whether the network computes in bfloat16 on a device.
PRECISIONS = {
    "fp32": lambda device: False,
    "bf16": lambda device: True,
    "auto": lambda device: device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False),
}


def resolve(precision, device):
    """'fp32' or 'bf16': what a precision comes to on a torch.device, and what a reconstruction depends on.

    Raises:
        UserError: an unknown precision.
    """
    return "bf16" if choose(precision, PRECISIONS, "precision (--precision)")(device) else "fp32"


def prepare(net, device, precision="fp32", compiled=False):
    """The network as a function of (x, labels) for inference.

    Args:
        net: a network; it is moved to the device, channels-last, in eval mode, without gradients.
        device: torch.device.
        precision: 'fp32'; 'bf16', convolutions and matrix products in bfloat16, with statistics of normalisations and
            the result in float32; or 'auto', bf16 on GPUs that have it.
        compiled: through torch.compile, on a GPU with CUDA graphs.  The first call of each shape takes long.

    Returns:
        A function (B, C, H, W) float32, (B,) or (1,) -> (B, C, H, W) float32.

    Raises:
        UserError: an unknown precision.
    """
    reduced = resolve(precision, device) == "bf16"
    net = net.eval().requires_grad_(False).to(device, memory_format=torch.channels_last)
    call = torch.compile(net, mode="reduce-overhead" if device.type == "cuda" else "default") if compiled else net
    if compiled:
        call = _compiled(call)
    if not reduced:
        return call

    def in_bfloat16(x, labels):
        with torch.autocast(device.type, dtype=torch.bfloat16):
            return call(x, labels).float()

    return in_bfloat16


def _compiled(call):
    """`call` of a compiled network: outputs of earlier calls are done with, and a failure to compile is the user's."""
    from torch._dynamo.exc import BackendCompilerFailed, TorchDynamoException

    def run(x, labels):
        torch.compiler.cudagraph_mark_step_begin()  # no output of an earlier call is read again
        try:
            return call(x, labels)
        except (BackendCompilerFailed, TorchDynamoException) as error:  # most often there is no compiler
            reason = str(error).strip().splitlines()[0]
            raise UserError(f"the network cannot be compiled here ({reason}); leave --compile out") from error

    return run
