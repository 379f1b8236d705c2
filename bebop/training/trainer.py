"""The training run: attach a head to a frozen backbone, measure, train, measure again, and leave a report."""

import logging
import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from tqdm import tqdm
from transformers import get_scheduler

from bebop.backbone import Backbone, fingerprint
from bebop.data.batches import make_batch
from bebop.data.rollouts import Rollout, check_rollouts_of, digest, read_rollouts, split_held_out
from bebop.data.schedule import schedule
from bebop.data.states import StateCache
from bebop.errors import InputError
from bebop.evaluation.acceptance import Acceptance, evaluate, pair_values
from bebop.evaluation.report import write_report
from bebop.heads.draft import draft
from bebop.heads.head import MTPHead
from bebop.heads.loading import head_for, save_head
from bebop.heads.targets import chain_targets
from bebop.losses import ChainLoss, loss_by_name
from bebop.machine import Clock, compute_dtype, use_all_cores
from bebop.training.checkpoint import (
    check_position,
    checkpoints,
    drop_checkpoints_after,
    find_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from bebop.training.config import TrainConfig
from bebop.training.metrics import METRICS_FILE, Metrics

logger = logging.getLogger(__name__)

_SCHEDULERS = {"constant": "constant_with_warmup", "linear": "linear", "cosine": "cosine"}


def train(config: TrainConfig, material: "Material | None" = None) -> None:
    """Run a configuration from start to report. Everything that can be refused is refused before the first step.

    Args:
        config: all options.
        material: model and data of an earlier run in this process, which differs in neither; loaded if None.

    Raises:
        InputError: a model, rollout file, head or key that does not fit; says which, and what to do.
    """
    config.check()
    accelerator = Accelerator(log_with=None if config.tracker == "none" else config.tracker, project_dir=config.output)
    use_all_cores(accelerator.device, accelerator.num_processes)
    set_seed(config.seed)
    _Run(config, accelerator, material).go()


@dataclass
class Material:
    """What runs that differ in their objective have in common: the frozen model and the rollouts."""

    backbone: Backbone
    dtype: torch.dtype
    train: list[Rollout]
    held_out: list[Rollout]
    train_states: StateCache | None = None
    held_out_states: StateCache | None = None

    @classmethod
    def load(cls, config: TrainConfig, device: torch.device) -> "Material":
        """Read and check model and rollouts of a configuration.

        Raises:
            InputError: they are missing or damaged, do not belong together, or are too few or too short to train on.
        """
        path = Path(config.rollouts)
        header, rollouts = read_rollouts(path)
        dtype = compute_dtype(config.dtype, device)
        backbone = Backbone.load(config.backbone, dtype, device)
        check_rollouts_of(backbone, path, header, rollouts, config.max_length)
        if header.temperature != config.temperature:
            logger.warning(
                "rollouts were sampled at temperature %s and are scored at %s: the realised estimates are biased",
                header.temperature,
                config.temperature,
            )
        material = cls(backbone, dtype, *split_held_out(rollouts, config.held_out_share))
        for side, documents in (("training", material.train), ("held-out", material.held_out)):
            if not documents:
                raise InputError(
                    f"{path}: of {len(rollouts)} rollouts none is {side} at held_out_share {config.held_out_share}; "
                    "sample more rollouts or change the share"
                )
            if (longest := max(len(r.response_ids) for r in documents)) <= config.draft_steps:
                raise InputError(
                    f"{path}: the longest {side} response has {longest} tokens, too few for {config.draft_steps} draft "
                    f"steps, which take {config.draft_steps + 1}; sample longer responses or lower draft_steps"
                )
        return material


class _Run:
    def __init__(self, config: TrainConfig, accelerator: Accelerator, material: Material | None):
        self.config = config
        self.accelerator = accelerator
        self.output = Path(config.output)
        self.resume_from = find_checkpoint(self.output, config.resume) if config.resume else None
        if self.resume_from is None:
            self._check_output()

        self.data = material or Material.load(config, accelerator.device)
        self.backbone, self.dtype = self.data.backbone, self.data.dtype
        if self.resume_from is not None:
            check_position(self.resume_from, self._position())
        attention = "flex_attention" if accelerator.device.type == "cuda" else "sdpa"
        self.head, self.origin = head_for(self.backbone, config.head, attention)
        self.cold_start_steps = config.cold_start_steps if self.origin == "cold start" else 0
        self.losses = {name: self._loss(name) for name in {config.loss, config.cold_start_loss}}
        self.skipped = 0  # steps in a row
        self.interrupted = 0  # number of the signal that asked this process to stop
        self.stopping = False  # some process was asked to, and all know

    def _check_output(self) -> None:
        """What a run left that ended before its first checkpoint was whole may be replaced."""
        if self.output.exists() and not self.output.is_dir():
            raise InputError(f"output {self.output} is a file; expected a directory that this run may create")
        there = {p.name for p in self.output.iterdir()} if self.output.exists() else set()
        if there - {"config.yaml", METRICS_FILE, "checkpoints"} or checkpoints(self.output):
            raise InputError(f"output {self.output} exists and is not empty; choose another, or go on with --resume auto")

    def _position(self) -> dict[str, Any]:
        """What decides which data come at which step: a checkpoint resumes only where all of it is the same."""
        config = self.config
        return {
            "rollouts": digest(self.data.train),
            "processes": self.accelerator.num_processes,
            **{key: getattr(config, key) for key in ("seed", "accumulate", "tokens_per_micro_batch", "draft_steps")},
        }

    def _loss(self, name: str) -> ChainLoss:
        return loss_by_name(name, temperature=self.config.temperature, chunk_bytes=self.config.chunk_mib * 2**20)

    def go(self) -> None:
        config, accelerator = self.config, self.accelerator
        next(self._steps())  # refuses data that do not fill a step, before anything is written
        accelerator.wait_for_everyone()  # everyone has looked at the output before it is written to
        if accelerator.is_main_process:
            self.output.mkdir(parents=True, exist_ok=True)
            (self.output / "config.yaml").write_text(config.as_yaml())
        accelerator.wait_for_everyone()
        self._log(
            f"{self.backbone.config.model_type} backbone in {str(self.dtype).removeprefix('torch.')}, "
            f"head from {self.origin}, {len(self.data.train)} training and {len(self.data.held_out)} held-out rollouts"
        )
        if config.cache_states and self.data.train_states is None:
            self._cache_states()

        matrices = [p for p in self.head.parameters() if p.ndim > 1]
        vectors = [p for p in self.head.parameters() if p.ndim <= 1]
        optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
            lr=config.learning_rate,
            betas=(0.9, 0.95),
        )
        # accelerate advances the scheduler once a process at every step.
        processes = accelerator.num_processes
        scheduler = get_scheduler(
            _SCHEDULERS[config.decay],
            optimizer,
            num_warmup_steps=round(config.warmup_share * config.max_steps) * processes,
            num_training_steps=config.max_steps * processes,
        )
        model, optimizer, scheduler = accelerator.prepare(self.head, optimizer, scheduler)

        metrics = Metrics(accelerator, self.output, config)
        start = 0
        if self.resume_from is not None:
            start = load_checkpoint(accelerator, self.resume_from)
            drop_checkpoints_after(accelerator, self.output, start)
            metrics.truncate(start)
            self._log(f"resumed after step {start} from {self.resume_from}")
        else:
            metrics.truncate(-1)
            metrics.evaluation(0, self._evaluate())

        steps = islice(self._steps(), start, None)
        with (
            self._stop_on_signal(),
            tqdm(total=config.max_steps, initial=start, desc="training", disable=not accelerator.is_main_process) as bar,
        ):
            step = start
            while step < config.max_steps and not self.stopping:
                objective = config.cold_start_loss if step < self.cold_start_steps else config.loss
                values = self._optimiser_step(step, next(steps), self.losses[objective], model, optimizer, scheduler)
                step += 1
                if values is None:
                    metrics.skipped(step)
                else:
                    metrics.training(step, {"objective": objective} | values)
                    bar.set_postfix_str(
                        f"{objective} {values['loss']:.4f}, accept length {values['accept_length']:.3f}, "
                        f"{values['tokens_per_second']:.0f} tok/s"
                    )
                bar.update()
                last = step == config.max_steps
                accept_length = None
                if last or (config.evaluate_every and step % config.evaluate_every == 0):
                    acceptance = self._evaluate()
                    accept_length = acceptance.accept_length
                    metrics.evaluation(step, acceptance)
                if step % config.save_every == 0 or last:
                    self._save(step, accept_length)
        if self.stopping:
            saved = self.output / "checkpoints" / f"step-{step:06d}"
            if not saved.exists():
                self._save(step)
            self._log(f"stopped after step {step}; go on with --resume auto (checkpoint {saved})")
            raise SystemExit(130 if self.interrupted == signal.SIGINT else 0)  # SIGTERM is how schedulers pre-empt

        if accelerator.is_main_process:
            facts = {
                "backbone": config.backbone,
                "fingerprint": fingerprint(self.backbone.directory),
                "draft_steps": config.draft_steps,
                "temperature": config.temperature,
                "loss": config.loss,
                "steps": config.max_steps,
            }
            save_head(accelerator.unwrap_model(model), self.output / "head", facts)
            write_report(self.output)
        accelerator.wait_for_everyone()
        metrics.close()  # last: it takes the process group down

    def _steps(self) -> Iterator[list[list[list[int]]]]:
        return schedule(
            [len(r) for r in self.data.train],
            tokens_per_micro_batch=self.config.tokens_per_micro_batch,
            pack=self.backbone.packs_documents,
            accumulate=self.config.accumulate,
            processes=self.accelerator.num_processes,
            process=self.accelerator.process_index,
            seed=self.config.seed,
        )

    def _save(self, step: int, accept_length: float | None = None) -> Path:
        position = self._position() | {"step": step}
        return save_checkpoint(self.accelerator, self.output, position, self.config.keep_checkpoints, accept_length)

    def _cache_states(self) -> None:
        data = self.data
        size = sum(StateCache.size_in_bytes(self.backbone, part) for part in (data.train, data.held_out))
        self._log(f"computing backbone states once, {size / 2**20:.0f} MiB")
        show = self.accelerator.is_main_process
        data.train_states = StateCache(self.backbone, data.train, "training states" if show else None)
        data.held_out_states = StateCache(self.backbone, data.held_out, "held-out states" if show else None)

    def _optimiser_step(
        self, step: int, micro_batches: list, loss_fn: ChainLoss, model: Any, optimizer: Any, scheduler: Any
    ) -> dict[str, Any] | None:
        """What to record of the step; None if it was skipped."""
        accelerator, config = self.accelerator, self.config
        started = time.perf_counter()
        clock = Clock(accelerator.device)
        batches = [make_batch(rows, self.data.train).to(accelerator.device) for rows in micro_batches]
        # One normaliser for the whole step: valid pairs of all micro-batches of all processes. The interrupt travels along,
        # so that all processes stop after the same step.
        pairs = sum(chain_targets(b.tokens, b.documents, b.supervised, config.draft_steps).valid.sum() for b in batches)
        mine = torch.tensor([float(pairs), float(self.interrupted)], dtype=torch.float64, device=accelerator.device)
        pairs_of_all, interrupts = accelerator.reduce(mine, "sum")
        normaliser = pairs_of_all.clamp(min=1)
        stop = bool(interrupts > 0)

        total_loss = torch.zeros((), dtype=torch.float64, device=accelerator.device)
        sums: dict[str, torch.Tensor] = {}
        for number, batch in enumerate(batches):
            with clock("backbone"):
                tapped = (
                    self.data.train_states.hidden_states(batch)
                    if self.data.train_states
                    else self.backbone.hidden_states(batch.tokens, batch.documents, batch.positions)
                )
            is_last = number == len(batches) - 1
            with nullcontext() if is_last else accelerator.no_sync(model):
                with clock("head"):
                    hidden, target, targets = draft(
                        model,
                        self.backbone,
                        tapped,
                        tokens=batch.tokens,
                        documents=batch.documents,
                        positions=batch.positions,
                        supervised=batch.supervised,
                        steps=config.draft_steps,
                        compute_dtype=self.dtype,
                    )
                with clock("loss"):
                    loss, stats = loss_fn(
                        hidden,
                        target,
                        self.backbone.lm_head_weight,
                        **targets._asdict(),
                        documents=batch.documents.reshape(-1),
                        normaliser=normaliser,
                        temperature=self._temperatures(step, number, batch.tokens.numel()),
                    )
                with clock("head"):
                    # Data parallelism averages gradients over processes; the normaliser already spans them.
                    accelerator.backward(loss * accelerator.num_processes)
            total_loss += loss.detach()
            for name, value in pair_values(stats).items():
                sums[name] = sums.get(name, 0) + torch.where(stats.valid, value.double(), 0.0).sum(1)
            sums["pairs"] = sums.get("pairs", 0) + stats.valid.sum(1).double()

        with clock("optimiser"):
            norm = float(accelerator.clip_grad_norm_(model.parameters(), config.max_grad_norm))
            loss_of_all = float(accelerator.reduce(total_loss, "sum"))
            if norm == 0.0 and step == 0:
                raise RuntimeError("the first step has no gradient at all; the head would never train")
            finite = math.isfinite(norm) and math.isfinite(loss_of_all)  # the same on every process
            if finite:
                optimizer.step()
            scheduler.step()
            optimizer.zero_grad()

        self.stopping = stop
        if not finite:
            self._skip(step + 1, f"loss {loss_of_all}, gradient norm {norm}", micro_batches)
            return None
        self.skipped = 0
        sums = {name: accelerator.reduce(value, "sum") for name, value in sums.items()}
        realised = sums["realised"] / sums["pairs"].clamp(min=1)
        tokens = sum(int((b.documents >= 0).sum()) for b in batches) * accelerator.num_processes
        seconds = time.perf_counter() - started
        return {
            "loss": loss_of_all,
            "accept_length": 1.0 + float(realised.sum()),
            "alpha": (sums["alpha"] / sums["pairs"].clamp(min=1)).tolist(),
            "grad_norm": norm,
            "learning_rate": scheduler.get_last_lr()[0],
            "chains": int(sums["pairs"][0]),
            "tokens_per_second": tokens / seconds,
            "seconds": seconds,
            **{f"seconds_{part}": spent for part, spent in clock.spent.items()},
        }

    def _skip(self, step: int, found: str, micro_batches: list[list[list[int]]]) -> None:
        """Leave the head as it was, and end the run when that happens too often in a row."""
        self.skipped += 1
        keys = sorted({self.data.train[i].key.hex()[:12] for rows in micro_batches for row in rows for i in row})
        logger.warning("step %d is skipped: %s. Its rollouts: %s", step, found, " ".join(keys))
        if self.skipped == self.config.max_skipped_steps:
            raise InputError(
                f"{self.skipped} steps in a row had no finite loss and gradient (step {step}: {found}); lower "
                "learning_rate, or look at the rollouts that the warnings name; --resume auto goes on from a checkpoint"
            )

    def _temperatures(self, step: int, micro_batch: int, chains: int) -> torch.Tensor | None:
        """Of every chain [N], drawn uniformly from the configured range by seed and step alone; None for the one of all."""
        config, accelerator = self.config, self.accelerator
        if not config.temperature_high:
            return None
        place = (step * accelerator.num_processes + accelerator.process_index) * config.accumulate + micro_batch
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + place)
        drawn = torch.empty(chains).uniform_(config.temperature_low, config.temperature_high, generator=generator)
        return drawn.to(accelerator.device)

    def _evaluate(self) -> Acceptance:
        """Every process does the same: the held-out set is small, and nobody has to wait for the result."""
        head = self.accelerator.unwrap_model(self.head)
        assert isinstance(head, MTPHead)
        return evaluate(
            head,
            self.backbone,
            self.data.held_out,
            steps=self.config.draft_steps,
            temperature=self.config.temperature,
            compute_dtype=self.dtype,
            tokens_per_micro_batch=self.config.tokens_per_micro_batch,
            chunk_bytes=self.config.chunk_mib * 2**20,
            states=self.data.held_out_states,
        )

    def _log(self, message: str) -> None:
        if self.accelerator.is_main_process:
            tqdm.write(message)

    @contextmanager
    def _stop_on_signal(self) -> Iterator[None]:
        """The first SIGINT or SIGTERM ends the run after the current step, with a checkpoint; the second at once."""

        def stop(number: int, frame: Any) -> None:
            if self.interrupted:
                raise KeyboardInterrupt
            self.interrupted = number

        before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
