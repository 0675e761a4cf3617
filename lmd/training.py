"""The training loop of main.py, and the `Trainer` that evaluation shares with it.

Everything random is keyed by (config.seed, step), so a run that was killed and started again ends with the same
weights, bit for bit on a CPU, as one that never was.

Several processes (`distributed.Ranks`) share each batch: every rank has the images, the times and the noise that the
whole batch would give its part, so the gradient is that of one process up to rounding.  Rank 0 alone writes.

The network's forward pass is in config.training.precision; weights, gradients, loss, optimiser and EMA are float32.
"""

import contextlib
import math
import signal
import threading
from pathlib import Path

import torch

import datasets
import losses
import models
import sde_lib
from basics import files, noise
from basics.console import Terminated, UserError, are, choose, counted, log, progress, say, warn
from basics.distributed import ALONE
from basics.tensor_files import WrongFile
from configs.base import TREE, to_dict
from lmd import samples
from lmd.batches import TrainingBatches
from lmd.held_out import held_back, without
from lmd.numbering import Numbering, newest
from lmd.training_log import Log, Pace
from models import inference
from models.score import ScoreModel
from storage.checkpoints import check_data, check_start, restore_state, write_checkpoint

META_CHECKPOINT = Path("checkpoints-meta") / "checkpoint.pth"
AGREE_EVERY = 10  # steps between two questions whether a rank was interrupted
CHECKPOINTS = "checkpoints", "checkpoints-meta"
FOLDERS = *CHECKPOINTS, "samples", "tensorboard"  # of training, in its work folder


