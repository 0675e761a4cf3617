"""An adaptive Runge-Kutta method of order 4(5) in torch: every row of a batch has its own time and step size.

The pair of Dormand and Prince ("A family of embedded Runge-Kutta formulae", 1980), with the first step and the step
control of Hairer, Norsett and Wanner, "Solving Ordinary Differential Equations I", section II.4, and the constants of
SciPy's RK45: a row takes the steps that SciPy would take for it alone, whatever the other rows do.

The state stays on its device.  Times and step sizes are on the CPU, where an error norm a row arrives after each step.
"""

import math

import torch

from basics.console import UserError

SAFETY, LEAST_FACTOR, LARGEST_FACTOR = 0.9, 0.2, 10.0  # of step sizes
ORDER = 4  # of the error estimate
NODES = torch.tensor([1 / 5, 3 / 10, 4 / 5, 8 / 9, 1, 1], dtype=torch.float64)
STAGES = len(NODES)  # of a step, each an evaluation; the last is the next step's first slope
TABLEAU = torch.tensor(  # the weights of the slopes so far in each stage's state, and in the estimated error
    [
        [1 / 5, 0, 0, 0, 0, 0, 0],
        [3 / 40, 9 / 40, 0, 0, 0, 0, 0],
        [44 / 45, -56 / 15, 32 / 9, 0, 0, 0, 0],
        [19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729, 0, 0, 0],
        [9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656, 0, 0],
        [35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84, 0],
        [-71 / 57600, 0, 71 / 16695, -71 / 1920, 17253 / 339200, -22 / 525, 1 / 40],
    ],
    dtype=torch.float64,
)


@torch.no_grad()
def solve(velocity, start, span, *, rtol, atol):
    """Solves dy/dt = velocity(y, t) for each row of a batch by itself; rows that have arrived are left out.

    Args:
        velocity: called as velocity(y, t, rows): y (n, ...) and t (n,) float64 on the start's device, rows (n,) int64
            the numbers of these rows in `start`; gives (n, ...).
        start: (B, ...), y at the first time.
        span: the first and the last time, in either order.
        rtol, atol: error tolerances; the root mean square of a row's errors, each over atol + rtol |y|, stays below 1.

    Returns:
        y at the last time, of the start's shape and type, and how often the velocity was evaluated for each row (B,)
        int64, both on the start's device.

    Raises:
        UserError: the velocity of a row is not finite, or changes too fast to be followed.
    """
    y = start.flatten(1).double()  # (n, D), n the rows that have not arrived
    rows = torch.arange(len(y), device=y.device)
    end, evaluations, steps = torch.empty_like(y), torch.zeros_like(rows), 0
    flow = _Flow(velocity, start.shape[1:], rtol, atol, TABLEAU.to(y.device))
    slope = flow.slope(y, _times(span[0], y), rows)
    clocks = _Clocks(span, flow.first_step(y, slope, rows, span).cpu())
    while len(rows):
        h = clocks.steps()  # (n,)
        times = clocks.now + NODES[:, None] * h  # (6, n)
        sent = torch.cat([times, h[None]]).to(y.device)
        y_new, slope_new, errors = flow.step(y, slope, rows, sent[:-1], sent[-1][:, None])
        taken = (errors < 1)[:, None]
        y, slope, steps = torch.where(taken, y_new, y), torch.where(taken, slope_new, slope), steps + 1
        arrived = clocks.move(errors.cpu())
        if arrived.any():
            gone, left = (which.nonzero().flatten().to(y.device) for which in (arrived, ~arrived))
            end[rows[gone]], evaluations[rows[gone]] = y[gone], 2 + STAGES * steps  # 2 for the first step's size
            y, slope, rows = y[left], slope[left], rows[left]
            clocks.keep(~arrived)
    return end.view(start.shape).to(start.dtype), evaluations


def _times(t, y):
    return torch.full((len(y),), t, dtype=torch.float64, device=y.device)


