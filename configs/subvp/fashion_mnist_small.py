"""Fashion-MNIST, grey, with a network small enough to train on two CPU cores within the hour.

    python main.py --config configs/subvp/fashion_mnist_small.py --workdir results/fashion_mnist_small/ --mode train

The published Fashion-MNIST config with one channel, a quarter of the width and fewer, larger steps, the last third of
them at a falling rate.

1.1 million parameters. On two cores of an AMD EPYC 9004 a training step takes 0.28 to 0.35 s, so all take 35 to 44
minutes; with --config.training.precision=bf16 --config.training.compile=on 0.24 s, half an hour.
"""

from configs.presets import DDPM, FASHION_MNIST, SUBVP, build

SMALL = {
    "data.num_channels": 1,
    "model.nf": 32,
    "model.ch_mult": (1, 2, 2),
    "model.num_res_blocks": 1,
    "model.attn_resolutions": (8,),
    "model.dropout": 0.0,
    "model.ema_rate": 0.999,
    "model.num_scales": 200,  # steps of sampling and reconstruction; training is on continuous times
    "training.batch_size": 32,
    "training.n_iters": 7500,
    "training.eval_freq": 250,
    "training.snapshot_freq": 2500,
    "training.snapshot_freq_for_preemption": 250,
    "optim.lr": 1e-3,
    "optim.warmup": 200,
    "optim.cooldown": 2500,
    "eval.begin_ckpt": 1,
    "eval.end_ckpt": 3,
}


def get_config():
    return build(FASHION_MNIST, DDPM, SUBVP, SMALL)
