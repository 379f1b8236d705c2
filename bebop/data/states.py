"""Backbone states of a batch: computed when needed, or once for all epochs and kept in memory."""

from collections.abc import Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from bebop.backbone import Backbone
from bebop.data.batches import Batch, make_batch, plan_micro_batches
from bebop.data.rollouts import Rollout

_TOKENS_PER_FORWARD = 8192


class StateCache:
    """States at the head's tap for every document, held in memory in the backbone's dtype.

    The backbone is frozen, so its states are the same in every epoch: one pass over the data instead of one an epoch.
    They are computed in batches that depend on the rollouts alone, so that a resumed run sees the same numbers.
    """

    def __init__(self, backbone: Backbone, rollouts: Sequence[Rollout], progress: str | None = None):
        self.states: list[Tensor] = [torch.empty(0)] * len(rollouts)
        lengths = [len(r) for r in rollouts]
        plan = plan_micro_batches(lengths, _TOKENS_PER_FORWARD, backbone.packs_documents)
        with tqdm(total=sum(lengths), unit="tok", desc=progress, disable=progress is None) as bar:
            for rows in plan:
                batch = make_batch(rows, rollouts).to(backbone.device)
                hidden = backbone.hidden_states(batch.tokens, batch.documents, batch.positions)
                for b, row in enumerate(rows):
                    start = 0
                    for i in row:
                        self.states[i] = hidden[b, start : start + lengths[i]].to("cpu", copy=True)
                        start += lengths[i]
                        bar.update(lengths[i])

    @staticmethod
    def size_in_bytes(backbone: Backbone, rollouts: Sequence[Rollout]) -> int:
        """Memory a cache of these rollouts takes."""
        return sum(len(r) for r in rollouts) * backbone.config.hidden_size * backbone.lm_head_weight.itemsize

    def hidden_states(self, batch: Batch) -> Tensor:
        """[B, T, d] for a batch of the same rollouts, on the batch's device; zeros where padded."""
        width = self.states[0].shape[1]
        hidden = torch.zeros(*batch.tokens.shape, width, dtype=self.states[0].dtype)
        documents = batch.documents.cpu()
        for b, row in enumerate(documents):
            for i in row[row >= 0].unique().tolist():
                hidden[b, row == i] = self.states[i]
        return hidden.to(batch.tokens.device)