class _Flow:
    """The equation with its tolerances; states are (n, D) float64.

    Args:
        velocity, rtol, atol: as in `solve`.
        shape: of a row.
        tableau: `TABLEAU` on the states' device.
    """

    def __init__(self, velocity, shape, rtol, atol, tableau):
        self.velocity, self.shape, self.rtol, self.atol, self.tableau = velocity, shape, rtol, atol, tableau

    def slope(self, y, t, rows):
        return self.velocity(y.unflatten(1, self.shape), t, rows).flatten(1).double()

    def norm(self, x, magnitude):
        """The root mean square of x over the tolerance at a magnitude |y|: (n,)."""
        return torch.linalg.vector_norm(x / (self.atol + self.rtol * magnitude), dim=1) / math.sqrt(x.shape[1])

    def first_step(self, y, slope, rows, span):
        """The size of the first step (n,), NaN where the slope is; by one more evaluation, an Euler step away."""
        first, length = span[0], abs(span[1] - span[0])
        sign = math.copysign(1, span[1] - first)
        d0, d1 = self.norm(y, y.abs()), self.norm(slope, y.abs())
        euler = torch.where((d0 < 1e-5) | (d1 < 1e-5), 1e-6, 0.01 * d0 / d1).clamp(max=length)
        there = self.slope(y + sign * euler[:, None] * slope, first + sign * euler, rows)
        d2 = self.norm(there - slope, y.abs()) / euler
        size = (0.01 / torch.fmax(d1, d2)) ** (1 / (ORDER + 1))
        size = torch.where((d1 <= 1e-15) & (d2 <= 1e-15), (1e-3 * euler).clamp(min=1e-6), size)
        return torch.minimum(100 * euler, size).clamp(max=length)

    def step(self, y, slope, rows, times, h):
        """States and slopes after steps h (n, 1) with stages at `times` (6, n), and the norms of the errors (n,)."""
        slopes = y.new_empty(STAGES + 1, *y.shape)
        slopes[0] = slope
        for i, t in enumerate(times):
            y_new = y + h * self._sum(i, slopes[: i + 1])
            slopes[i + 1] = self.slope(y_new, t, rows)
        magnitude = torch.maximum(y.abs(), y_new.abs())
        return y_new, slopes[-1], self.norm(h * self._sum(STAGES, slopes), magnitude)

    def _sum(self, i, slopes):
        """The slopes (m, n, D) weighted by row i of the tableau: (n, D)."""
        return (self.tableau[i, : len(slopes)] @ slopes.flatten(1)).view_as(slopes[0])


class _Clocks:
    """The times and step sizes of all rows, (n,) float64 on the CPU.

    Args:
        span: the first and the last time.
        sizes: (n,), of the first steps.

    Raises:
        UserError: a size is NaN.
    """

    def __init__(self, span, sizes):
        first, self.last = span
        self.sign = math.copysign(1, self.last - first)
        self.now = self.next = torch.full_like(sizes, first)  # the next times are those that are tried
        self.sizes = sizes
        self.failed = torch.zeros_like(sizes, dtype=torch.bool)  # a row's last step, which it tries again
        self._stop_where(sizes.isnan())

    def steps(self):
        """What to add to each row's time: (n,).

        Raises:
            UserError: a step failed so often that the next would be smaller than ten spacings of float64 numbers.
        """
        spacing = torch.nextafter(self.now, torch.full_like(self.now, self.sign * math.inf)) - self.now
        least = 10 * spacing.abs()
        self._stop_where(self.failed & (self.sizes < least))
        self.next = self.now + self.sign * torch.maximum(self.sizes, least)
        beyond = self.sign * (self.next - self.last) > 0
        self.next[beyond] = self.last
        h = self.next - self.now
        self.sizes = h.abs()
        return h

    def move(self, errors):
        """Takes the steps whose error norm (n,) is below 1, and sets all sizes; returns which rows arrived (n,)."""
        factors, taken = SAFETY * errors ** (-1 / (ORDER + 1)), errors < 1
        growth = torch.where(self.failed, factors.clamp(max=1), factors.clamp(max=LARGEST_FACTOR))
        self.sizes = self.sizes * torch.where(taken, growth, factors.nan_to_num(nan=0).clamp(min=LEAST_FACTOR))
        self.now, self.failed = torch.where(taken, self.next, self.now), ~taken
        return self.now == self.last

    def keep(self, which):
        self.now, self.sizes, self.failed = self.now[which], self.sizes[which], self.failed[which]

    def _stop_where(self, lost):
        if lost.any():
            raise UserError(
                f"the probability flow cannot be followed beyond t = {self.now[lost][0].item():.3g}: the network's "
                "output is NaN, infinite or too steep; check the checkpoint and its config"
            )
