import pytest
import torch

from bebop.evaluation.sums import DocumentSums, Resampled, estimate, joined


def make_sums(values: torch.Tensor, weights: torch.Tensor, documents: torch.Tensor) -> DocumentSums:
    sums = DocumentSums(int(documents.max()) + 1)
    sums.add("x", values, weights, documents)
    return sums


def test_average_is_the_weighted_mean_and_ignores_what_has_no_weight():
    values = torch.tensor([1.0, 2.0, torch.nan, 4.0, 100.0])
    weights = torch.tensor([1.0, 3.0, 0.0, 2.0, 5.0])
    documents = torch.tensor([0, 0, 1, 1, -1])
    averages = Resampled(make_sums(values, weights, documents), resamples=100)
    assert averages["x"][0].item() == pytest.approx((1 + 6 + 8) / 6)
    assert averages.weight("x") == 6
    assert averages.weight("y") == 0


def test_interval_is_that_of_independent_documents():
    """Documents of ten equal chains: the error of the mean is that of 400 numbers, not of 4,000."""
    generator = torch.Generator().manual_seed(0)
    of_documents = torch.randn(400, generator=generator)
    values, documents = of_documents.repeat_interleave(10), torch.arange(400).repeat_interleave(10)
    found = estimate(Resampled(make_sums(values, torch.ones(4000), documents), resamples=4000)["x"])
    expected = 2 * 1.96 * of_documents.std().item() / 20
    assert found.high - found.low == pytest.approx(expected, rel=0.06)
    assert found.low < found.value < found.high


def test_differences_are_paired():
    """Two measures that differ by the same amount in every document: the difference is certain, they are not."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, generator=generator)
    one, other = (make_sums(v, torch.ones(50), torch.arange(50)) for v in (x, x + 0.25))
    difference = Resampled(other, 500)["x"] - Resampled(one, 500)["x"]
    assert difference.min().item() == pytest.approx(0.25)
    assert difference.max().item() == pytest.approx(0.25)


def test_parts_join_and_survive_a_file(tmp_path):
    one = make_sums(torch.tensor([1.0, 3.0]), torch.ones(2), torch.tensor([0, 1]))
    other = DocumentSums(1)
    other.add("y", torch.tensor([7.0]), torch.ones(1), torch.tensor([0]))
    both = joined([one, other])
    both.save(tmp_path / "sums.safetensors")
    loaded = DocumentSums.load(tmp_path / "sums.safetensors")
    assert loaded.documents == 3
    averages = Resampled(loaded, 100)
    assert averages["x"][0].item() == 2.0
    assert averages["y"][0].item() == 7.0
    assert Resampled(loaded.of(torch.tensor([False, True, True])), 100)["x"][0].item() == 3.0
    assert [p.name for p in tmp_path.iterdir()] == ["sums.safetensors"]
