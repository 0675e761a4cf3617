"""How alike two sets of images are, by features of Inception v3: FID, KID, and the Inception score of one set.

The network and the scores are those of the package torch-fidelity, which is needed for them alone: FID (Heusel et al.,
arXiv 1706.08500), KID (Binkowski et al., arXiv 1801.01401), Inception score (Salimans et al., arXiv 1606.03498).
"""

import dataclasses

import torch

from basics.console import UserError
from metrics import weights

PACKAGE, VERSION = "torch-fidelity", "0.4.0"
INSTALL = f"pip install {PACKAGE}=={VERSION}"
WEIGHTS = "weights-inception-2015-12-05-6726825d.pth"  # the last part is the start of the file's SHA-256
URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{WEIGHTS}"
LAYERS = "2048", "logits_unbiased"  # the last pooling, for FID and KID, and the classes, for the Inception score
SPLITS = 10  # of the samples, whose Inception scores are averaged
_KID_SUBSET = 1000  # images of one of KID's subsets, as in the package
_AT_ONCE = 64  # images in the network, which enlarges them to 299x299 pixels


def require_package():
    """Imports torch-fidelity.

    Raises:
        UserError: it is not installed.
    """
    try:
        import torch_fidelity
    except ImportError as error:
        raise UserError(
            f"FID, KID and the Inception score need the package {PACKAGE}; install it by '{INSTALL}', or set "
            "--config.eval.enable_sampling=False"
        ) from error
    return torch_fidelity


@dataclasses.dataclass(frozen=True)
class Features:
    """What Inception makes of N images: `pool` (N, 2048) and `logits` (N, 1008), float32 on the CPU."""

    pool: torch.Tensor
    logits: torch.Tensor


class Inception:
    """Inception v3 as FID was defined with it, called on images (B, 1 or 3, H, W) uint8; gives `Features`.

    Args:
        device: torch.device.

    Raises:
        UserError: the package or the weights cannot be had, or the weights are damaged.
    """

    def __init__(self, device):
        self.device, package = device, require_package()
        path = weights.hub_file(
            URL, WEIGHTS, what="the Inception weights", user="the report", megabytes=91,
            instead="--config.eval.enable_sampling=False (the samples are kept: the same command makes the report)",
        )  # fmt: skip
        remedy = f"delete the file and fetch {URL} again"
        # the package unpickles whatever the file holds, so it is first seen to hold tensors alone
        weights.read(path, "the Inception weights", remedy)
        create = package.FeatureExtractorInceptionV3
        try:
            self.network = create("inception", list(LAYERS), feature_extractor_weights_path=str(path)).to(device)
        except (RuntimeError, TypeError, AttributeError) as error:
            raise UserError(f"the weights at {path} are not Inception's; {remedy}") from error

    @torch.no_grad()
    def __call__(self, images):
        parts = [self.network(part.to(self.device).expand(-1, 3, -1, -1)) for part in images.split(_AT_ONCE)]
        return Features(*(torch.cat([values.cpu() for values in layer]) for layer in zip(*parts, strict=True)))


def scores(samples, reference):
    """Compares samples with reference images.

    Args:
        samples: `Features` of at least `SPLITS` samples.
        reference: their `pool` features of the reference images, (M, 2048).

    Returns:
        dict: `IS` the Inception score, the mean over splits; `fid`; `kid`, the mean over random subsets of at most
        1000 images, the same in every run.
    """
    require_package()
    from torch_fidelity import metric_fid, metric_isc, metric_kid

    statistics = [metric_fid.fid_features_to_statistics(pool) for pool in (samples.pool, reference)]
    subset = min(_KID_SUBSET, len(samples.pool), len(reference))
    return {
        "IS": metric_isc.isc_features_to_metric(samples.logits, SPLITS)[metric_isc.KEY_METRIC_ISC_MEAN],
        "fid": metric_fid.fid_statistics_to_metric(*statistics, verbose=False)[metric_fid.KEY_METRIC_FID],
        "kid": metric_kid.kid_features_to_metric(samples.pool, reference, kid_subset_size=subset, verbose=False)[
            metric_kid.KEY_METRIC_KID_MEAN
        ],
    }
