"""Detectors that follow an image to noise and back, against Gaussian data, where every step is known exactly."""

import numpy as np
import pytest
from test_methods_onepass import SDES, exact_eps, measured

from basics.console import UserError
from lmd import methods

RATIOS = np.exp(np.linspace(-3, 3, 10))


def exact_path(name, x0, ratios=RATIOS):
    """eps (S, B, D) along the Euler steps of d(x / a) = eps dg."""
    x, predicted = x0, []  # x / a
    for i, g in enumerate(ratios):
        predicted.append(exact_eps(name, g, x))
        x = x + (ratios[min(i + 1, len(ratios) - 1)] - g) * predicted[-1]
    return np.stack(predicted)


# -------------------------------------------------------------------------------------------------------- diffpath


@pytest.mark.parametrize("name", SDES)
def test_path_norms(name):
    """Also the two published forms, which are sums of the same."""
    method = methods.create("diffpath")
    statistics, x0, _ = measured(method, name)
    eps = exact_path(name, x0)
    d = np.diff(eps, axis=0)
    expected = np.concatenate([(v**power).mean(axis=2) for v in (eps, d) for power in (1, 2, 3)])
    np.testing.assert_allclose(statistics, expected.T, rtol=5e-3, atol=2e-4)
    features = {form: methods.create("diffpath", form=form).features(statistics) for form in ("norms", "1d", "6d")}
    norms = np.concatenate([(eps**2).mean(axis=2), (d**2).mean(axis=2)])
    np.testing.assert_allclose(np.exp(features["norms"]["path_norms"]), norms.T, rtol=5e-3)
    root = np.sqrt((d**2).sum(axis=(0, 2)) / d.shape[2])
    np.testing.assert_allclose(features["1d"]["diffpath_1d"][:, 0], root, rtol=5e-3)
    sums = [(v**power).sum(axis=(0, 2)) / v.shape[2] for v in (eps, d) for power in (1, 2, 3)]
    np.testing.assert_allclose(features["6d"]["diffpath_6d"], np.transpose(sums), rtol=5e-3, atol=1e-3)


def test_path_forms():
    with pytest.raises(UserError, match=r"unknown form of diffpath '2d'; choose one of: norms, 1d, 6d"):
        methods.create("diffpath", form="2d")