class Trainer:
    """What the loops share: the network, its SDE and loss, the data and the files of one work folder.

    Args:
        config: the config tree.
        workdir: folder of checkpoints, logs and samples.
        device: torch.device.
        data_root: where data sets lie.
        workers: threads that decode images, see `datasets.load`.
        ranks: the processes that train together.

    Raises:
        UserError: a config of which nothing can be built, or a batch of fewer images than there are ranks.
    """

    def __init__(self, config, workdir, device, data_root, workers=None, ranks=ALONE):
        self.config, self.workdir, self.device = config, Path(workdir), device
        self.data_root, self.workers = data_root, workers
        self.ranks, self.share = ranks, ranks.share(config.training.batch_size)
        self._divided = False  # whether the user knows how the images are divided
        self._parts = {}  # by split, those of the divided images that are loaded and not handed out yet
        if 1 <= config.training.batch_size < ranks.world_size:
            raise UserError(
                f"a batch of {counted(config.training.batch_size, 'image')} cannot be shared by {ranks.world_size} "
                "processes; raise config.training.batch_size or start fewer"
            )
        torch.manual_seed(noise.key(config.seed, "initialisation") & (2**63 - 1))
        net = models.create_model(config).to(device, memory_format=inference.layout(device))
        self.sde = sde_lib.create_sde(config)
        self.model = self.shared_model = ScoreModel(net, self.sde, config.training.continuous)  # see `get_ready`
        self.loss = losses.create_loss(config, self.sde)
        self.state = losses.create_state(config, net)
        self.numbering = Numbering(self.workdir / "checkpoints", config.training)
        # what the checkpoints in the work folder say of the training images (`checkpoints.write_checkpoint`), and which
        self.trained_on, self.found = None, self.workdir / META_CHECKPOINT

    def images(self, split, check=True):
        """The config's images to train on ('train') or to measure the loss on ('test').

        The latter are those of data.test_dataset where it is set, else a named set's test split, else a share of the
        user's own images that is held back from training (`held_back`), else, of a few images, all of them.  How images
        were divided is told once.

        Args:
            split: 'train' or 'test'.
            check: as in `datasets.load`; images that are divided are never checked, so that training and evaluation
                divide them alike.
        """
        data = self.config.data
        if not self.divides:
            own_test = data.get("test_dataset", "")
            return self._load(own_test if own_test and split == "test" else data.dataset, split, check)
        if split not in self._parts:
            self._parts = self._divide(self._load(data.dataset, split, check=False))
        return self._parts.pop(split)  # not kept: training may move it to the device

    def _divide(self, images):
        """The parts of an `ImageSet` by split; of few images, all of them twice."""
        held = held_back(len(images))  # (B,)
        self._tell_division(images.name, len(held), len(images))
        if not len(held):
            return {"train": images, "test": images}
        return {"train": without(images, held), "test": images.part(held)}

    @property
    def divides(self):
        """Whether test images are held back from the user's own, for want of others."""
        data = self.config.data
        named = datasets.has_test_split(data.dataset, self.data_root, data.get("category"))
        return not (data.get("test_dataset", "") or named)

    def _load(self, source, split, check):
        data = self.config.data
        return datasets.load(
            source,
            split=split,
            image_size=data.image_size,
            num_channels=data.num_channels,
            data_root=self.data_root,
            workers=self.workers,
            category=data.get("category"),
            check=check,
        )

    def _tell_division(self, name, held, count):
        if self._divided:
            return
        self._divided = True
        if held:
            say(
                f"'{name}': {held:,} of the {count:,} images are held back from training for the test loss; "
                "config.data.test_dataset names other test images"
            )
        else:
            say(
                f"'{name}': {counted(count, 'image')} {are(count)} too few to hold some back, so the test loss is of "
                "the training images; config.data.test_dataset names test images"
            )

    def batches(self, split):
        """Shuffled batches of a split; flips and dequantisation in training alone."""
        data, training = self.config.data, split == "train"
        images = self.images(split, check=False)
        return TrainingBatches(
            images,
            self.config.training.batch_size if training else min(self.config.training.batch_size, len(images)),
            seed=noise.key(self.config.seed, split),
            device=self.device,
            random_flip=training and data.random_flip,
            uniform_dequantization=training and data.uniform_dequantization,
            centered=data.centered,
            share=self.share if training else slice(None),
        )

    def draws(self, x, *words):
        """The loss's random numbers for images x (B, C, H, W), keyed by the seed and `words`."""
        return losses.Draws.keyed(x.shape, self.sde.N, self.config.seed, *words, device=self.device)

    def get_ready(self, steps, batches):
        """Readies the network for training: layout, precision, and for the steps themselves shared and compiled.

        Without it the network is trained and evaluated eagerly in float32, by one process.

        Args:
            steps: to come.
            batches: the `TrainingBatches`; the first one shows whether the network can be compiled.

        Raises:
            UserError: it is to be compiled, and cannot be.
        """
        net, precision, choice = self.state.net, self.state.precision, setting(self.config, "compile")
        network, images = inference.InPrecision(net, self.device, precision), steps * self.config.training.batch_size
        evaluations = inference.PASSES * images / self.ranks.world_size  # the same on all ranks
        least, shape = inference.COMPILE_TRAINING_FROM, batches.images.shape
        compiled = steps > 0 and inference.worth_compiling(choice, network, evaluations, shape, least)
        self._lay_out(compiled)
        shared = self.ranks.wrap(net)
        # the solver of the method ode would answer bfloat16's rounding with ever smaller steps
        exact = self.config.sampling.method.lower() == "ode"
        self.model, self.shared_model = self._score(net, "fp32" if exact else precision), self._score(shared, precision)
        if compiled:
            log(f"compiling the network for {steps:,} steps; the first one waits for it")
            self._compile(shared, batches.batch(self.state.step), required=choice == "on")

    def _lay_out(self, compiled):
        """The memory layout in which the network is fastest, compiled or not; averages and moments get the same."""
        self.state.net.to(memory_format=inference.layout(self.device, compiled))
        losses.match_layout(self.state)

    def _score(self, net, precision):
        network = inference.InPrecision(net, self.device, precision)
        return ScoreModel(network, self.sde, self.config.training.continuous)

    def _compile(self, shared, x, required):
        """Compiles both passes of a training step by the loss of the first, on all ranks or, where one cannot, none."""
        compiled = self._score(torch.compile(shared), self.state.precision)

        def work():
            self._part_of_loss(compiled, x, self._draws_of_step(x)).backward()
            return True

        with self.ranks.together(), self.ranks.unshared(shared):
            done = inference.attempt_compiled(work, required, "set --config.training.compile=off")
        self.state.optimizer.zero_grad(set_to_none=True)
        if not self.ranks.any(not done):
            self.shared_model = compiled
        elif self.ranks.world_size == 1:
            self._lay_out(compiled=False)  # not of several: their gradients stay laid out as when `shared` was made

    def train_step(self, x):
        """One step on this rank's share x (B, C, H, W) of the batch; returns the share's part of the loss, a scalar.

        The mean of the parts over the ranks is the loss of the whole batch.
        """
        return losses.train_step(
            self.state, self._part_of_loss, self.shared_model, x, self._draws_of_step(x), self.config
        )

    def _draws_of_step(self, x):
        """The random numbers of the next step for this rank's share x; dropout's are keyed, too."""
        step, ranks, shape = self.state.step, self.ranks, (self.config.training.batch_size, *x.shape[1:])
        # dropout takes no generator: it is the one user of the global one, keyed anew for every step
        words = (step,) if ranks.world_size == 1 else (step, ranks.rank)
        torch.manual_seed(noise.key(self.config.seed, "dropout", *words) & (2**63 - 1))
        options = {"device": self.device, "share": self.share}
        return losses.Draws.keyed(shape, self.sde.N, self.config.seed, "train", step, **options)

    def _part_of_loss(self, model, x, draws):
        weight = len(x) * self.ranks.world_size / self.config.training.batch_size  # 1, unless the shares differ
        return self.loss(model, x, draws) * weight

    def with_ema(self):
        """A context in which the network has the EMA weights and is in eval mode."""
        return _EMAWeights(self.state)

    @torch.no_grad()
    def loss_on(self, x, *words):
        """The loss on x (B, C, H, W), a float; the network as it is."""
        return self.loss(self.model, x, self.draws(x, *words)).item()

    def save(self, path):
        """Writes a checkpoint under the work folder.

        Raises:
            UserError: a number is not finite; nothing is written.
        """
        if broken := losses.not_finite(self.state):
            step = self.state.step - 1
            raise UserError(f"{' and '.join(broken)} are NaN or infinite after step {step}: {self.diverged()}")
        tree, seed = to_dict(self.config), self.config.seed
        write_checkpoint(self.workdir / path, self.state, tree, seed, self.trained_on)

    def diverged(self):
        """What to tell, and to advise, where numbers are no longer finite."""
        saved = any(path for name in CHECKPOINTS for path in (self.workdir / name).glob("*.pth"))
        again = "lower config.optim.lr and start again from the last checkpoint (nothing was overwritten)"
        anew = "no checkpoint was saved yet, so the same command with a lower config.optim.lr starts anew"
        return f"training diverged; {again if saved else anew}"

    def resume(self):
        """Continues from the work folder's meta checkpoint if there is one; returns whether."""
        path = self.workdir / META_CHECKPOINT
        if path.is_file():
            try:
                self.trained_on = restore_state(path, self.state, to_dict(self.config), self.config.seed)
            except UserError as error:
                if not isinstance(error.__cause__, WrongFile):
                    raise
                raise UserError(
                    f"{path} {error.__cause__}; copy a checkpoint from {self.workdir / 'checkpoints'} over it to go on "
                    "from there, or delete it to start anew"
                ) from error
        return path.is_file()

    def check_images(self, images):
        """Notes the training images for the checkpoints; refuses others than the checkpoint that was found names."""
        here = {
            "fingerprint": images.fingerprint,
            "images": len(images),
            "source": str(self.config.data.dataset),
        }
        check_data(self.found, self.trained_on, here)
        self.trained_on = here


