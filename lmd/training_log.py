"""What training tells as it goes: lines in the console and in `stdout.txt`, scalars in TensorBoard, and its pace."""

import time

from torch.utils.tensorboard import SummaryWriter

from basics import files
from basics.console import UserError, log, percent, printable, remedy, warn


class Log:
    """Lines to the console and `stdout.txt`, scalars also to TensorBoard."""

    def __init__(self, workdir, first_step):

        try:
            self.file = files.open_own(workdir / "stdout.txt")
            self.writer = SummaryWriter(workdir / "tensorboard", purge_step=first_step or None)
        except UnicodeEncodeError:
            self.writer = None
            warn(f"TensorBoard cannot write below {workdir}, whose name is no UTF-8; stdout.txt has its numbers")
        except OSError as error:
            raise UserError(f"cannot write to {workdir}: {error.strerror}; {remedy(error)}") from error

    def line(self, text):
        """Writes a line with the time of day."""
        stamped = f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}"
        log(stamped)
        print(printable(stamped), file=self.file, flush=True)

    def scalar(self, name, value, step, *notes):
        """Writes `step: N, name: value`, and the notes behind it."""
        self.line(", ".join([f"step: {step}, {name}: {value:.5e}", *map(str, notes)]))
        if self.writer:
            self.writer.add_scalar(name, value, step)

    def close(self):
        """Flushes and closes the files."""
        if self.writer:
            self.writer.close()
        self.file.close()


class Pace:
    """How fast training goes, since it was last measured or interrupted by other work.

    Args:
        batches: the `TrainingBatches`.
        batch_size: images of a step, of all ranks together.

    Attributes:
        steps: done since then, to be counted by the caller.
    """

    def __init__(self, batches, batch_size):
        self.batches, self.batch_size = batches, batch_size
        self.restart()

    def restart(self):
        """From here on it is measured."""
        self.steps, self.begun, self.waited = 0, time.perf_counter(), self.batches.waited

    def __str__(self):
        seconds = time.perf_counter() - self.begun
        share = percent(round((self.batches.waited - self.waited) / seconds, 2))
        return f"{self.steps * self.batch_size / seconds:,.1f} images/s, {share} of the time waiting for data"
