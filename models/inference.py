"""A network made ready for inference: layout, precision, compilation."""

import contextlib

import torch
from torch.utils.flop_counter import FlopCounterMode

from basics.console import UserError, choose, warn
from models import memory

# What --precision says -> what it comes to on a device.
PRECISIONS = {
    "fp32": lambda device: "fp32",
    "tf32": lambda device: _tf32(device),
    "bf16": lambda device: "bf16",
    "auto": lambda device: "bf16" if _has_bf16(device) else "fp32",
}
CHOICES = dict.fromkeys(["auto", "on", "off"])  # of --compile
# Operations to come from which on compiling, 24 to 46 s, is worth it on a GPU: 300,000 evaluations of the CIFAR-10 DDPM
# network, 12.04 GFLOP each. (Measured on an H200: 512,000 of a network of 0.49 GFLOP take 13 s, 46 s when compiled.)
COMPILE_FROM = 3.6e15


def resolve(precision, device):
    """What a precision comes to on a torch.device, and what a reconstruction depends on: 'fp32', 'tf32' or 'bf16'.

    Raises:
        UserError: an unknown precision, or one that the device does not have.
    """
    return choose(precision, PRECISIONS, "precision (--precision)")(device)


def _has_bf16(device):
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def _tf32(device):
    if device.type != "cuda" or not torch.cuda.is_tf32_supported():
        raise UserError(f"tf32 is arithmetic of newer GPUs, which {device} does not have; use --precision fp32 or auto")
    return "tf32"


def training_precision(device):
    """What training computes in: 'tf32' on a GPU that has it, 'fp32' elsewhere."""
    return "tf32" if device.type == "cuda" and torch.cuda.is_tf32_supported() else "fp32"


@contextlib.contextmanager
def arithmetic(precision):
    """A block in which a GPU's float32 convolutions and matrix products are in TF32 ('tf32') or in float32 (all else).

    By themselves torch's convolutions are in TF32, 1.3e-3 off, and its matrix products are not.  A CPU has no TF32.
    """
    switches = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [switch.allow_tf32 for switch in switches]
    try:
        for switch in switches:
            switch.allow_tf32 = precision == "tf32"
        yield
    finally:
        for switch, value in zip(switches, before, strict=True):
            switch.allow_tf32 = value


def layout(device, compiled=False):
    """The memory format in which a network is fastest.

    Channels-last on a CPU and where it is compiled; else, on a GPU, NCHW, 1.28 times as fast there because torch's
    group normalisation copies what is channels-last.
    """
    return torch.channels_last if compiled or device.type == "cpu" else torch.contiguous_format


def worth_compiling(choice, network, evaluations, shape):
    """Whether to compile a network for so many evaluations to come.

    Args:
        choice: 'on', 'off', or 'auto', on a GPU where it saves more time than it takes.
        network: a `Network`.
        evaluations: of the network, each of one image.
        shape: (C, H, W) of an image.

    Raises:
        UserError: another choice.
    """
    choose(choice, CHOICES, "choice (--compile)")
    if choice == "auto":
        return network.device.type == "cuda" and evaluations * network.operations(shape) > COMPILE_FROM
    return choice == "on" and evaluations > 0


class Network:
    """A network ready for inference, called as a function of (x, labels); see `prepare`.

    Attributes:
        net: the torch module.
        device: torch.device.
        precision: what it computes in: 'fp32', 'tf32' or 'bf16'.
    """

    def __init__(self, net, device, precision):
        self.device, self.precision = device, resolve(precision, device)
        self.net = net.eval().requires_grad_(False)
        self._eager()

    def __call__(self, x, labels):
        """(B, C, H, W) float32, (B,) or (1,) -> (B, C, H, W) float32."""
        with arithmetic(self.precision):
            if self.precision != "bf16":
                return self._call(x, labels)
            with torch.autocast(self.device.type, dtype=torch.bfloat16):
                return self._call(x, labels).float()

    @contextlib.contextmanager
    def watched(self, follow):
        """A block in which follow(images) is called after each call of the network, with the number of its images."""
        hook = self.net.register_forward_hook(lambda net, given, result: follow(len(result)))
        try:
            yield
        finally:
            hook.remove()

    def operations(self, shape):
        """Floating-point operations of its products and convolutions for one image (C, H, W), by torch's counter."""
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            self(torch.zeros(1, *shape, device=self.device), torch.ones(1, device=self.device))
        return counter.get_total_flops()

    def compile(self, required=True):
        """Compiles it, on a GPU with CUDA graphs; the first call of each shape takes long.

        Args:
            required: what cannot be compiled is an error; else it is told and goes on as it was.
        """
        self.net.to(memory_format=layout(self.device, compiled=True))
        mode = "reduce-overhead" if self.device.type == "cuda" else "default"
        compiled = torch.compile(self.net, mode=mode)
        self._call = lambda x, labels: self._compiled(compiled, x, labels, required)

    def _eager(self):
        self._call = self.net.to(self.device, memory_format=layout(self.device))

    def _compiled(self, compiled, x, labels, required):
        from torch._dynamo.exc import BackendCompilerFailed, TorchDynamoException  # here, as it takes seconds

        torch.compiler.cudagraph_mark_step_begin()  # no output of an earlier call is read again
        try:
            return compiled(x, labels)
        except (BackendCompilerFailed, TorchDynamoException) as error:  # most often there is no compiler
            if memory.ran_out(error):
                raise
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            if required:
                raise UserError(f"the network cannot be compiled here ({reason}); leave --compile out") from error
        warn(f"the network cannot be compiled here ({reason}); going on without")
        self._eager()
        return self._call(x, labels)


def prepare(net, device, precision="auto", compiled=False):
    """The network as a function of (x, labels) for inference.

    Args:
        net: a network; it is moved to the device, in eval mode, without gradients, in the layout that is fastest there.
        device: torch.device.
        precision: 'fp32', float32 throughout; 'tf32', a GPU's convolutions and matrix products with 10 bits of
            mantissa; 'bf16', these in bfloat16, with statistics of normalisations and the result in float32; or 'auto',
            bf16 on GPUs that have it, else fp32.
        compiled: through torch.compile, see `Network.compile`.

    Returns:
        A `Network`: (B, C, H, W) float32, (B,) or (1,) -> (B, C, H, W) float32.

    Raises:
        UserError: an unknown precision, or one that the device does not have.
    """
    network = Network(net, device, precision)
    if compiled:
        network.compile()
    return network
