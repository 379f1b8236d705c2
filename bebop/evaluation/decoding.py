"""A reference speculative decoder: what a head's drafts are worth, counted, where no engine is at hand.

It counts rounds and accepted drafts as an engine does, with real KV caches for backbone and head, and its output is
distributed as the target's. It is no faster than decoding without drafts: the target verifies one draft at a time, and so
never runs over a draft that is refused. That leaves nothing to roll back, neither keys and values nor the states of linear
attention, and makes its every pass the pass of plain decoding.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import DynamicCache

from bebop.backbone import Backbone
from bebop.errors import InputError
from bebop.heads.head import MTPHead
from bebop.sampling import draw

# How the target judges drafts. rejection_sampling: sampled drafts, accepted with probability min(1, p(y)/q(y)).
# target_only: greedy drafts y = argmax q, accepted with probability p(y) (Eq. 1 of arXiv 2606.12370). equality: sampled
# drafts, accepted if the token that the target samples for itself is the same.
VERIFICATION_RULES = ("rejection_sampling", "target_only", "equality")


@dataclass
class Decoded:
    """Texts and what was counted while they were written.

    Attributes:
        texts: new tokens of each prompt.
        rounds: of draft j = 1..K, the rounds whose text has room for it, whether or not a draft before it was refused.
        accepted: in how many of them draft j was accepted.
    """

    texts: list[list[int]]
    rounds: list[int]
    accepted: list[int]

    @property
    def acceptance(self) -> list[float]:
        """Share of rounds in which draft j was accepted, as engines report it."""
        return [accepted / rounds for accepted, rounds in zip(self.accepted, self.rounds, strict=True)]

    @property
    def accept_length(self) -> float:
        """Tokens a round emits, the target's own included."""
        return 1.0 + sum(self.acceptance)


@torch.no_grad()
def speculative_decode(
    head: MTPHead,
    backbone: Backbone,
    prompts: Sequence[Sequence[int]],
    *,
    steps: int,
    max_tokens: int,
    temperature: float,
    rule: str = "rejection_sampling",
    stop: Sequence[int] = (),
    seed: int = 0,
    progress: str | None = None,
) -> Decoded:
    """Write a text for every prompt, all at once, with drafts of the head.

    Args:
        head, backbone: the pair; each computes in its own dtype.
        prompts: token ids; of any lengths.
        steps: K, drafts a round.
        max_tokens: new tokens of a text.
        temperature: of target and drafts; 0 is greedy.
        rule: one of `VERIFICATION_RULES`.
        stop: tokens that end a text.
        seed: of all sampling.
        progress: what to call this on a progress bar; no bar if None.

    Raises:
        InputError: an unknown rule, no steps, a negative temperature, an empty prompt, texts longer than the model takes, or
            none long enough for a round.
    """
    if steps < 1:
        raise InputError(f"steps is {steps}, expected 1 or more")
    if not temperature >= 0:
        raise InputError(f"temperature is {temperature}, expected a number above 0, or 0 for greedy texts")
    if rule not in VERIFICATION_RULES:
        raise InputError(f"unknown verification rule {rule!r}; expected one of {', '.join(VERIFICATION_RULES)}")
    if not prompts or not all(len(prompt) for prompt in prompts):
        raise InputError("there is no prompt, or an empty one; every prompt needs at least one token")
    longest = max(len(prompt) for prompt in prompts) + max_tokens
    if longest > backbone.max_length:
        raise InputError(f"prompt and text may take {longest} tokens, the model takes {backbone.max_length}")
    if max_tokens < steps + 2:
        raise InputError(f"max_tokens = {max_tokens} leaves no room for a round of {steps} drafts; raise it to {steps + 2}")
    decoder = _Decoder(head, backbone, prompts, steps, temperature, rule, seed)
    texts = decoder.write(max_tokens, stop, progress)
    lengths = torch.tensor([len(text) for text in texts], device=backbone.device)
    rows, started, accepted = torch.cat(decoder.rounds, dim=1)
    room = lengths[rows] - started
    rounds = [int((room >= j).sum()) for j in range(1, steps + 1)]
    if rounds[-1] == 0:
        raise InputError(f"no text was long enough for a round of {steps} drafts; decode more prompts, or fewer steps")
    return Decoded(texts, rounds, [int((accepted >= j).sum()) for j in range(1, steps + 1)])


