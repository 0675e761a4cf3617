"""The adaptive Runge-Kutta method against SciPy's RK45, row by row."""

import math

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp

import ode
from basics.console import UserError


def van_der_pol(y, t, stiffness):
    """(n, 2), (n,), (n,) -> (n, 2): x'' = mu (1 - x^2) x' - x, driven."""
    x, v = y.unbind(1)
    return torch.stack([v, stiffness * (1 - x * x) * v - x + torch.sin(3 * t)], dim=1)


def pendulum(y, t, length):
    angle, speed = y.unbind(1)
    return torch.stack([speed, -torch.sin(angle) / length - 0.1 * speed * t], dim=1)


def decay(y, t, rate):
    return -rate[:, None] * y


STIFFNESS = torch.tensor([0.0, 0.5, 2.0, 8.0, 30.0], dtype=torch.float64)
FAR = torch.tensor([[2.0, 0.0], [0.5, -1.0], [1.0, 1.0], [-2.0, 0.3], [2.0, 0.1]], dtype=torch.float64)
ZERO = torch.zeros(5, 2, dtype=torch.float64)  # whose first step has no scale
PROBLEMS = {
    "stiff": (van_der_pol, STIFFNESS, FAR, (0.0, 8.0), 1e-5),
    "backward": (pendulum, STIFFNESS + 0.1, FAR, (4.0, -1.0), 1e-5),
    "from zero": (van_der_pol, STIFFNESS, ZERO, (0.0, 3.0), 1e-7),
    "at rest": (pendulum, STIFFNESS + 0.1, ZERO, (1.0, 1e-5), 1e-5),
    "shorter than the first step": (decay, STIFFNESS / 100, FAR, (0.5, 0.503), 1e-3),
    "decay": (decay, STIFFNESS, FAR, (1e-5, 1.0), 1e-5),
}


def by_scipy(velocity, parameter, start, span, tolerance):
    """The ends (B, 2) and evaluations (B,) of the rows, each solved alone."""
    ends, counts = [], []
    for one, y in zip(parameter, start, strict=True):
        slope = lambda t, y, one=one: velocity(torch.tensor(y)[None], torch.tensor([t]), one[None])[0].numpy()
        solution = solve_ivp(slope, span, y.numpy(), method="RK45", rtol=tolerance, atol=tolerance)
        assert solution.success
        ends.append(solution.y[:, -1])
        counts.append(solution.nfev)
    return torch.tensor(np.array(ends)), torch.tensor(counts)


def solved(velocity, parameter, start, span, tolerance):
    return ode.solve(lambda y, t, rows: velocity(y, t, parameter[rows]), start, span, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", PROBLEMS)
def test_each_row_takes_the_steps_of_scipy(name):
    """Together and, which must make no difference, each alone."""
    velocity, parameter, start, span, tolerance = PROBLEMS[name]
    expected, counts = by_scipy(*PROBLEMS[name])
    end, evaluations = solved(*PROBLEMS[name])
    torch.testing.assert_close(end, expected, rtol=1e-10, atol=1e-10)
    assert evaluations.tolist() == counts.tolist()
    for row in range(5):
        only = slice(row, row + 1)
        alone, count = solved(velocity, parameter[only], start[only], span, tolerance)
        torch.testing.assert_close(alone[0], end[row], rtol=1e-11, atol=1e-11)
        assert count.item() == counts[row]
    if name == "stiff":
        assert len(set(counts.tolist())) == 5
        assert counts.max() > 4 * counts.min()


def test_what_has_arrived_is_not_evaluated_again():
    velocity, parameter, start, span, tolerance = PROBLEMS["stiff"]
    seen = []

    def recorded(y, t, rows):
        assert len(y) == len(t) == len(rows)
        seen.append(rows)
        return velocity(y, t, parameter[rows])

    _, evaluations = ode.solve(recorded, start, span, rtol=tolerance, atol=tolerance)
    assert torch.equal(torch.cat(seen).bincount(), evaluations)
    assert {len(rows) for rows in seen} == {1, 2, 3, 4, 5}


def test_the_state_is_double_whatever_the_start():
    """Shape and type are the start's; the velocity's type does not matter."""
    start = torch.rand(3, 1, 2, 2, generator=torch.Generator().manual_seed(0))

    def velocity(y, t, rows):
        assert (y.dtype, t.dtype, y.shape[1:]) == (torch.float64, torch.float64, (1, 2, 2))
        return (-y).float()

    end, evaluations = ode.solve(velocity, start, (0.0, 1.0), rtol=1e-6, atol=1e-6)
    assert end.dtype == torch.float32
    assert evaluations.shape == (3,)
    torch.testing.assert_close(end, start / math.e, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("velocity", "last"),
    [
        (lambda y, t, rows: y * math.nan, "0"),
        (lambda y, t, rows: y / 0, "0"),
        (lambda y, t, rows: torch.where((t > 0.5) & (rows == 1), math.nan, 1.0)[:, None] * y, "0.5"),
        (lambda y, t, rows: y * y, "1"),  # 1 / (1 - t)
    ],
)
def test_a_row_that_cannot_be_followed_is_told(velocity, last):
    start = torch.tensor([[0.1], [1.0], [0.2]])
    with pytest.raises(
        UserError, match=rf"cannot be followed beyond t = {last}: the network's output is NaN, infinite"
    ):
        ode.solve(velocity, start, (0.0, 2.0), rtol=1e-5, atol=1e-5)
