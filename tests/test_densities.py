"""Densities against scikit-learn's, from arrays alone."""

import numpy as np
import pytest
from sklearn import mixture, neighbors

from basics.console import UserError
from lmd.methods.densities import GaussianMixture, Independent, KernelDensity, Neighbours

DENSITIES = {
    "independent": lambda: Independent(3),
    "mixture": lambda: GaussianMixture(3, components=4),
    "kernels": lambda: KernelDensity(3),
    "neighbours": lambda: Neighbours(3, k=5),
}


def values(count, seed=0):
    """Two clumps in units that differ by 10^6, correlated."""
    rng = np.random.default_rng(seed)
    clump = rng.integers(2, size=(count, 1)) * np.array([4.0, 0.0, -3.0])
    mixed = rng.normal(size=(count, 3)) @ np.array([[1.0, 0.8, 0.0], [0.0, 0.5, 0.3], [0.0, 0.0, 0.1]])
    return (clump + mixed) * [1e-3, 1.0, 1e3] + [5.0, -2.0, 0.0]


def standardised(fitted, new):
    return ((part - fitted.mean(axis=0)) / fitted.std(axis=0) for part in (fitted, new))


def mixture_of_sklearn(density, fitted, new):
    arrays = density.arrays()
    model = mixture.GaussianMixture(len(arrays["weights"]))
    model.weights_, model.means_, model.precisions_cholesky_ = (
        arrays[name] for name in ("weights", "means", "whitening")
    )
    again = mixture.GaussianMixture(4, random_state=0, n_init=5).fit(fitted)
    assert model.score(new[:1500]) == pytest.approx(again.score(new[:1500]), abs=0.05)
    return -model.score_samples(new)


ORACLES = {
    "independent": lambda density, fitted, new: np.square(new).sum(axis=1),
    "mixture": mixture_of_sklearn,
    "kernels": lambda density, fitted, new: (
        -(neighbors.KernelDensity(bandwidth=len(fitted) ** (-1 / 7)).fit(fitted).score_samples(new))
    ),
    "neighbours": lambda density, fitted, new: neighbors.NearestNeighbors().fit(fitted).kneighbors(new, 5)[0][:, 4],
}


@pytest.mark.parametrize("name", DENSITIES)
def test_against_sklearn(name):
    fitted, new = values(600), np.concatenate([values(1500, 1), values(20, 2) * 30])
    density = DENSITIES[name]().fit(fitted)
    expected = ORACLES[name](density, *standardised(fitted, new))
    np.testing.assert_allclose(density.score(new), expected, rtol=1e-9, atol=1e-9)
    assert density.score(new[1500:]).min() > np.median(density.score(new[:1500]))
    other = DENSITIES[name]()
    other.restore(density.arrays())
    np.testing.assert_array_equal(other.score(new), density.score(new))
    np.testing.assert_array_equal(DENSITIES[name]().fit(fitted).score(new), density.score(new))


@pytest.mark.parametrize("name", DENSITIES)
def test_bad_input(name):
    density = DENSITIES[name]()
    with pytest.raises(UserError, match=rf"at least {density.fewest} in-domain images, not {density.fewest - 1};"):
        density.fit(values(density.fewest - 1))
    density.fit(values(density.fewest))  # and so many are enough
    broken = values(50)
    broken[3, 1] = np.nan
    with pytest.raises(UserError, match="1 of 50 in-domain images has numbers that are not finite"):
        density.fit(broken)
    assert np.isnan(density.score(broken)).nonzero()[0].tolist() == [3]
    for key, value in density.arrays().items():
        for wrong in (value[..., :-1], value * np.nan, None):
            arrays = {**density.arrays(), key: wrong}
            if wrong is None:
                del arrays[key]
            with pytest.raises(ValueError, match=key):
                DENSITIES[name]().restore(arrays)


def test_components_follow_the_images():
    """Fifteen images a component of three numbers; a number that never changes is no obstacle."""
    for count, components in ((15, 1), (45, 3), (600, 4)):
        constant = values(count) * [1, 0, 1] + [0, 0.1, 0]
        density = GaussianMixture(3, components=4).fit(constant)
        assert len(density.arrays()["weights"]) == components
        assert np.isfinite(density.score(constant)).all()
