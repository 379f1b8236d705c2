"""Sums over the vocabulary, be it whole in this process or split over a group by rows of the lm_head."""

import torch
import torch.distributed as dist
from torch import Tensor


class Vocabulary:
    """This process's columns of the logits, start to start + size of total, and reductions over all of them.

    Args:
        size: rows of this process's part of the lm_head.
        group: the processes that share the vocabulary, parts in order of rank; None if it is whole here.
        device: where the collectives of `group` run.
    """

    def __init__(self, size: int, group: dist.ProcessGroup | None, device: torch.device):
        self.group, self.size = group, size
        self.start, self.largest, self.total = 0, size, size
        if group is not None:
            own = torch.tensor([size], device=device)
            parts = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
            dist.all_gather(parts, own, group=group)
            sizes = [int(part) for part in parts]
            self.start, self.largest, self.total = sum(sizes[: dist.get_rank(group)]), max(sizes), sum(sizes)

    def sum(self, x: Tensor) -> Tensor:
        """x of all processes added up, in place."""
        if self.group is not None:
            dist.all_reduce(x, group=self.group)
        return x

    def log_sum_exp(self, local: Tensor) -> Tensor:
        """log-sum-exp over the whole vocabulary from that over each part."""
        if self.group is None:
            return local
        highest = local.clone()
        dist.all_reduce(highest, dist.ReduceOp.MAX, group=self.group)
        return highest + self.sum((local - highest).exp()).log()

    def columns(self, tokens: Tensor) -> Tensor:
        """Token ids -> columns here, -1 where the token lies in another process's part."""
        if self.group is None:
            return tokens
        here = tokens - self.start
        return torch.where((here >= 0) & (here < self.size), here, -1)

    def pick(self, rows: Tensor, index: Tensor, columns: Tensor) -> Tensor:
        """rows[index[r], columns[r]] from the process that has the column: [U, V], [R], [R] -> [R]."""
        found = rows[index, columns.clamp(min=0)]
        return found if self.group is None else self.sum(torch.where(columns >= 0, found, 0.0))

    def argmax(self, rows: Tensor) -> Tensor:
        """Token ids [R] of the highest logits of rows [R, V]; the lowest id where several are equal."""
        value, column = rows.max(dim=-1)
        if self.group is None:
            return column
        highest = value.clone()
        dist.all_reduce(highest, dist.ReduceOp.MAX, group=self.group)
        token = torch.where(value == highest, column + self.start, self.total)
        dist.all_reduce(token, dist.ReduceOp.MIN, group=self.group)
        return token