def setting(config, name):
    """`config.training.precision` or `compile`, which a config of earlier versions lacks."""
    return config.training.get(name, TREE["training"][name])


class _EMAWeights:
    def __init__(self, state):
        self.state = state

    def __enter__(self):
        parameters = list(self.state.net.parameters())
        self.kept = [p.detach().clone() for p in parameters]
        self.state.ema.copy_to(parameters)
        self.state.net.eval()

    @torch.no_grad()
    def __exit__(self, *error):
        for parameter, value in zip(self.state.net.parameters(), self.kept, strict=True):
            parameter.copy_(value)
        self.state.net.train()


# ------------------------------------------------------------------------------------------------------- training


def train(config, workdir, device, data_root, workers=None, ranks=ALONE):
    """Trains a score model; continues where an earlier run in the same work folder stopped.

    Writes `stdout.txt`, `tensorboard/`, `checkpoints/checkpoint_{k}.pth`, `checkpoints-meta/checkpoint.pth` and
    `samples/iter_{step}/` under the work folder.

    Args:
        config: the config tree.
        workdir: the work folder.
        device: torch.device.
        data_root: where data sets lie, or are downloaded to.
        workers: threads that decode images, see `datasets.load`.
        ranks: the processes that train together; all of them call this.

    Raises:
        UserError: bad config or data, a checkpoint that does not fit or is of other images or settings, or a loss that
            is not finite.
    """
    precision = inference.resolve(setting(config, "precision"), device, "--config.training.precision")
    choose(setting(config, "compile"), inference.CHOICES, "choice (--config.training.compile)")
    trainer = Trainer(config, workdir, device, data_root, workers, ranks)
    trainer.state.precision = precision
    found, resumed = _stamp(trainer), trainer.resume()
    first, last = trainer.state.step, config.training.n_iters
    ranks.check_same(first, "checkpoints")
    if not resumed:
        ranks.on_main(lambda: _start_anew(trainer))
    if first > last and not ranks.on_main(lambda: _lacks_samples(trainer)):
        ranks.on_main(lambda: _tell_finished(trainer))
        return
    ranks.on_main(lambda: files.check_writable(trainer.workdir))  # before the images are read
    if config.training.snapshot_sampling:
        samples.create_sampler(config, trainer.sde)  # what cannot be sampled is told before the first step
    train_batches = ranks.in_turn(lambda: trainer.batches("train"))
    ranks.check_same((to_dict(config), precision, train_batches.images.fingerprint), "settings or training images")
    ranks.on_main(lambda: trainer.check_images(train_batches.images))
    with _owning(trainer, found):
        _train(trainer, train_batches, resumed)
    say(f"trained: checkpoints are in {trainer.workdir / 'checkpoints'}, the log in {trainer.workdir / 'stdout.txt'}")


