"""Documents into rows, rows into micro-batches: deterministic, with little padding, and documents kept apart."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bebop.data.rollouts import Rollout

# Rows of one document are sorted by length within this many documents, and those groups shuffled.
_BUCKET = 512
# Share of packed rows that may stay empty, measured on this many documents.
_EMPTY, _SAMPLE = 0.04, 512


@dataclass
class Batch:
    """Rows of documents, each tensor [B, T].

    Attributes:
        tokens: int64, 0 where padded.
        documents: int64, index of the document in the row's data set, -1 where padded.
        positions: int64, position within the document, 0 where padded.
        supervised: bool, True on response tokens.
    """

    tokens: Tensor
    documents: Tensor
    positions: Tensor
    supervised: Tensor

    def to(self, device: torch.device | str) -> "Batch":
        return Batch(*(x.to(device) for x in (self.tokens, self.documents, self.positions, self.supervised)))


def plan_micro_batches(
    lengths: Sequence[int], tokens: int, pack: bool, generator: torch.Generator | None = None
) -> list[list[list[int]]]:
    """Micro-batches of rows of document indices; every document once.

    Args:
        lengths: of the documents, in tokens.
        tokens: most tokens, padding included, of a micro-batch; one row at least.
        pack: several documents may share a row, one to four times as long as the longest document, see `_row_length`, but no
            longer than `tokens`; otherwise documents of similar length stand in rows of their own.
        generator: shuffles; the order is that of length without one.

    Returns:
        [micro-batch][row][document].
    """
    if generator is None:
        order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    else:
        order = torch.randperm(len(lengths), generator=generator).tolist()
        buckets = [order[i : i + _BUCKET] for i in range(0, len(order), _BUCKET)]
        order = [i for bucket in buckets for i in sorted(bucket, key=lambda i: -lengths[i])]
    rows = _first_fit(order, lengths, _row_length(lengths, tokens)) if pack else [[i] for i in order]
    if generator is not None and pack:
        rows = [rows[i] for i in torch.randperm(len(rows), generator=generator).tolist()]

    batches: list[list[list[int]]] = []
    width = 0
    for row in rows:
        row_width = sum(lengths[i] for i in row)
        width = max(width, row_width)
        if not batches or (len(batches[-1]) + 1) * width > tokens:
            batches.append([])
            width = row_width
        batches[-1].append(row)
    if generator is not None:
        batches = [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]
    return batches


def _row_length(lengths: Sequence[int], tokens: int) -> int:
    """The shortest length that fills micro-batches and leaves little of the rows empty.

    Attention takes time in proportion to it. But where most documents are nearly as long as a row, each has a row to
    itself, and the rest of that is padding.
    """
    drawn = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(0))[:_SAMPLE].tolist()
    some = sorted((min(lengths[i], tokens) for i in drawn), reverse=True)
    longest = min(max(lengths), tokens)
    empty: dict[int, float] = {}
    for quarters in range(4, 17):
        rows_of_batch = tokens // (longest * quarters // 4)
        length = tokens // max(rows_of_batch, 1)
        if rows_of_batch == 0 or length > 4 * longest:
            break
        rows = _first_fit(range(len(some)), some, length)
        empty[length] = 1 - sum(some) / (len(rows) * length)
        if empty[length] <= _EMPTY:
            return length
    return min(empty, key=lambda length: empty[length])


def _first_fit(order: Sequence[int], lengths: Sequence[int], row_length: int) -> list[list[int]]:
    """Rows filled one document after another, each into the first of the newest rows that has room (or a row of its own)."""
    rows: list[list[int]] = []
    free: list[int] = []
    for i in order:
        newest = range(max(0, len(rows) - _BUCKET), len(rows))
        row = next((row for row in newest if lengths[i] <= free[row]), len(rows))
        if row == len(rows):
            rows.append([])
            free.append(row_length)
        rows[row].append(i)
        free[row] -= lengths[i]
    return rows


def make_batch(rows: Sequence[Sequence[int]], rollouts: Sequence[Rollout]) -> Batch:
    """The tensors of one micro-batch of `plan_micro_batches`."""
    width = max(sum(len(rollouts[i]) for i in row) for row in rows)
    tokens, positions = (torch.zeros(len(rows), width, dtype=torch.long) for _ in range(2))
    documents = torch.full((len(rows), width), -1)
    supervised = torch.zeros(len(rows), width, dtype=torch.bool)
    for b, row in enumerate(rows):
        start = 0
        for i in row:
            rollout, end = rollouts[i], start + len(rollouts[i])
            tokens[b, start:end] = torch.tensor(rollout.prompt_ids + rollout.response_ids)
            documents[b, start:end] = i
            positions[b, start:end] = torch.arange(end - start)
            supervised[b, start + len(rollout.prompt_ids) : end] = True
            start = end
    return Batch(tokens, documents, positions, supervised)
