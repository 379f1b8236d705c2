"""The training run: attach a head to a frozen backbone, measure, train, measure again, and leave a report."""

import json
import logging
import signal
from collections.abc import Iterator
from contextlib import closing, contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from tqdm import tqdm
from transformers import get_scheduler

from bebop.backbone import fingerprint
from bebop.data.ahead import prepared_ahead
from bebop.data.schedule import schedule
from bebop.data.states import StateCache
from bebop.errors import InputError
from bebop.evaluation.acceptance import Acceptance, evaluate
from bebop.evaluation.report import write_report
from bebop.heads.head import MTPHead
from bebop.heads.loading import head_for, read_head, save_head
from bebop.losses import ChainLoss, loss_by_name
from bebop.machine import Clock, use_all_cores
from bebop.processes import from_first, gathered
from bebop.sharding import checksums
from bebop.training.checkpoint import (
    check_position,
    checkpoints,
    drop_checkpoints_after,
    find_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from bebop.training.config import TrainConfig
from bebop.training.distribution import make_accelerator, whole_state
from bebop.training.environment import environment
from bebop.training.material import Material
from bebop.training.metrics import METRICS_FILE, Metrics, check_tracker
from bebop.training.position import backbone_hash, check_agreement, position_of, settings
from bebop.training.sizing import print_sizing
from bebop.training.step import OptimiserStep
from bebop.writing import check_parents, writing

logger = logging.getLogger(__name__)

ENVIRONMENT_FILE = "environment.json"
_SCHEDULERS = {"constant": "constant_with_warmup", "linear": "linear", "cosine": "cosine"}


def train(config: TrainConfig, material: Material | None = None) -> None:
    """Run a configuration from start to report. Everything that can be refused is refused before the first step.

    Args:
        config: all options.
        material: model and data of an earlier run in this process, which differs in neither; loaded if None.

    Raises:
        InputError: a model, rollout file, head or key that does not fit; says which, and what to do.
    """
    config.check()
    accelerator = make_accelerator(config)
    use_all_cores(accelerator.device, accelerator.num_processes)
    if config.dry_run:
        return print_sizing(config, accelerator.device) if accelerator.is_main_process else None
    set_seed(config.seed)
    _Run(config, accelerator, material).go()


class _Run:
    def __init__(self, config: TrainConfig, accelerator: Accelerator, material: Material | None):
        self.config = config
        self.accelerator = accelerator
        self.output = Path(config.output)
        self.resume_from: Path | None = from_first(self._place)
        from_first(lambda: check_tracker(config.tracker))

        self.data = material or Material.read(config, accelerator)
        self.dtype = self.data.dtype
        self.position = position_of(config, accelerator, self.data)
        self._check_position()
        if config.head != "auto":
            read_head(Path(config.head))
        self.data.load_backbone(accelerator)
        self.backbone = self.data.backbone
        self.fingerprint = fingerprint(self.backbone.directory)
        self.frozen = checksums(self.backbone.model)
        self.position["backbone"] = backbone_hash(accelerator, self.frozen)
        self._check_position()
        attention = "flex_attention" if accelerator.device.type == "cuda" else "sdpa"
        self.head, self.origin = head_for(self.backbone, config.head, attention)
        self.cold_start_steps = config.cold_start_steps if self.origin == "cold start" else 0
        self.losses = {name: self._loss(name) for name in {config.loss, config.cold_start_loss}}
        self.interrupted = 0  # number of the signal that asked this process to stop

    def _place(self) -> Path | None:
        """The checkpoint to go on from, or None where a new run has its output free."""
        found = find_checkpoint(self.output, self.config.resume) if self.config.resume else None
        if found is None:
            self._check_output()
        return found

    def _check_output(self) -> None:
        """What a run left that ended before its first checkpoint was whole may be replaced."""
        check_parents(self.output)
        if self.output.exists() and not self.output.is_dir():
            raise InputError(f"output {self.output} is a file; expected a directory that this run may create")
        there = {p.name for p in self.output.iterdir()} if self.output.exists() else set()
        trackers = {"bebop", "wandb"}
        before = {"config.yaml", ENVIRONMENT_FILE, METRICS_FILE, METRICS_FILE + ".writing", "checkpoints"} | trackers
        if there - before or checkpoints(self.output):
            raise InputError(f"output {self.output} exists and is not empty; choose another, or go on with --resume auto")

    def _check_position(self) -> None:
        check_agreement(self.accelerator, self.position | settings(self.config))
        if self.resume_from is not None:
            check_position(self.resume_from, self.position, self.config.max_steps)

    def _loss(self, name: str) -> ChainLoss:
        return loss_by_name(name, temperature=self.config.temperature, chunk_bytes=self.config.chunk_mib * 2**20)

    def go(self) -> None:
        config, accelerator = self.config, self.accelerator
        next(self._steps())  # refuses data that do not fill a step, before anything is written
        if config.cache_states and self.data.train_states is None:
            self._cache_states()
        if accelerator.is_main_process:
            with writing(self.output):
                self.output.mkdir(parents=True, exist_ok=True)
                (self.output / "config.yaml").write_text(config.as_yaml())
                (self.output / ENVIRONMENT_FILE).write_text(json.dumps(environment(accelerator), indent=2) + "\n")
        accelerator.wait_for_everyone()
        self._log(
            f"{self.backbone.config.model_type} backbone in {str(self.dtype).removeprefix('torch.')}, "
            f"head from {self.origin}, {len(self.data.train)} training and {len(self.data.held_out)} held-out rollouts"
        )
        model, optimizer, scheduler = self._prepare()
        start = 0
        if self.resume_from is not None:
            start = load_checkpoint(
                accelerator, self.resume_from, optimizer, scheduler, config.learning_rate, config.weight_decay
            )
            drop_checkpoints_after(accelerator, self.output, start)
            metrics = Metrics(accelerator, self.output, config, start)
            self._log(f"resumed after step {start} from {self.resume_from}")
        else:
            metrics = Metrics(accelerator, self.output, config, start)
            metrics.evaluation(0, self._evaluate())

        self._train(start, OptimiserStep(config, accelerator, self.data, model, optimizer, scheduler), metrics)

        if checksums(self.backbone.model) != self.frozen:
            raise RuntimeError("weights of the frozen backbone have changed during the run; the head is not to be used")
        state = whole_state(accelerator, model)
        if accelerator.is_main_process:
            self._write_head(self.output / "head", config.max_steps, state)
            write_report(self.output)
        accelerator.wait_for_everyone()
        metrics.close()  # last: it takes the process group down

    def _prepare(self) -> tuple[Any, Any, Any]:
        """Head, optimiser and scheduler as the strategy wants them."""
        config, processes = self.config, self.accelerator.num_processes
        matrices = [p for p in self.head.parameters() if p.ndim > 1]
        vectors = [p for p in self.head.parameters() if p.ndim <= 1]
        optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
            lr=config.learning_rate,
            betas=(0.9, 0.95),
        )
        # accelerate advances the scheduler once a process at every step.
        scheduler = get_scheduler(
            _SCHEDULERS[config.decay],
            optimizer,
            num_warmup_steps=round(config.warmup_share * config.max_steps) * processes,
            num_training_steps=config.max_steps * processes,
        )
        return self.accelerator.prepare(self.head, optimizer, scheduler)

    def _train(self, start: int, optimiser_step: OptimiserStep, metrics: Metrics) -> None:
        """All steps from `start` on, with their evaluations and checkpoints; a signal ends the process behind a step."""
        config, accelerator = self.config, self.accelerator
        steps = islice(self._steps(), start, config.max_steps)
        with (
            self._stop_on_signal(),
            closing(prepared_ahead(steps, optimiser_step.prepare)) as ahead,
            tqdm(total=config.max_steps, initial=start, desc="training", disable=not accelerator.is_main_process) as bar,
        ):
            step, stopping = start, False
            while step < config.max_steps and not stopping:
                objective = config.cold_start_loss if step < self.cold_start_steps else config.loss
                clock = Clock(accelerator.device)
                with clock("data"):
                    data = next(ahead)
                values, stopping = optimiser_step(step, data, self.losses[objective], self.interrupted > 0, clock)
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
                last, longest = step == config.max_steps, False
                accept_length = None
                if last or (config.evaluate_every and step % config.evaluate_every == 0):
                    acceptance = self._evaluate()
                    accept_length = acceptance.accept_length
                    longest = metrics.evaluation(step, acceptance)
                    stopping = stopping or any(gathered(self.interrupted))  # evaluations take their time
                if step % config.save_every == 0 or last or longest:
                    self._save(step, optimiser_step.model, accept_length)
        if stopping and step < config.max_steps:
            saved = self.output / "checkpoints" / f"step-{step:06d}"
            if not saved.exists():
                self._save(step, optimiser_step.model)
            self._log(f"stopped after step {step}; go on with --resume auto (checkpoint {saved})")
            raise SystemExit(130 if self.interrupted == signal.SIGINT else 0)  # SIGTERM is how schedulers pre-empt

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

    def _save(self, step: int, model: Any, accept_length: float | None = None) -> None:
        state = whole_state(self.accelerator, model)

        def write_head(directory: Path) -> None:
            self._write_head(directory, step, state)

        position, keep = self.position | {"step": step}, self.config.keep_checkpoints
        save_checkpoint(self.accelerator, self.output, position, write_head, keep, accept_length)

    def _write_head(self, directory: Path, step: int, state: dict[str, torch.Tensor]) -> None:
        config = self.config
        facts = {
            "backbone": config.backbone,
            "fingerprint": self.fingerprint,
            "draft_steps": config.draft_steps,
            "temperature": config.temperature,
            "loss": config.loss,
            "steps": step,
        }
        save_head(self.head, directory, facts, state)

    def _cache_states(self) -> None:
        data, config = self.data, self.config
        directory = Path(config.states_directory).expanduser() if config.states_directory else None
        size = sum(StateCache.size_in_bytes(self.backbone, part) for part in (data.train, data.held_out))
        self._log(f"keeping backbone states in {directory or 'memory'}, {size / 2**20:.0f} MiB")
        show = self.accelerator.is_main_process
        data.train_states = StateCache(self.backbone, data.train, "training states" if show else None, directory)
        data.held_out_states = StateCache(self.backbone, data.held_out, "held-out states" if show else None, directory)

    def _evaluate(self) -> Acceptance:
        """On the held-out rollouts, which the processes share."""
        head = self.accelerator.unwrap_model(self.head)
        assert isinstance(head, MTPHead)
        return evaluate(
            head,
            self.backbone,
            self.data.held_out,
            accelerator=self.accelerator,
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