def _tell_finished(trainer):
    """Tells that the last step is done; refuses images from elsewhere that are not those of the checkpoint."""
    first, last, theirs = trainer.state.step, trainer.config.training.n_iters, trainer.trained_on
    if theirs is not None and theirs["source"] != trainer.config.data.dataset:
        trainer.check_images(trainer.batches("train").images)
    of = f" of {last}" if first == last + 1 else f", beyond config.training.n_iters={last}"
    on = "" if theirs is None else f", trained on {counted(theirs['images'], 'image')} of {theirs['source']}"
    say(f"already trained: {trainer.workdir / META_CHECKPOINT} is at step {first - 1}{of}{on}")


def _start_anew(trainer):
    """Tells of numbered checkpoints that training does not go on from, for want of the meta checkpoint.

    Those of another training are refused: the new one would replace some and leave others.
    """
    _warn_of_a_low_rate(trainer.config)
    if found := newest(trainer.workdir / "checkpoints"):
        (path, step), meta = found, trainer.workdir / META_CHECKPOINT
        trainer.found, trainer.trained_on = path, check_start(path, to_dict(trainer.config), trainer.config.seed)
        warn(
            f"there is no {meta}, so training starts anew at step 0; to go on after step {step} instead, stop this "
            f"run, copy {path} to {meta}, and run the same command again"
        )


