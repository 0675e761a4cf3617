"""The evaluation of main.py: `evaluate` goes through the numbered checkpoints of a training run."""

import math

import numpy as np

import datasets
import storage
from configs.base import to_dict
from console import UserError, progress, say
from training import Trainer


def evaluate(config, workdir, eval_folder, device, data_root):
    """The mean test loss of every numbered checkpoint from eval.begin_ckpt to eval.end_ckpt, with the EMA weights.

    Writes `{workdir}/{eval_folder}/ckpt_{k}_loss.npz` with `all_losses` (one a batch) and `mean_loss` (over images).

    Args:
        config: the config tree.
        workdir: the work folder of a training run.
        eval_folder: name of the folder for the results.
        device: torch.device.
        data_root: where data sets lie.

    Raises:
        UserError: no checkpoint of the range is there, or the config asks for what is not computed here.
    """
    for field, computed in {"enable_loss": True, "enable_sampling": False, "enable_bpd": False}.items():
        if config.eval.get(field, computed) != computed:
            raise UserError(f"evaluation computes the test loss alone; set --config.eval.{field}={computed}")
    trainer = Trainer(config, workdir, device, data_root)
    wanted = range(config.eval.begin_ckpt, config.eval.end_ckpt + 1)
    paths = {k: trainer.workdir / "checkpoints" / f"checkpoint_{k}.pth" for k in wanted}
    present = [k for k in wanted if paths[k].is_file()]
    missing = [str(k) for k in wanted if k not in present]
    if not present:
        raise UserError(
            f"{trainer.workdir / 'checkpoints'} holds none of checkpoint_{wanted.start}.pth to "
            f"checkpoint_{wanted[-1] if wanted else '?'}.pth; set --config.eval.begin_ckpt and end_ckpt"
        )
    if missing:
        say(f"missing checkpoints, left out: {', '.join(missing)}")
    images = trainer.images("test")
    for k in present:
        storage.load_ema_weights(paths[k], trainer.state.net, to_dict(config))
        trainer.state.net.eval()
        _evaluate_one(trainer, images, k, trainer.workdir / eval_folder / f"ckpt_{k}_loss.npz")


def _evaluate_one(trainer, images, k, path):
    import io

    config, values, counts = trainer.config, [], []
    batches = datasets.in_order(images, config.eval.batch_size, trainer.device, config.data.centered)
    total = math.ceil(len(images) / config.eval.batch_size)
    for i, x in enumerate(progress(batches, total=total, unit="batch", desc=f"checkpoint {k}")):
        values.append(trainer.loss_on(x, "evaluate", i))
        counts.append(len(x))
    mean = float(np.average(values, weights=counts))
    array = io.BytesIO()
    np.savez_compressed(array, all_losses=np.array(values), mean_loss=mean)
    storage.write_bytes(path, array.getvalue())
    say(f"checkpoint {k}: mean test loss {mean:.5f} over {len(images)} images; written to {path}")
