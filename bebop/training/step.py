"""One optimiser step: micro-batches through backbone, head and loss, one normaliser for all of them, and its guards."""

import logging
import math
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor

from bebop.data.batches import Batch, make_batch
from bebop.errors import InputError
from bebop.evaluation.acceptance import sums_over_pairs
from bebop.heads.draft import draft
from bebop.heads.targets import chain_targets
from bebop.losses import ChainLoss
from bebop.machine import Clock
from bebop.sharding import checksums, whole
from bebop.training.config import TrainConfig
from bebop.training.distribution import steps_in_backward
from bebop.training.material import Material

logger = logging.getLogger(__name__)

Rows = Sequence[Sequence[int]]  # documents that share a row, for every row of a micro-batch


class StepData(NamedTuple):
    """Of one step on this process: its micro-batches, the backbone's states of each if they are cached, and counts."""

    batches: list[Batch]
    tapped: list[Tensor | None]
    pairs: int
    tokens: int
    places: int  # tokens and padding


class OptimiserStep:
    """Runs steps and counts those that it had to skip.

    Args:
        config, accelerator, material: of the run.
        model, optimizer, scheduler: prepared by the accelerator.
    """

    def __init__(
        self, config: TrainConfig, accelerator: Accelerator, material: Material, model: Any, optimizer: Any, scheduler: Any
    ):
        self.config, self.accelerator, self.data = config, accelerator, material
        self.model, self.optimizer, self.scheduler = model, optimizer, scheduler
        self.skipped = 0  # in a row
        self.at_start: dict[str, str] | None = checksums(model)  # until a step has changed the head

    def prepare(self, micro_batches: Sequence[Rows]) -> StepData:
        """The part that needs neither the device nor other processes."""
        batches = [make_batch(rows, self.data.train) for rows in micro_batches]
        tapped = [self.data.train_states.hidden_states(b) if self.data.train_states else None for b in batches]
        steps = self.config.draft_steps
        pairs = sum(int(chain_targets(b.tokens, b.documents, b.supervised, steps).valid.sum()) for b in batches)
        tokens = sum(int((b.documents >= 0).sum()) for b in batches)
        return StepData(batches, tapped, pairs, tokens, sum(b.tokens.numel() for b in batches))

    def __call__(
        self, step: int, data: StepData, loss_fn: ChainLoss, stop: bool, clock: Clock
    ) -> tuple[dict[str, Any] | None, bool]:
        """Step number `step`, from 0.

        Args:
            data: what `prepare` made.
            loss_fn: the objective.
            stop: whether this process was asked to stop; that travels along, so that all stop after the same step.
            clock: seconds that the step took before are in it.

        Returns:
            what to record, None if the step was skipped; and whether some process was asked to stop.

        Raises:
            InputError: too many steps in a row without finite loss and gradient.
            RuntimeError: the head cannot train.
        """
        accelerator, config = self.accelerator, self.config
        started = time.perf_counter() - sum(clock.spent.values())
        mine = torch.tensor([data.pairs, stop, data.tokens, data.places], dtype=torch.float64, device=accelerator.device)
        pairs, stops, tokens, places = accelerator.reduce(mine, "sum")
        normaliser = pairs.clamp(min=1)

        loss_of_all = torch.zeros((), dtype=torch.float64, device=accelerator.device)
        sums: dict[str, Tensor] = {}
        finite = True
        for number, (batch, tapped) in enumerate(zip(data.batches, data.tapped, strict=True)):
            with accelerator.accumulate(self.model):
                loss, found = self._loss(step, number, batch, tapped, loss_fn, normaliser, clock)
                loss_of_all += loss.detach()
                sums = {name: sums.get(name, 0) + value for name, value in found.items()}
                if number == len(data.batches) - 1:
                    loss_of_all = accelerator.reduce(loss_of_all, "sum")
                    finite = bool(loss_of_all.isfinite())
                # Not finite is let through where the gradient can still be thrown away: what was accumulated goes with it.
                if finite or not steps_in_backward(accelerator):
                    with clock("head"):
                        # Data parallelism averages gradients over processes, accelerate over micro-batches; the
                        # normaliser already spans both.
                        accelerator.backward(loss * (accelerator.num_processes * config.accumulate))

        with clock("optimiser"):
            norm = self._update(step, finite, bool(pairs > 0))
        if not math.isfinite(norm):
            rollouts = sorted({int(i) for b in data.batches for i in b.documents.unique() if i >= 0})
            self._skip(step + 1, f"loss {float(loss_of_all)}, gradient norm {norm}", rollouts)
            return None, bool(stops > 0)
        self.skipped = 0
        sums = {name: accelerator.reduce(value, "sum") for name, value in sums.items()}
        realised = sums["realised"] / sums["pairs"].clamp(min=1)
        seconds = time.perf_counter() - started
        return {
            "loss": float(loss_of_all),
            "accept_length": 1.0 + float(realised.sum()),
            "alpha": (sums["alpha"] / sums["pairs"].clamp(min=1)).tolist(),
            "grad_norm": norm,
            "learning_rate": self.scheduler.get_last_lr()[0],
            "chains": int(sums["pairs"][0]),
            "padding": 1.0 - float(tokens / places),
            "tokens_per_second": float(tokens) / seconds,
            "seconds": seconds,
            **{f"seconds_{part}": spent for part, spent in clock.spent.items()},
        }, bool(stops > 0)

    def _loss(
        self,
        step: int,
        number: int,
        batch: Batch,
        tapped: Tensor | None,
        loss_fn: ChainLoss,
        normaliser: Tensor,
        clock: Clock,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of a micro-batch, and sums over its valid pairs for every draft step."""
        config, backbone = self.config, self.data.backbone
        batch = batch.to(self.accelerator.device)
        with clock("backbone"):
            if tapped is None:
                tapped = backbone.hidden_states(batch.tokens, batch.documents, batch.positions)
            tapped = tapped.to(self.accelerator.device)
        with clock("head"):
            hidden, target, targets = draft(
                self.model,
                backbone,
                tapped,
                tokens=batch.tokens,
                documents=batch.documents,
                positions=batch.positions,
                supervised=batch.supervised,
                steps=config.draft_steps,
                compute_dtype=self.data.dtype,
            )
        with clock("loss"):
            loss, stats = loss_fn(
                hidden,
                target,
                backbone.lm_head_weight,
                **targets._asdict(),
                documents=batch.documents.reshape(-1),
                normaliser=normaliser,
                temperature=self._temperatures(step, number, batch.tokens.numel()),
            )
        return loss, sums_over_pairs(stats)

    def _update(self, step: int, finite: bool, has_pairs: bool) -> float:
        """Update the head, unless loss or gradient is not finite; returns the gradient's norm over all processes."""
        accelerator = self.accelerator
        clipped: Any = accelerator.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm)
        norm = float(whole(clipped) if isinstance(clipped, Tensor) else clipped) if finite else math.nan
        if norm == 0.0 and has_pairs and self.at_start is not None:
            raise RuntimeError(f"step {step + 1} has no gradient at all; the head would never train")
        if math.isfinite(norm):  # the same on every process
            self.optimizer.step()
        elif finite and steps_in_backward(accelerator):
            raise InputError(
                f"step {step + 1} has gradient norm {norm}, and DeepSpeed has updated the head with it; lower learning_rate "
                "and go on from the last checkpoint with --resume auto"
            )
        changes = math.isfinite(norm) and norm > 0 and self.scheduler.get_last_lr()[0] > 0
        self.scheduler.step()
        self.optimizer.zero_grad()
        if changes and self.at_start is not None:
            changed = torch.tensor(float(checksums(self.model) != self.at_start), device=accelerator.device)
            if not accelerator.reduce(changed, "sum"):
                raise RuntimeError(f"step {step + 1} has left the head as it was; the head would never train")
            self.at_start = None
        return norm

    def _skip(self, step: int, found: str, rollouts: Sequence[int]) -> None:
        """Leave the head as it was, and end the run when that happens too often in a row."""
        self.skipped += 1
        keys = " ".join(sorted(self.data.train[i].key.hex()[:12] for i in rollouts))
        logger.warning("step %d is skipped: %s. Its rollouts: %s", step, found, keys)
        # DeepSpeed keeps gradients of earlier micro-batches where they cannot be taken back.
        most = 1 if steps_in_backward(self.accelerator) else self.config.max_skipped_steps
        if self.skipped == most:
            raise InputError(
                f"{self.skipped} steps in a row had no finite loss and gradient (step {step}: {found}); lower "
                "learning_rate, or look at the rollouts that the warnings name; --resume auto goes on from a checkpoint"
            )

    def _temperatures(self, step: int, micro_batch: int, chains: int) -> Tensor | None:
        """Of every chain [N], drawn uniformly from the configured range by seed and step alone; None for the one of all."""
        config, accelerator = self.config, self.accelerator
        if not config.temperature_high:
            return None
        place = (step * accelerator.num_processes + accelerator.process_index) * config.accumulate + micro_batch
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + place)
        drawn = torch.empty(chains).uniform_(config.temperature_low, config.temperature_high, generator=generator)
        return drawn.to(accelerator.device)
