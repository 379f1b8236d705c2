"""Which pairs are worked on together: chunks of chains whose logits fit a budget, without the pairs that do not count."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Chunk:
    """P valid pairs of R chains that share U target rows. Pairs are ordered by step, then chain."""

    anchors: Tensor  # [R] chains, as indices into N
    steps: Tensor  # [P] the step of each pair
    chains: Tensor  # [P] its chain, as index into anchors
    target_rows: Tensor  # [U] rows of the target, each once
    index: Tensor  # [P] the pair's row among target_rows
    tokens: Tensor  # [P]
    valid: Tensor  # [K, R]

    def to(self, device: torch.device) -> "Chunk":
        return Chunk(**{name: x.to(device, non_blocking=True) for name, x in vars(self).items()})


def plan_chunks(target_rows: Tensor, tokens: Tensor, valid: Tensor, max_rows: int, spare: float) -> list[Chunk]:
    """Chunks of chains in order, each with at most max_rows rows of logits (but at least one chain).

    Worked out on the host, from tensors [K, N] that lie there, so that the device is not waited for between chunks.

    Args:
        max_rows: budget, in rows of logits: pairs and target rows together.
        spare: rows' worth of further memory that each pair takes.
    """
    anchors = valid.any(0).nonzero().squeeze(1)
    guess = max(1, int(max_rows / (len(valid) * (1 + spare) + 1)))
    plan = []
    start = 0
    while start < len(anchors):
        count = min(_round(guess), len(anchors) - start)
        chunk = _chunk(anchors[start : start + count], target_rows, tokens, valid)
        # Chains of a text share most target rows; where they share fewer, fewer chains fit.
        while count > 1 and (rows := _rows(chunk, spare)) > max_rows:
            count = _round(min(count - 1, int(count * max_rows / rows)))
            chunk = _chunk(anchors[start : start + count], target_rows, tokens, valid)
        plan.append(chunk)
        start += count
    return plan


def _chunk(anchors: Tensor, target_rows: Tensor, tokens: Tensor, valid: Tensor) -> Chunk:
    valid = valid[:, anchors]
    steps, chains = valid.nonzero(as_tuple=True)
    rows, index = target_rows[:, anchors][valid].unique(return_inverse=True)
    return Chunk(anchors, steps, chains, rows, index, tokens[:, anchors][valid], valid)


def _rows(chunk: Chunk, spare: float) -> float:
    return len(chunk.index) * (1 + spare) + len(chunk.target_rows)


def _round(count: int) -> int:
    """Products are fastest with a multiple of 64 rows."""
    return count - count % 64 if count >= 64 else max(1, count)
