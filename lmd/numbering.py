"""The numbers of training's checkpoint files, by which none of them replaces one of another step."""

import math
import re

from basics.console import UserError, log
from storage.checkpoints import read_checkpoint


class Numbering:
    """Which `checkpoint_{k}.pth` of a folder a step is saved in.

    As published, k = step // snapshot_freq (1 where that is 0), and the last step takes the file of the checkpoint
    before it where both have the same number.  Where the frequency was another one before, that number may be taken by
    another step, or lie below that of an earlier step: numbers go on above the highest that is there then, which is
    said once.  The files alone decide, so that a run that starts again writes the same ones.

    Args:
        folder: Path of the checkpoints, to which nobody else writes.
        training: `config.training`.
    """

    def __init__(self, folder, training):
        self.folder, self.training = folder, training
        self._steps = None  # number -> step of the files that are there, once they are needed
        self._told = False

    def path_of(self, step):
        """The file for a step that is to be saved now."""
        if self._steps is None:
            self._steps = _steps_in(self.folder)
        number = usual = self._usual(step)
        if not self._is_free(usual, step):
            same = [k for k, there in self._steps.items() if there == step]
            number = same[0] if same else max(self._steps) + 1
        if number != usual and not self._told:
            self._told = True
            log(
                f"step {step} is saved as checkpoint_{number}.pth, not as checkpoint_{usual}.pth: those that are there "
                "were numbered by another snapshot_freq or n_iters, and none is replaced; later numbers go on above it"
            )
        self._steps[number] = step
        return self.folder / f"checkpoint_{number}.pth"

    def _usual(self, step):
        frequency = self.training.snapshot_freq
        return step // frequency if frequency else 1  # the last step's alone

    def _is_free(self, number, step):
        """Whether no file of another step has the number, and none of an earlier step a higher one."""
        last = self.training.n_iters
        first = number * self.training.snapshot_freq or last  # the two steps that have this number
        return self._steps.get(number, step) in (first, last) and not any(
            k > number and there < step for k, there in self._steps.items()
        )


def newest(folder):
    """Path and step of the furthest numbered checkpoint in a folder that can be read; None where there is none."""
    steps = {k: step for k, step in _steps_in(folder).items() if step < math.inf}
    number = max(steps, key=steps.get, default=None)
    return None if number is None else (folder / f"checkpoint_{number}.pth", steps[number])


def _steps_in(folder):
    """Number -> step of the checkpoints in a folder; infinite where a file cannot be read, which nothing replaces."""
    steps = {}
    for path in folder.glob("checkpoint_*.pth"):
        if number := re.fullmatch(r"checkpoint_(0|[1-9]\d*)\.pth", path.name):
            try:
                step = read_checkpoint(path, lazily=True)["step"] - 1  # it has the number of the next one
            except UserError:
                step = math.inf
            steps[int(number[1])] = step
    return steps