def _warn_of_a_low_rate(config):
    """Tells where a training is too short for the learning rate to come near the one that is set."""
    optim, last = config.optim, config.training.n_iters
    highest = max(losses.learning_rate(config, step) for step in range(0, last + 1, 1 + last // 1000))
    if highest < optim.lr / 2:
        warn(
            f"of config.optim.lr={optim.lr:g} the learning rate reaches {highest:.2g} at most: {counted(last, 'step')} "
            f"are few for a warm-up of {optim.warmup} and a cool-down of {optim.get('cooldown', 0)}; "
            "lower config.optim.warmup and cooldown, too"
        )


def _stamp(trainer):
    """What changes when the meta checkpoint is written: its number in the file system and its time, or None."""
    path = trainer.workdir / META_CHECKPOINT
    return (path.stat().st_ino, path.stat().st_mtime_ns) if path.is_file() else None


@contextlib.contextmanager
def _owning(trainer, found):
    """Within it no other training writes to the work folder.

    Args:
        trainer: a `Trainer`.
        found: the meta checkpoint's `_stamp` before it was read.

    Raises:
        UserError: another run writes there, or wrote there since.
    """
    with contextlib.ExitStack() as stack:
        with trainer.ranks.together():
            if trainer.ranks.is_main:
                stack.enter_context(files.owned(trainer.workdir))
                if _stamp(trainer) != found:
                    raise UserError(f"another run trained in {trainer.workdir} just now; start this one again")
        yield


def _train(trainer, train_batches, resumed):
    """The loop of `train`, from the trainer's step to the last."""
    ranks, first, last = trainer.ranks, trainer.state.step, trainer.config.training.n_iters
    test_batches, log = None, None
    with ranks.together():
        if ranks.is_main:
            test_batches = trainer.batches("test") if trainer.config.training.eval_freq else None
            log = Log(trainer.workdir, first)
            log.line(_headline(trainer, len(train_batches.images), first if resumed else None))
    bar = progress(total=last + 1, initial=first, unit="step", desc="training")
    try:
        with inference.arithmetic(trainer.state.precision):
            trainer.get_ready(last + 1 - first, train_batches)
            with _noted_interrupt(ranks) as interrupted:
                ranks.on_main(lambda: _sample(trainer, log, first - 1) if _lacks_samples(trainer) else None)
                pace = Pace(train_batches, trainer.config.training.batch_size)
                for step in range(first, last + 1):
                    value = trainer.train_step(train_batches.batch(step))
                    bar.update()
                    pace.steps += 1
                    _after_step(trainer, log, test_batches, step, value, pace)
                    if _all_stop(ranks, interrupted, step):
                        ranks.on_main(lambda: _save_and_tell(trainer, log))
                        raise Terminated if signal.SIGTERM in interrupted else KeyboardInterrupt
    finally:
        bar.close()
        if log:
            if count := len(train_batches.images.skipped):
                log.line(f"images left out because they could not be used: {count}")
            log.close()


def _save_and_tell(trainer, log):
    trainer.save(META_CHECKPOINT)
    log.line(f"stopped: step {trainer.state.step - 1} is saved in {trainer.workdir / META_CHECKPOINT}")


@contextlib.contextmanager
def _noted_interrupt(ranks):
    """Yields a list in which a first Ctrl-C or SIGTERM is noted, to be acted on between steps; a second acts at once.

    Not so a second SIGTERM to one of several processes: a scheduler sends it to all, and torchrun passes its own on.
    """
    noted = []
    if threading.current_thread() is not threading.main_thread():  # which alone may handle signals
        yield noted
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore(*numbers):
        for number in numbers:
            if signal.getsignal(number) is note:  # what failed may have set another since: `console.stay_to_tell`
                signal.signal(number, before[number])

    def note(number, frame):
        noted.append(number)
        restore(signal.SIGINT, *([signal.SIGTERM] if ranks.world_size == 1 else []))

    for number in before:
        signal.signal(number, note)
    try:
        yield noted
    finally:
        restore(*before)


def _all_stop(ranks, interrupted, step):
    """Whether training stops after a step: a process by itself at once, several at every tenth step, for all ask all.

    Not all may have been interrupted, yet all stop at the same step.
    """
    if ranks.world_size == 1:
        return bool(interrupted)
    return step % AGREE_EVERY == 0 and ranks.any(interrupted)


def _headline(trainer, images, resumed_at):
    count = sum(p.numel() for p in trainer.state.net.parameters())
    training = trainer.config.training
    where = f"{trainer.device}, {trainer.state.precision}"
    start = "starting" if resumed_at is None else f"resuming at step {resumed_at}"
    return (
        f"{start}: {trainer.config.model.name}, {count:,} parameters, {training.sde}, {counted(images, 'image')} of "
        f"{trainer.config.data.dataset}, batches of {training.batch_size}, {counted(training.n_iters, 'step')}, {where}"
    )


def _due(training, step):
    """What follows a step, for `config.training`: a set of 'log', 'evaluate', 'snapshot' and 'preemption'."""
    final = step == training.n_iters
    every = lambda frequency: frequency > 0 and step % frequency == 0  # 0 is never
    table = {
        "log": every(training.log_freq),
        "evaluate": every(training.eval_freq),
        "snapshot": final or (step and every(training.snapshot_freq)),
        "preemption": final or (step and every(training.snapshot_freq_for_preemption)),
    }
    return {name for name, now in table.items() if now}


def _after_step(trainer, log, test_batches, step, part, pace):
    """Logs, evaluates and saves what is due after `step`.

    Args:
        trainer, log, test_batches, step: of the loop.
        part: what `Trainer.train_step` gave, a scalar tensor, which is read where something is due.
        pace: the `Pace`, which goes on to count after it.
    """
    ranks, due, value = trainer.ranks, _due(trainer.config.training, step), None
    if due:  # reading it waits for the step, so that what follows is not counted as its time
        value = ranks.mean(part.item())
        if not math.isfinite(value):
            raise UserError(f"the loss is {value} at step {step}: {trainer.diverged()}")
        pace.pause()
        with ranks.together():
            if ranks.is_main:
                if "log" in due:
                    log.scalar("training_loss", value, step, pace)
                _write_due(trainer, log, test_batches, step, due)
        if "log" in due:
            pace.restart()
        pace.go_on()


def _write_due(trainer, log, test_batches, step, due):
    training = trainer.config.training
    if "evaluate" in due:
        with trainer.with_ema():
            log.scalar("eval_loss", trainer.loss_on(test_batches.batch(step), "eval", step), step)
    if "snapshot" in due:
        trainer.save(trainer.numbering.path_of(step).relative_to(trainer.workdir))
    sampled = "snapshot" in due and training.snapshot_sampling
    if sampled:
        files.mark(_samples_of(trainer, step).parent)
        _samples_of(trainer, step).mkdir(exist_ok=True)  # before the next file: see `_lacks_samples`
    if "preemption" in due:  # after the file above, which a run that is killed before makes again
        trainer.save(META_CHECKPOINT)
    if sampled:  # last, as it takes long
        _sample(trainer, log, step)


def _sample(trainer, log, step):
    """Draws and writes the samples of a step that has just been made."""
    folder = _samples_of(trainer, step)
    with trainer.with_ema():
        samples.write(folder, samples.draw(trainer, trainer.config.training.batch_size, step))
    log.line(f"samples of step {step} are in {folder}")


def _samples_of(trainer, step):
    return trainer.workdir / "samples" / f"iter_{step}"


def _lacks_samples(trainer):
    """Whether the run that is continued was killed while it drew the samples of its last step.

    It has left their folder, then: a user who has deleted that does not want them again.
    """
    training, step = trainer.config.training, trainer.state.step - 1
    due = step >= 0 and training.snapshot_sampling and "snapshot" in _due(training, step)
    folder = _samples_of(trainer, step)
    return due and folder.is_dir() and not (folder / samples.FILES[-1]).is_file()
