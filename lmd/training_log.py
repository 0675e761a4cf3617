"""What training tells as it goes: lines in the console and in `stdout.txt`, scalars in TensorBoard, and its pace."""

import os
import time

from torch.utils.tensorboard import SummaryWriter

from basics import files
from basics.console import UserError, log, percent, printable, remedy, warn


class Log:
    """Lines to the console and `stdout.txt`, scalars also to TensorBoard."""

    def __init__(self, workdir, first_step):
        self._path = workdir / "stdout.txt"
        try:
            self.file = files.open_own(self._path)
            _end_line(self.file)
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
        try:
            print(printable(stamped), file=self.file, flush=True)
        except OSError as error:
            error.filename = self._path  # writing does not tell it
            raise

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


def _end_line(file):
    """Ends the last line of a text file open for appending, which a full disk may have cut off."""
    size = os.fstat(file.fileno()).st_size
    if size and os.pread(file.fileno(), 1, size - 1) != b"\n":
        print(file=file, flush=True)


class Pace:
    """How fast training goes, other work between the steps not counted.

    Args:
        batches: the `TrainingBatches`.
        batch_size: images of a step, of all ranks together.

    Attributes:
        steps: done since the start, to be counted by the caller.
    """

    def __init__(self, batches, batch_size):
        self.batches, self.batch_size = batches, batch_size
        self.restart()
        self.go_on()

    def restart(self):
        """Forgets what was measured."""
        self.steps, self.seconds, self.waited = 0, 0.0, 0.0

    def go_on(self):
        """From here on it is measured."""
        self._since = time.perf_counter(), self.batches.waited

    def pause(self):
        """Here other work begins, until `go_on`."""
        begun, waited = self._since
        self.seconds += time.perf_counter() - begun
        self.waited += self.batches.waited - waited

    def __str__(self):
        rate, share = self.steps * self.batch_size / self.seconds, percent(round(self.waited / self.seconds, 2))
        return f"{rate:,.1f} images/s, {share} of the time waiting for data"
