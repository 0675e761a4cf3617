"""Several processes of one command, started by torchrun, on one machine or on many.

`start` joins them and gives each its device.  What they do together goes through the `Ranks` that it yields; a
process by itself is `ALONE`, which joins nothing and costs nothing.

When one of them fails, all end.  Work that all wait for (`together`, `on_main`, `in_turn`) ends with an agreement, so
that nobody waits for a rank that failed; elsewhere torchrun ends the others.  `console.guard` has one of them tell why.
"""

import contextlib
import dataclasses
import datetime
import hashlib
import inspect

from basics import files
from basics.console import UserError, counted

# Ranks wait for a download or samples of rank 0, or for the last batch of a slower one.
_PATIENCE = datetime.timedelta(days=1)


class FailedElsewhere(SystemExit):
    """Another rank failed in what was done together and tells the user: this one leaves silently."""


@dataclasses.dataclass(frozen=True)
class Ranks:
    """This process's place among all.

    Every method but `share` and `unshared` is a collective: all ranks call it, in the same order.

    Attributes:
        rank: 0 .. world_size - 1; rank 0 writes what is written once.
        local_rank: the same among the processes of this machine.
        world_size: the number of processes.
        group: the process group of CPU tensors through which the ranks agree, or None for a process by itself.
    """

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    group: object = None

    @property
    def is_main(self):
        """Whether this is rank 0."""
        return self.rank == 0

    def share(self, count):
        """This rank's part of 0 .. count - 1, a slice; the parts differ by one at most."""
        return slice(count * self.rank // self.world_size, count * (self.rank + 1) // self.world_size)

    def wrap(self, net):
        """A network whose gradients are means over the ranks after each backward; alone the network itself.

        Collective: the weights become rank 0's.
        """
        if self.world_size == 1:
            return net
        from torch.nn.parallel import DistributedDataParallel

        # No buffer changes in training, so none is sent at every step; torch 2.15 gave the option another name.
        known = inspect.signature(DistributedDataParallel).parameters
        option = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
        return DistributedDataParallel(net, gradient_as_bucket_view=True, **{option: False})

    def unshared(self, wrapped):
        """A block in which the gradients of what `wrap` gave are those of this process alone, and nothing is sent."""
        return wrapped.no_sync() if self.world_size > 1 else contextlib.nullcontext()

    def any(self, flag):
        """Whether `flag` is true on any rank."""
        return bool(self._reduce([int(bool(flag))], "MAX")[0])

    def wait(self):
        """Goes on when all ranks have come here."""
        self.any(False)

    def mean(self, value):
        """The mean of a float over the ranks, the same on all."""
        return self._reduce([float(value)], "SUM")[0] / self.world_size

    def gather(self, value):
        """Plain data of all ranks, a list in their order, the same on all."""
        values = [value] * self.world_size
        if self.world_size > 1:
            import torch.distributed as dist

            dist.all_gather_object(values, value, group=self.group)
        return values

    def _reduce(self, values, operation):
        if self.world_size == 1:
            return values
        import torch
        import torch.distributed as dist

        reduced = torch.tensor(values, dtype=torch.float64 if isinstance(values[0], float) else torch.int64)
        dist.all_reduce(reduced, getattr(dist.ReduceOp, operation), self.group)
        return reduced.tolist()

    @contextlib.contextmanager
    def together(self):
        """A section, without collectives inside, after which all ranks go on or none does.

        Raises:
            FailedElsewhere: the section failed on another rank alone.
        """
        from basics.console import EXIT_USER_ERROR, stay_to_tell

        error = None
        try:
            yield
        except BaseException as caught:
            error = caught
            if self.world_size > 1:
                stay_to_tell()
        failed = self.any(error is not None)
        if error is not None:
            raise error
        if failed:
            raise FailedElsewhere(EXIT_USER_ERROR)

    def on_main(self, function):
        """Runs `function()` on rank 0 while the others wait; gives its result, plain data, on all of them."""
        results = [None]
        with self.together():
            if self.is_main:
                results = [function()]
        if self.world_size > 1:
            import torch.distributed as dist

            dist.broadcast_object_list(results, src=0, group=self.group)
        return results[0]

    @contextlib.contextmanager
    def owned(self, folder):
        """Within it rank 0 owns a folder (`files.owned`) for all ranks, which are to leave it together."""
        with contextlib.ExitStack() as owner:
            self.on_main(lambda: owner.enter_context(files.owned(folder)))
            yield

    def in_turn(self, function):
        """Runs `function()` on rank 0, then on the first of each other machine, then on the rest; gives its result.

        So what the first of them downloads the others find, be the folder shared by the machines or not.
        """
        mine = 0 if self.is_main else 1 if self.local_rank == 0 else 2
        for turn in range(3):
            with self.together():
                if turn == mine:
                    result = function()
        return result

    def check_same(self, value, what):
        """Compares plain data (by its repr) between the ranks.

        Args:
            value: the data.
            what: its name in the message, such as 'images'.

        Raises:
            UserError: on all ranks, if they differ.
        """
        digest = hashlib.blake2b(repr(value).encode(), digest_size=7).digest()  # fits a signed 64-bit integer
        number = int.from_bytes(digest, "little")
        largest, minus_smallest = self._reduce([number, -number], "MAX")
        if largest != -minus_smallest:
            raise UserError(
                f"the processes of this run see different {what}; give all machines the same command and data, and "
                "a folder for the results that they share"
            )


ALONE = Ranks()


@contextlib.contextmanager
def start(device_name):
    """Joins the processes that torchrun started; a process by itself gets its device and nothing else happens.

    Args:
        device_name: 'auto', 'cpu', 'cuda' or 'cuda:i'; several processes on GPUs get one each, by local rank.

    Yields:
        (Ranks, torch.device).

    Raises:
        UserError: a device that is not there.
    """
    from basics.console import place
    from basics.machine import choose_device

    ranks = Ranks(*place())
    if ranks.world_size == 1:
        yield ALONE, choose_device(device_name)
        return
    import torch.distributed as dist

    device = own_device(device_name, ranks)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    yield dataclasses.replace(ranks, group=dist.new_group(backend="gloo", timeout=_PATIENCE)), device
    dist.destroy_process_group()  # not after an error: its end would reach the other ranks before its reason is told


def own_device(name, ranks):
    """The device of one of several processes: the GPU of its local rank, made the current one, or the CPU.

    Raises:
        UserError: a GPU by number, fewer GPUs than processes, or as `machine.choose_device`.
    """
    import torch

    from basics.machine import choose_device

    device = choose_device(name)
    if device.type == "cpu":
        return device
    if device.index is not None:
        raise UserError(f"each process of torchrun takes a GPU of its own, not '{name}'; use --device cuda")
    if ranks.local_rank >= torch.cuda.device_count():
        raise UserError(
            f"torchrun started more processes than the {counted(torch.cuda.device_count(), 'GPU')} that torch sees; "
            "lower --nproc_per_node"
        )
    device = torch.device("cuda", ranks.local_rank)
    torch.cuda.set_device(device)
    return device
