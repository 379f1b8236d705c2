"""Acceptance against entropy: lines through chains and through checkpoints, and what a fall in acceptance comes from."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from bebop.errors import InputError
from bebop.evaluation.sums import DocumentSums, Estimate, Resampled, estimate


class Line(NamedTuple):
    """Least squares of acceptance on entropy in nats: acceptance = intercept + slope * entropy."""

    slope: Estimate
    intercept: Estimate
    r_squared: Estimate

    def at(self, entropy: float) -> float:
        return self.intercept.value + self.slope.value * entropy


def add_moments(sums: DocumentSums, name: str, x: Tensor, y: Tensor, weights: Tensor, documents: Tensor) -> None:
    """What a line through chains (x, y) [N] needs."""
    x, y = x.double(), y.double()
    for moment, values in (("x", x), ("y", y), ("xx", x * x), ("xy", x * y), ("yy", y * y)):
        sums.add(f"{name}/{moment}", values, weights, documents)


def line_of_moments(averages: Resampled, name: str) -> Line:
    """The line through all chains that `add_moments` was given."""
    return _line(*(averages[f"{name}/{moment}"] for moment in ("x", "y", "xx", "xy", "yy")))


def line_through(entropy: Tensor, acceptance: Tensor) -> Line:
    """The line through S checkpoints or sets of texts, each a vector of `Resampled`: [S, 1 + resamples] both.

    Raises:
        InputError: fewer than three points, which any line fits, or all of one entropy.
    """
    if len(entropy) < 3:
        raise InputError(f"{len(entropy)} sets of rollouts: a line of acceptance against entropy needs at least 3")
    if float(entropy[:, 0].max() - entropy[:, 0].min()) < 1e-3:
        raise InputError("the rollouts all have the same entropy; a line of acceptance against entropy needs it to differ")
    x, y = entropy.double(), acceptance.double()
    return _line(*(m.mean(0) for m in (x, y, x * x, x * y, y * y)))


def _line(x: Tensor, y: Tensor, xx: Tensor, xy: Tensor, yy: Tensor) -> Line:
    variance, covariance = xx - x * x, xy - x * y
    slope = covariance / variance
    r_squared = covariance.square() / (variance * (yy - y * y))
    return Line(estimate(slope), estimate(y - slope * x), estimate(r_squared))


@dataclass
class Decomposition:
    """Change of acceptance since the first of S checkpoints, in two parts (Eq. 16 of arXiv 2606.12370).

    Attributes:
        slope: b, acceptance per nat.
        entropy_driven: [S], b (H_t - H_0).
        mismatch_driven: [S], what is left: the policy has moved away from what the head was trained on.
    """

    slope: float
    entropy_driven: list[float]
    mismatch_driven: list[float]


def decompose(entropy: Sequence[float], acceptance: Sequence[float], early: int) -> Decomposition:
    """Split the change of acceptance over checkpoints of a policy into an entropy-driven and a mismatch-driven part.

    Args:
        entropy: H_t of each checkpoint's own rollouts, nats.
        acceptance: of the head on them.
        early: how many of the first checkpoints b is fitted on, where the policy has hardly moved: at least 2.

    Raises:
        InputError: too few checkpoints, or the entropy of the early ones does not differ.
    """
    if not 2 <= early <= len(entropy) or len(entropy) != len(acceptance):
        raise InputError(
            f"{len(entropy)} checkpoints, {early} of them early; expected 2 or more early ones, and no more than all"
        )
    h, a = (torch.tensor(x, dtype=torch.float64) - x[0] for x in (entropy, acceptance))
    spread = h[:early].square().sum()
    if spread < 1e-9:
        raise InputError(f"the first {early} checkpoints have the same entropy; there is no slope to fit, take more of them")
    slope = (h[:early] * a[:early]).sum() / spread
    driven = slope * h
    return Decomposition(slope.item(), driven.tolist(), (a - driven).tolist())
