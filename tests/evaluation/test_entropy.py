import numpy as np
import pytest
import torch

from bebop.errors import InputError
from bebop.evaluation.entropy import add_moments, decompose, line_of_moments, line_through
from bebop.evaluation.sums import DocumentSums, Resampled


def test_line_through_chains_is_least_squares():
    generator = torch.Generator().manual_seed(0)
    x = 3 * torch.rand(600, generator=generator, dtype=torch.float64)
    y = 0.8 - 0.15 * x + 0.1 * torch.randn(600, generator=generator, dtype=torch.float64)
    weights = (torch.rand(600, generator=generator) > 0.2).float()
    sums = DocumentSums(60)
    add_moments(sums, "line", x, y, weights, torch.arange(600) // 10)
    line = line_of_moments(Resampled(sums, 2000), "line")
    kept = weights.bool()
    slope, intercept = np.polyfit(x[kept], y[kept], 1)
    assert line.slope.value == pytest.approx(slope)
    assert line.intercept.value == pytest.approx(intercept)
    assert line.r_squared.value == pytest.approx(np.corrcoef(x[kept], y[kept])[0, 1] ** 2)
    assert line.slope.low < -0.15 < line.slope.high
    # The textbook error of a slope, chains being independent here.
    error = 0.1 / (x[kept].std().item() * kept.sum().item() ** 0.5)
    assert line.slope.high - line.slope.low == pytest.approx(2 * 1.96 * error, rel=0.2)
    assert line.at(2.0) == pytest.approx(intercept + 2 * slope)


def test_line_through_sets():
    entropy = torch.tensor([[0.5], [1.0], [2.0], [2.5]]).expand(-1, 101)
    acceptance = 2.0 - 0.3 * entropy
    line = line_through(entropy, acceptance)
    assert line.slope.value == pytest.approx(-0.3)
    assert line.r_squared.value == pytest.approx(1.0)
    with pytest.raises(InputError, match="at least 3"):
        line_through(entropy[:2], acceptance[:2])
    with pytest.raises(InputError, match="same entropy"):
        line_through(torch.ones(4, 101), acceptance)


def test_decomposition_recovers_both_parts():
    """Acceptance falls by 0.2 a nat, and from the third checkpoint on by 0.01 a checkpoint for another reason."""
    entropy = [0.3, 0.35, 0.5, 0.6, 0.9]
    mismatch = [0.0, 0.0, -0.01, -0.02, -0.03]
    acceptance = [0.8 - 0.2 * (h - 0.3) + m for h, m in zip(entropy, mismatch, strict=True)]
    found = decompose(entropy, acceptance, early=2)
    assert found.slope == pytest.approx(-0.2)
    assert found.mismatch_driven == pytest.approx(mismatch, abs=1e-12)
    assert found.entropy_driven == pytest.approx([-0.2 * (h - 0.3) for h in entropy])


@pytest.mark.parametrize(
    ("entropy", "early", "message"),
    [
        ([0.1, 0.2, 0.3], 1, "2 or more early"),
        ([0.1, 0.2, 0.3], 4, "no more than all"),
        ([0.1, 0.1, 0.3], 2, "same entropy"),
    ],
)
def test_what_cannot_be_decomposed_is_said(entropy, early, message):
    with pytest.raises(InputError, match=message):
        decompose(entropy, [0.5, 0.4, 0.3], early)
