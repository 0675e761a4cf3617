"""Trains a score model, or evaluates its checkpoints.

python main.py --workdir results/cifar10/ --config configs/subvp/cifar10_ddpm_continuous.py --mode train

On several GPUs: torchrun --nproc_per_node=8 main.py ...
"""

from absl import flags

from basics import distributed, machine
from basics.console import UserError
from command_line import define_config, define_path, define_shared, run, value_of
from configs.base import check, typed
from configs.fields import SEED, check_value

FLAGS = flags.FLAGS


def define_flags():
    """The command line; inside a function so that importing this module defines nothing."""
    evaluating = value_of("mode") == "eval"
    define_config(
        "The config file, which --mode eval may do without; any value: --config.training.batch_size=64.",
        value_of("workdir") if evaluating else None,
    )
    define_path("workdir", None, "Folder of checkpoints, logs and samples; a run found there is continued.")
    flags.DEFINE_enum(
        "mode", None, ["train", "eval"], "train: train; eval: evaluate the checkpoints as config.eval says."
    )
    flags.DEFINE_string("eval_folder", "eval", "Folder below workdir for the results of --mode eval.")
    define_shared("data_root", "workers")
    flags.DEFINE_string("device", None, "auto, cpu, cuda or cuda:i; by default the config's.")
    flags.DEFINE_integer("seed", None, "Key of everything random; by default the config's.")
    flags.mark_flags_as_required(["workdir", "mode"])


def main(_):
    config = FLAGS.config
    if FLAGS.seed is not None:
        if "seed" in typed(FLAGS["config"]):
            raise UserError("--seed and --config.seed say the same; leave one out")
        check_value("--seed", FLAGS.seed, SEED)
        config.seed = FLAGS.seed
    check(config)
    with distributed.start(FLAGS.device or config.device) as (ranks, device):
        if device.type == "cpu":
            machine.keep_freed_memory()
        from lmd import process

        process.check_typed(config, typed(FLAGS["config"]))
        if FLAGS.mode == "train":
            from lmd import training
            from models import memory

            with memory.explained(device, "for this training; lower --config.training.batch_size"):
                training.train(config, FLAGS.workdir, device, FLAGS.data_root, FLAGS.workers, ranks)
        elif ranks.world_size > 1:
            raise UserError("--mode eval runs in one process; start it without torchrun")
        else:
            from lmd import evaluation

            evaluation.evaluate(config, FLAGS.workdir, FLAGS.eval_folder, device, FLAGS.data_root, FLAGS.workers)


if __name__ == "__main__":
    define_flags()
    run(main)
