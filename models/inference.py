"""A network made ready for inference or training: layout, precision, compilation."""

import contextlib
import copy

import torch

from basics.console import UserError, choose, say, warn
from models import layers, memory

# What --precision and config.training.precision say -> what it comes to on a device.
PRECISIONS = {
    "fp32": lambda device, setting: "fp32",
    "tf32": lambda device, setting: _tf32(device, setting),
    "bf16": lambda device, setting: "bf16",
    "auto": lambda device, setting: "bf16" if _has_bf16(device) else "fp32",
}
CHOICES = dict.fromkeys(["auto", "on", "off"])  # of --compile and config.training.compile
# Operations to come from which on compiling, 24 to 46 s, is worth it on a GPU: 300,000 evaluations of the CIFAR-10 DDPM
# network, 12.04 GFLOP each. (Measured on an H200: 512,000 of a network of 0.49 GFLOP take 13 s, 46 s when compiled.)
COMPILE_FROM = 3.6e15
# The same of training, where it takes 65 s and saves 8 of 48 ms a step: 8,100 steps of 128 images of that network.
COMPILE_TRAINING_FROM = 3.8e16
PASSES = 3  # of a training step in units of an evaluation: the gradients take twice the forward pass


def resolve(precision, device, setting="--precision"):
    """What a precision comes to on a torch.device, and what a reconstruction depends on: 'fp32', 'tf32' or 'bf16'.

    Args:
        precision: a key of `PRECISIONS`.
        device: torch.device.
        setting: what the user calls the place of `precision`.

    Raises:
        UserError: an unknown precision, or one that the device does not have.
    """
    return choose(precision, PRECISIONS, f"precision ({setting})")(device, setting)


def _has_bf16(device):
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):  # torch answers for the current GPU
        return torch.cuda.is_bf16_supported(including_emulation=False)


def has_tf32(device):
    """Whether a torch.device can compute in TF32."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_tf32_supported()


def _tf32(device, setting):
    if not has_tf32(device):
        raise UserError(f"tf32 is arithmetic of newer GPUs, which {device} does not have; use {setting} fp32 or auto")
    return "tf32"


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


def worth_compiling(choice, network, evaluations, shape, least=COMPILE_FROM):
    """Whether to compile a network for so many evaluations to come.

    Args:
        choice: 'on', 'off', or 'auto', on a GPU where it saves more time than it takes.
        network: an `InPrecision`.
        evaluations: of the network, each of one image.
        shape: (C, H, W) of an image.
        least: operations from which on it saves more time than it takes.

    Raises:
        UserError: another choice.
    """
    choose(choice, CHOICES, "choice (--compile)")
    if choice == "auto":
        return network.device.type == "cuda" and evaluations * network.operations(shape) > least
    return choice == "on" and evaluations > 0


def attempt_compiled(work, required, remedy):
    """The result of a call that may compile a network, or None where that cannot be done, which is told then.

    Args:
        work: a function of no arguments.
        required: what cannot be compiled is an error.
        remedy: what the error says to do.

    Raises:
        UserError: it cannot be compiled here, and is required.
    """
    from torch._dynamo.exc import BackendCompilerFailed, TorchDynamoException  # here, as it takes seconds

    try:
        return work()
    except (BackendCompilerFailed, TorchDynamoException) as error:  # most often there is no compiler
        if memory.ran_out(error):
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if required:
            raise UserError(f"the network cannot be compiled here ({reason}); {remedy}") from error
    warn(f"the network cannot be compiled here ({reason}); going on without")
    return None


class InPrecision:
    """A network called as a function of (x, labels) that computes in a precision; its weights are float32 in each.

    In bfloat16 each call converts them, so that they can be trained.

    Attributes:
        device: torch.device.
        precision: 'fp32', 'tf32' or 'bf16'.
    """

    def __init__(self, net, device, precision):
        self._call, self.device, self.precision = net, device, precision
        self._followers = []

    def __call__(self, x, labels):
        """(B, C, H, W) float32, (B,) or (1,) -> (B, C, H, W) float32."""
        with arithmetic(self.precision), self._conversion():
            result = self._call(x, labels).float()
        for follow in self._followers:
            follow(len(result))
        return result

    def _conversion(self):
        if self.precision != "bf16":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    @contextlib.contextmanager
    def watched(self, follow):
        """A block in which follow(images) is called after each call of the network, with the number of its images."""
        self._followers.append(follow)
        try:
            yield
        finally:
            self._followers.remove(follow)

    def operations(self, shape):
        """Floating-point operations of its products and convolutions for one image (C, H, W), by torch's counter."""
        from torch.utils.flop_counter import FlopCounterMode  # here, as it brings in the compiler of GPU kernels

        with FlopCounterMode(display=False) as counter, torch.no_grad():
            self(torch.zeros(1, *shape, device=self.device), torch.ones(1, device=self.device))
        return counter.get_total_flops()


