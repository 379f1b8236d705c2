"""Averages over chains with their uncertainty: sums of every document, and documents drawn anew.

Chains of a document are not independent, documents are. So whatever is averaged is kept as a sum and a weight of each
document, and its confidence interval comes from resampling documents (the bootstrap of a ratio of sums).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bebop.writing import complete


class Estimate(NamedTuple):
    """A number and the 95 percent confidence interval of it, over documents."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


class DocumentSums:
    """Named weighted averages over the chains of D documents, as sums: each tensor [D, 2], float64, of (sum, weight)."""

    def __init__(self, documents: int, columns: dict[str, Tensor] | None = None):
        self.documents = documents
        self.columns = columns or {}

    def add(self, name: str, values: Tensor, weights: Tensor, documents: Tensor) -> None:
        """Add chains: values and weights [N] to the average `name` of the documents [N], -1 for chains of none.

        Values of weight 0 may be anything, NaN included.
        """
        column = self.columns.setdefault(name, torch.zeros(self.documents, 2, dtype=torch.float64))
        chains = ((weights != 0) & (documents >= 0)).nonzero().squeeze(1)
        weight = weights[chains].double()
        pair = torch.stack([values[chains].double() * weight, weight], dim=1)
        column.index_add_(0, documents[chains].cpu(), pair.cpu())

    def of(self, documents: Tensor) -> "DocumentSums":
        """Those of some documents: indices, or a mask [D]."""
        columns = {name: column[documents] for name, column in self.columns.items()}
        return DocumentSums(len(next(iter(columns.values()))), columns)

    def save(self, path: Path) -> None:
        """Write a safetensors file; it appears complete."""
        with complete(path) as partial:
            save_file(self.columns, partial)

    @classmethod
    def load(cls, path: Path) -> "DocumentSums":
        columns = load_file(path)
        return cls(len(next(iter(columns.values()))), columns)


def joined(parts: Sequence[DocumentSums]) -> DocumentSums:
    """The documents of several, one after another; a document without chains for an average counts nothing there."""
    names = {name for part in parts for name in part.columns}
    columns = {
        name: torch.cat([p.columns.get(name, torch.zeros(p.documents, 2, dtype=torch.float64)) for p in parts])
        for name in sorted(names)
    }
    return DocumentSums(sum(part.documents for part in parts), columns)


class Resampled:
    """Averages of `DocumentSums` over all documents, and over resamples of them.

    Every average is a vector [1 + resamples], the first entry that of the documents themselves; what is computed from
    averages is computed on these vectors, and `estimate` turns one into a number with its interval. The same documents,
    resamples and seed give the same draws, so differences of two heads on one set of documents are paired.
    """

    def __init__(self, sums: DocumentSums, resamples: int = 1000, seed: int = 0):
        self.sums = sums
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randint(sums.documents, (resamples, sums.documents), generator=generator)
        times = torch.zeros(resamples, sums.documents, dtype=torch.float64)
        times.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.float64))
        self.times = torch.cat([torch.ones(1, sums.documents, dtype=torch.float64), times])

    def __getitem__(self, name: str) -> Tensor:
        """The average `name`, [1 + resamples]; NaN where a resample has no chain for it."""
        total = self.times @ self.sums.columns[name]
        return total[:, 0] / total[:, 1]

    def weight(self, name: str) -> float:
        """Sum of weights behind the average `name`; 0 if nothing was added to it."""
        return self.sums.columns[name][:, 1].sum().item() if name in self.sums.columns else 0.0


def estimate(samples: Tensor) -> Estimate:
    """A vector of `Resampled` as its first entry and the 2.5 and 97.5 percent points of the others."""
    low, high = torch.nanquantile(samples[1:], torch.tensor([0.025, 0.975], dtype=samples.dtype)).tolist()
    return Estimate(samples[0].item(), low, high)
