"""Monitor: one tail probability, in plain Python: no scipy on a device.

Source: the beta-binomial is the predictive distribution of a count after r were seen in N reference rows.
"""

from __future__ import annotations

import math


def beta_binomial_tail(x: int, n: int, a: float, b: float) -> float:
    """P(X ≥ x) of a binomial count of `n` trials whose chance is Beta(`a`, `b`); for an `x` above the mean.

    The terms from x on fall, so they are summed until they add nothing; at or below the mean the answer is 1, which
    is no evidence either.
    """
    if x <= n * a / (a + b):
        return 1.0
    if x > n:
        return 0.0
    log_term = (
        math.lgamma(n + 1) - math.lgamma(x + 1) - math.lgamma(n - x + 1)
        + _log_beta(a + x, b + n - x) - _log_beta(a, b)
    )  # fmt: skip
    term = math.exp(log_term)
    total, k = 0.0, x
    while term > 1e-17 * total and k <= n:
        total += term
        if k < n:
            term *= (n - k) * (a + k) / ((k + 1) * (b + n - k - 1))
        k += 1
    return min(total, 1.0)


def _log_beta(a: float, b: float) -> float:
    return math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)
