"""The work of the fused op: chunk by chunk from hidden states to statistics, and from coefficients back to hidden states."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from bebop.kernels.chunks import Chunk, plan_chunks
from bebop.kernels.inputs import ChainInputs
from bebop.kernels.lm_head import LmHead
from bebop.kernels.rows import row_passes
from bebop.kernels.stats import DIFFERENTIABLE, STATISTICS, ChainStats
from bebop.kernels.vocabulary import Vocabulary

Objective = Callable[[ChainStats], Tensor]


@dataclass
class _Rows:
    """The logits of a chunk and what is known of them: P draft rows, U target rows."""

    chunk: Chunk
    z: Tensor  # [P, V], gone after `ChunkedOp._hidden_gradient` where its gradient takes its place
    t: Tensor  # [U, V]
    spare: Tensor | None  # [P, V] for that gradient where it does not
    scale: Tensor  # [P] inverse temperatures
    lse_z: Tensor  # [P] float64
    lse_t: Tensor  # [P] float64
    columns: Tensor  # [P] the text's tokens as columns of z
    values: dict[str, Tensor]  # [P] each: statistics, and `below`


class ChunkedOp:
    """One call: its plan, its buffers, and what both modes share.

    Args:
        inputs: the tensors.
        statistics: names from `STATISTICS` to compute; alpha, log_q and log_p always are.
        chunk_bytes: budget for the logits of a chunk.
        top_k: see `linear_chain_loss`.
        group: the processes over which the vocabulary is split.
        kept: statistics whose gradient `statistics()` keeps.
    """

    def __init__(
        self,
        inputs: ChainInputs,
        statistics: tuple[str, ...],
        chunk_bytes: int,
        top_k: int | None,
        group: dist.ProcessGroup | None,
        kept: tuple[str, ...] = (),
    ):
        if isinstance(statistics, str):
            raise ValueError(f"statistics is the string {statistics!r}, expected a tuple of names, as ({statistics!r},)")
        if unknown := set(statistics) - set(STATISTICS):
            raise ValueError(f"unknown statistics {sorted(unknown)}; known are {', '.join(STATISTICS)}")
        if top_k is not None and (top_k < 1 or "log_q" in statistics or group is not None):
            raise ValueError(
                f"top_k is {top_k}: expected 1 or more, an objective that does not read log_q, and no vocabulary_group"
            )
        self.inputs = inputs
        self.names = tuple(name for name in STATISTICS if name in statistics or name in ("alpha", "log_q", "log_p"))
        self.statistics_named = statistics
        self.differentiable = tuple(name for name in DIFFERENTIABLE if name in statistics)
        self.wants_gradient = torch.is_grad_enabled() and inputs.draft.requires_grad
        self.kept = kept if self.wants_gradient else ()
        self.top_k = top_k
        self.lm_head = LmHead(inputs.weight)
        self.vocabulary = Vocabulary(len(inputs.weight), group, inputs.weight.device)
        self.passes = row_passes(inputs.weight.device, self.lm_head.accumulate)
        on_host = inputs.check_values(self.vocabulary)

        # The gradient overwrites the logits where it has their dtype and is asked for once.
        dtype, logits_dtype = self.lm_head.gradient_dtype, self.lm_head.accumulate
        self.has_spare = self.wants_gradient and (dtype != logits_dtype or len(kept) > 1)
        spare = dtype.itemsize / logits_dtype.itemsize if self.has_spare else 0.0
        row_bytes = self.vocabulary.largest * logits_dtype.itemsize
        self.plan = plan_chunks(*on_host, max_rows=max(0, chunk_bytes - self.lm_head.buffer_bytes) // row_bytes, spare=spare)

    def loss(self, objective: Objective, normaliser: Tensor | float) -> tuple[Tensor, dict[str, Tensor], Tensor | None]:
        """The objective's sum over valid pairs / normaliser, the statistics [K, N], and the gradient [K, N, d] if wanted."""
        draft = self.inputs.draft
        total = torch.zeros((), dtype=self.lm_head.accumulate, device=draft.device)
        result = self._zeros(draft.shape[1])
        gradient = torch.zeros_like(draft) if self.wants_gradient else None
        for rows in self._chunks():
            chunk = rows.chunk
            local = self._zeros(len(chunk.anchors))
            for name, value in local.items():
                value[chunk.steps, chunk.chains] = rows.values[name]
                result[name][:, chunk.anchors] = value
            loss_here, coefficients = self._coefficients(objective, local, chunk.valid, normaliser)
            total += loss_here
            if gradient is not None:
                by_pair = {name: c[chunk.steps, chunk.chains] for name, c in coefficients.items()}
                gradient[chunk.steps, chunk.anchors[chunk.chains]] = self._hidden_gradient(rows, by_pair)
        return total, result, gradient

    def statistics(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The statistics [K, N], and the gradient [K, N, d] of each that is kept."""
        draft = self.inputs.draft
        result = self._zeros(draft.shape[1])
        gradients = {name: torch.zeros_like(draft) for name in self.kept}
        for rows in self._chunks():
            chunk = rows.chunk
            where = (chunk.steps, chunk.anchors[chunk.chains])
            for name, value in result.items():
                value[where] = rows.values[name]
            for name, gradient in gradients.items():
                gradient[where] = self._hidden_gradient(rows, {name: torch.ones_like(rows.scale)})
        return result, gradients

    def _zeros(self, chains: int) -> dict[str, Tensor]:
        like = torch.zeros(len(self.inputs.draft), chains, dtype=self.lm_head.accumulate, device=self.inputs.draft.device)
        return {name: like.clone() for name in self.names}

    def _chunks(self) -> Iterator[_Rows]:
        if not self.plan:
            return
        most_pairs = max(len(chunk.index) for chunk in self.plan)
        most_targets = max(len(chunk.target_rows) for chunk in self.plan)
        empty = self.inputs.weight.new_empty
        z = empty(most_pairs, self.vocabulary.size, dtype=self.lm_head.accumulate)
        t = empty(most_targets, self.vocabulary.size, dtype=self.lm_head.accumulate)
        spare = empty(most_pairs, self.vocabulary.size, dtype=self.lm_head.gradient_dtype) if self.has_spare else None
        is_finite = torch.ones((), dtype=torch.bool, device=z.device)
        for chunk in self.plan:
            # Autocast would turn the fp32 products into bf16 ones and with them the logits, which ruins the TV gradient.
            with torch.autocast(z.device.type, enabled=False):
                rows = self._rows(chunk.to(z.device), z, t, spare)
            is_finite &= rows.lse_z.isfinite().all() & rows.lse_t.isfinite().all()
            yield rows
        if not bool(is_finite):  # looked at once, at the end, so that the device need not be waited for
            raise ValueError(
                f"logits are not finite although hidden states and weight are: they overflow {self.lm_head.accumulate} or, "
                f"cast to the weight's dtype, {self.inputs.weight.dtype}"
            )

    def _rows(self, chunk: Chunk, z: Tensor, t: Tensor, spare: Tensor | None) -> _Rows:
        inputs, passes, vocabulary = self.inputs, self.passes, self.vocabulary
        pairs, targets = len(chunk.index), len(chunk.target_rows)
        each = torch.arange(pairs, device=z.device)
        scale = self._inverse_temperature(chunk)
        z = self.lm_head.logits(inputs.draft[chunk.steps, chunk.anchors[chunk.chains]], _first_rows(z, pairs))
        t = self.lm_head.logits(inputs.target[chunk.target_rows], _first_rows(t, targets))
        columns = vocabulary.columns(chunk.tokens)

        lse_z, lse_t = self._log_sum_exps(z, t, chunk, scale)
        values = {
            "log_q": (vocabulary.pick(z, each, columns) * scale - lse_z).to(z.dtype),
            "log_p": (vocabulary.pick(t, chunk.index, columns) * scale - lse_t).to(z.dtype),
        }
        if self.top_k is not None:
            lowest = t.topk(min(self.top_k, t.shape[1])).values[:, -1:]
            t.masked_fill_(t < lowest, -torch.inf)
            z.masked_fill_((t == -torch.inf)[chunk.index], -torch.inf)
            lse_z, lse_t = self._log_sum_exps(z, t, chunk, scale)
        sums = passes.statistics(z, t, chunk.index, scale, lse_z, lse_t, self.names)
        values |= {name: vocabulary.sum(value) for name, value in sums.items()}
        values["alpha"].clamp_(max=1.0)  # what a sum of fp32 numbers may exceed by their rounding
        if {"alpha_target_only", "target_only_hit", "top_agreement"} & set(self.names):
            top = vocabulary.argmax(z)
            log_p_top = vocabulary.pick(t, chunk.index, vocabulary.columns(top)) * scale - lse_t
            values["alpha_target_only"] = log_p_top.exp().to(z.dtype)
            values["target_only_hit"] = (top == chunk.tokens).to(z.dtype)
            values["top_agreement"] = (top == vocabulary.argmax(t)[chunk.index]).to(z.dtype)
        return _Rows(chunk, z, t, None if spare is None else _first_rows(spare, pairs), scale, lse_z, lse_t, columns, values)

    def _inverse_temperature(self, chunk: Chunk) -> Tensor:
        """Of each pair [P]."""
        temperature = self.inputs.temperature
        if isinstance(temperature, Tensor) and temperature.ndim:
            return 1.0 / temperature.to(self.lm_head.accumulate)[chunk.anchors[chunk.chains]]
        return torch.full(
            chunk.index.shape, 1.0 / float(temperature), dtype=self.lm_head.accumulate, device=chunk.index.device
        )

    def _log_sum_exps(self, z: Tensor, t: Tensor, chunk: Chunk, scale: Tensor) -> tuple[Tensor, Tensor]:
        """Of each pair's draft and target row, both [P] in float64."""
        vocabulary, passes = self.vocabulary, self.passes
        lse_z = vocabulary.log_sum_exp(passes.log_sum_exp(z, torch.arange(len(z), device=z.device), scale))
        if isinstance(self.inputs.temperature, Tensor) and self.inputs.temperature.ndim:
            return lse_z, vocabulary.log_sum_exp(passes.log_sum_exp(t, chunk.index, scale))
        # At one temperature for all, each target row once: several pairs share it.
        every = torch.arange(len(t), device=t.device)
        return lse_z, vocabulary.log_sum_exp(passes.log_sum_exp(t, every, scale[:1].repeat(len(t))))[chunk.index]

    def _coefficients(
        self, objective: Objective, local: dict[str, Tensor], valid: Tensor, normaliser: Tensor | float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The chunk's loss, and its derivative with respect to each statistic [K, R] that the objective uses."""
        leaves = [name for name in self.differentiable if self.wants_gradient]
        with torch.enable_grad():
            given = ChainStats(valid, **{k: v.requires_grad_(k in leaves) for k, v in local.items()})
            pair_loss = objective(given.named(self.statistics_named))
            if pair_loss.shape != valid.shape:
                raise ValueError(
                    f"the objective returned shape {tuple(pair_loss.shape)}, expected {tuple(valid.shape)} (K, R)"
                )
            loss = torch.where(valid, pair_loss, 0.0).sum() / normaliser
            if not self.wants_gradient:
                return loss.detach(), {}
            if not loss.requires_grad:
                raise ValueError(
                    f"the objective has no gradient: of {', '.join(DIFFERENTIABLE)} it must name in `statistics` what it "
                    f"differentiates, and use it; it names {', '.join(self.differentiable) or 'none'}"
                )
            found = torch.autograd.grad(loss, [local[name] for name in leaves], allow_unused=True)
        return loss.detach(), {name: g for name, g in zip(leaves, found, strict=True) if g is not None}

    def _hidden_gradient(self, rows: _Rows, coefficients: dict[str, Tensor]) -> Tensor:
        """sum over statistics of coefficient [P] times d statistic/d hidden state: [P, d] in the draft's dtype."""
        scaled = {name: c * rows.scale for name, c in coefficients.items()}
        out = rows.z if rows.spare is None else rows.spare
        self.passes.gradient(
            rows.z,
            rows.t,
            rows.chunk.index,
            rows.scale,
            rows.lse_z,
            rows.lse_t,
            out,
            rows.columns,
            *row_coefficients(scaled, rows.values),
        )
        with torch.autocast(out.device.type, enabled=False):
            return self.vocabulary.sum(self.lm_head.back(out)).to(self.inputs.draft.dtype)


def row_coefficients(
    by_statistic: dict[str, Tensor], values: dict[str, Tensor]
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """on_q, on_below, on_p, on_log_ratio, on_token of the row passes' gradient, from d loss/d statistic and the
    statistics, all [P]; None is 0.

    With strict "<" for ties (Eq. 11 of arXiv 2606.12370 for alpha, textbook for the others):

        dalpha/dz_j = q_j (1[q_j < p_j] - S)          dKL(p, q)/dz_j = q_j - p_j
        dlog q(x)/dz_j = 1[j = x] - q_j               dKL(q, p)/dz_j = q_j (log(q_j/p_j) - KL(q, p))
    """
    alpha, kl, reverse_kl, log_q = (by_statistic.get(name) for name in ("alpha", "kl", "reverse_kl", "log_q"))
    on_q = torch.zeros_like(values["below"])
    if alpha is not None:
        on_q = on_q - alpha * values["below"]
    if kl is not None:
        on_q = on_q + kl
    if reverse_kl is not None:
        on_q = on_q - reverse_kl * values["reverse_kl"]
    if log_q is not None:
        on_q = on_q - log_q
    return on_q, alpha, None if kl is None else -kl, reverse_kl, log_q


def _first_rows(buffer: Tensor, rows: int) -> Tensor:
    """buffer[:rows] on the same memory, but no view to autograd: torch.compile would specialise on a view's base."""
    return buffer.new_empty(0).set_(buffer.untyped_storage(), 0, (rows, buffer.shape[1]), buffer.stride())