class Network(InPrecision):
    """A network ready for inference; see `prepare`.

    Attributes:
        net: the torch module.
    """

    def __init__(self, net, device, precision):
        super().__init__(net, device, resolve(precision, device))
        self.net = net.eval().requires_grad_(False)
        if self.precision == "bf16":
            _convert_weights(net, torch.bfloat16)
        self._eager()

    def _conversion(self):
        return contextlib.nullcontext()  # the weights are converted already

    def compile_if_worth(self, choice, evaluations, shape):
        """Compiles it where that is worth it for the evaluations to come, and says so; arguments as `worth_compiling`.

        Raises:
            UserError: as `worth_compiling`, and later, in the first call: it is to be compiled, and cannot be.
        """
        if worth_compiling(choice, self, evaluations, shape):
            say(f"compiling the network for {evaluations:,} evaluations; the first ones take longer for it")
            self.compile(required=choice == "on")

    def compile(self, required=True):
        """Compiles it, on a GPU with CUDA graphs; the first call of each shape takes long.

        Calls that are differentiated are not compiled, and labels are one an image, so that there are fewer shapes.  On
        a GPU a result in float32 or TF32 is overwritten by the next call.

        Args:
            required: what cannot be compiled is an error; else it is told and goes on as it was.
        """
        self.net.to(memory_format=layout(self.device, compiled=True))
        mode = "reduce-overhead" if self.device.type == "cuda" else "default"
        compiled = torch.compile(self.net, mode=mode)
        self._call = lambda x, labels: self._compiled(compiled, x, labels, required)

    def in_float32(self):
        """The same network that computes in float32: itself if it does, else a copy that is not compiled.

        Of one in bfloat16 the weights are those that were rounded, so both are approximations of the same function.
        """
        if self.precision == "fp32":
            return self
        other = copy.copy(self)
        if self.precision == "bf16":
            other.net = copy.deepcopy(self.net)
            _convert_weights(other.net, torch.float32)
        other._call, other.precision = other.net, "fp32"
        return other

    def _eager(self):
        self._call = self.net.to(self.device, memory_format=layout(self.device))

    def _compiled(self, compiled, x, labels, required):
        if x.requires_grad:
            return self.net(x, labels)
        each = labels.expand(len(x)).contiguous()
        torch.compiler.cudagraph_mark_step_begin()  # no output of an earlier call is read again
        result = attempt_compiled(lambda: compiled(x, each), required, "leave --compile out")
        if result is None:
            self._eager()
            return self._call(x, labels)
        return result


def _convert_weights(net, dtype):
    """Converts a network's weights once, but for those by which it knows the noise level, which stay float32.

    The latter cost nothing, and rounding their sinusoids would blur the level.  The network then computes in `dtype`
    from its first convolution on; torch's normalisations hold their statistics in float32 all the same.
    """
    exact = (layers.TimeEmbedding, layers.FourierFeatures)
    kept = {p for module in net.modules() if isinstance(module, exact) for p in module.parameters()}
    for weight in net.parameters():
        if weight not in kept:
            weight.data = weight.data.to(dtype)


def prepare(net, device, precision="auto", compiled=False):
    """The network as a function of (x, labels) for inference.

    Args:
        net: a network; it is moved to the device, in eval mode, without gradients, in the layout that is fastest there.
        device: torch.device.
        precision: 'fp32', float32 throughout; 'tf32', a GPU's convolutions and matrix products with 10 bits of
            mantissa; 'bf16', weights and images inside the network in bfloat16, with the noise level's embedding,
            statistics of normalisations and the result in float32; or 'auto', bf16 on GPUs that have it, else fp32.
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
