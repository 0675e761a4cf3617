"""Maps of what is unusual: smoothing against SciPy's, moments against NumPy's."""

import numpy as np
import torch
from scipy import ndimage

from lmd import heat

DISTANCES = torch.rand(5, 20, 20, generator=torch.Generator().manual_seed(0))


def test_smoothed_is_a_gaussian_filter():
    deviation = 0.14 * 20
    reach = int(np.ceil(2 * deviation))
    expected = ndimage.gaussian_filter(DISTANCES, (0, deviation, deviation), mode="nearest", radius=(0, reach, reach))
    np.testing.assert_allclose(heat.smoothed(DISTANCES), expected, rtol=1e-5)


def test_moments_of_chunks_are_those_of_all_pixels():
    sums = np.stack([heat.sums(DISTANCES[:2]), heat.sums(DISTANCES[2:])])
    values = heat.smoothed(DISTANCES).double().numpy()
    moments = heat.moments(sums)
    np.testing.assert_allclose(moments, [values.mean(), values.std()], rtol=1e-6)
    maps = heat.standardised(DISTANCES, moments)
    assert maps.dtype == np.float32
    np.testing.assert_allclose([maps.mean(), maps.std()], [0, 1], atol=1e-4)


def test_without_distances():
    assert heat.moments(np.stack([heat.sums(None)] * 2)).shape == (0,)


def test_equal_pixels_give_finite_maps():
    flat = torch.full((2, 8, 8), 0.5)
    assert np.isfinite(heat.standardised(flat, heat.moments(heat.sums(flat)[None]))).all()