class _Decoder:
    """B texts that grow by one token a pass, each at its own place in its own round.

    A row feeds the token at position i and gets p for position i+1, which judges the row's pending draft if it has one. The
    head's cache takes the true pair (h_i, x_{i+1}) in the same pass, so it holds what an engine's does after verification.
    """

    def __init__(
        self,
        head: MTPHead,
        backbone: Backbone,
        prompts: Sequence[Sequence[int]],
        steps: int,
        temperature: float,
        rule: str,
        seed: int,
    ):
        self.head, self.backbone = head, backbone
        self.steps, self.temperature, self.rule = steps, temperature, rule
        device, size = backbone.device, len(prompts)
        self.generator = torch.Generator(device).manual_seed(seed)
        longest = max(len(prompt) for prompt in prompts)
        # What the next pass feeds, [B, T]: the prompts, padded on the left, and then a token a row.
        self.tokens = torch.tensor([[0] * (longest - len(p)) + list(p) for p in prompts], device=device)
        padding = torch.tensor([[longest - len(p)] for p in prompts], device=device)
        self.real = torch.arange(longest, device=device) >= padding  # of all tokens so far
        self.positions = (self.real.cumsum(1) - 1).clamp(min=0)
        self.backbone_cache = DynamicCache(config=backbone.config)
        self.head_cache = DynamicCache(config=head.config)
        self.drafts = torch.zeros(size, steps, dtype=torch.long, device=device)
        self.draft_probabilities = torch.zeros(size, steps, len(backbone.lm_head_weight), device=device)
        # Which draft the next pass judges: 0..K-1, K for the token behind the last one, -1 before the first round.
        self.pending = torch.full((size,), -1, device=device)
        self.started = torch.zeros_like(self.pending)  # tokens that were written when the round began
        self.done = torch.zeros(size, dtype=torch.bool, device=device)
        # Of rounds that ended: the row, `started`, and the number of accepted drafts; [3, n] of every pass.
        self.rounds: list[Tensor] = []

    def write(self, max_tokens: int, stop: Sequence[int], progress: str | None) -> list[list[int]]:
        ends = torch.tensor(list(stop), dtype=torch.long, device=self.tokens.device)
        columns, lengths = [], torch.full_like(self.pending, max_tokens)
        for written in tqdm(range(1, max_tokens + 1), desc=progress, unit="pass", disable=progress is None):
            states = self.backbone.decode(self.tokens, self.positions, self.real, self.backbone_cache)
            emitted, accepted = self._judge(self._probabilities(self.backbone.target_hidden(states[:, -1])))
            columns.append(emitted)
            ending = ~self.done & torch.isin(emitted, ends)
            lengths[ending] = written
            self._end_rounds(~accepted | ending | (written == max_tokens), accepted)
            self.done |= ending
            if written == max_tokens or bool(self.done.all()):
                break
            first = self._feed_head(states, emitted)
            self.pending += accepted
            self._draft((~accepted & ~self.done).nonzero().squeeze(1), first, written)
            self.tokens, self.positions = emitted.unsqueeze(1), self.positions[:, -1:] + 1
            self.real = torch.cat([self.real, torch.ones_like(self.tokens, dtype=torch.bool)], dim=1)
        rows = torch.stack(columns, dim=1).tolist()
        return [row[:length] for row, length in zip(rows, lengths.tolist(), strict=True)]

    def _probabilities(self, hidden: Tensor) -> Tensor:
        """States as the lm_head takes them, [B, d] -> distributions at the temperature, [B, V] in fp32."""
        weight = self.backbone.lm_head_weight
        logits = (hidden.to(weight.dtype) @ weight.T).float()
        if self.temperature == 0:
            return torch.zeros_like(logits).scatter_(1, logits.argmax(1, keepdim=True), 1.0)
        return torch.softmax(logits / self.temperature, dim=1)

    def _judge(self, target: Tensor) -> tuple[Tensor, Tensor]:
        """The next token of every row, [B], and whether it is an accepted draft, [B], from target distributions [B, V]."""
        rows = torch.arange(len(target), device=target.device)
        has_draft = (self.pending >= 0) & (self.pending < self.steps)
        step = torch.where(has_draft, self.pending, 0)
        draft, proposed = self.drafts[rows, step], self.draft_probabilities[rows, step]
        if self.rule == "equality":
            own = draw(target, self.generator)
            return own, has_draft & (own == draft)
        uniform = torch.rand(len(target), generator=self.generator, device=target.device)
        accepted = has_draft & (uniform * proposed[rows, draft] < target[rows, draft])
        # A refused draft is replaced from what the draft distribution leaves of the target's (Leviathan et al., 2023).
        remainder = torch.where(has_draft.unsqueeze(1), (target - proposed).clamp(min=0), target)
        return torch.where(accepted, draft, draw(remainder, self.generator)), accepted

    def _end_rounds(self, ends: Tensor, accepted: Tensor) -> None:
        rows = (ends & ~self.done & (self.pending >= 0)).nonzero().squeeze(1)
        # The drafts before the pending one were accepted.
        self.rounds.append(torch.stack([rows, self.started[rows], (self.pending + accepted)[rows]]))

    def _feed_head(self, states: Tensor, emitted: Tensor) -> Tensor:
        """True pairs of the pass into the head's cache: [B, T, d] -> the head's state at the last of them, [B, d]."""
        following = torch.cat([self.tokens[:, 1:], emitted.unsqueeze(1)], dim=1)
        length, total = self.tokens.shape[1], self.real.shape[1]
        device = self.tokens.device
        queries = torch.arange(total - length, total, device=device).unsqueeze(1)
        keys = torch.arange(total, device=device)
        # Padding sees itself, as seeing nothing would give NaN.
        mask = ((keys <= queries) & self.real.unsqueeze(1)) | (keys == queries)
        state = self._step(states, following, self.positions, mask.unsqueeze(1), self.head_cache)
        return state[:, -1]

    def _draft(self, rows: Tensor, first: Tensor, written: int) -> None:
        """K drafts for the rows that start a round; `first` is the head's state of step 1 for all rows, [B, d]."""
        if not len(rows):
            return
        layer: Any = self.head_cache.layers[0]
        cache = DynamicCache(config=self.head.config)
        cache.update(layer.keys[rows], layer.values[rows], 0)
        hidden, real = first[rows], self.real[rows]
        for k in range(self.steps):
            proposed = self._probabilities(hidden)
            if self.rule == "target_only":
                proposed = torch.zeros_like(proposed).scatter_(1, proposed.argmax(1, keepdim=True), 1.0)
            token = draw(proposed, self.generator)
            self.drafts[rows, k], self.draft_probabilities[rows, k] = token, proposed
            if k + 1 < self.steps:
                real = torch.cat([real, torch.ones_like(real[:, :1])], dim=1)
                positions = self.positions[rows, -1:] + k + 1
                mask = real.unsqueeze(1).unsqueeze(1)
                hidden = self._step(hidden.unsqueeze(1), token.unsqueeze(1), positions, mask, cache)[:, 0]
        self.pending[rows] = 0
        self.started[rows] = written

    def _step(self, states: Tensor, tokens: Tensor, positions: Tensor, mask: Tensor, cache: DynamicCache) -> Tensor:
        dtype = self.head.part(self.head.family.projection).weight.dtype
        return self.head.step(states.to(dtype), self.backbone.embed(tokens).to(dtype), positions, mask, cache)
