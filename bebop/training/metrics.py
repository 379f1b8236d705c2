"""Metrics of a run: JSON lines on disk, and a tracker if one is configured."""

import json
import secrets
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from bebop.errors import InputError
from bebop.evaluation.acceptance import Acceptance
from bebop.processes import from_first
from bebop.training.config import TrainConfig
from bebop.writing import complete, writing

METRICS_FILE = "metrics.jsonl"


def check_tracker(tracker: str) -> None:
    """Refuse a tracker that metrics could not be sent to.

    Raises:
        InputError: wandb is not logged in, or does not accept the key.
    """
    if tracker != "wandb":
        return
    import wandb

    if wandb.run is not None or wandb.setup().settings.mode in ("offline", "disabled", "dryrun"):
        return
    try:
        reason = "" if wandb.login(prompt=False, verify=True) else "no API key"
    except wandb.Error as error:
        reason = str(error)
    if reason:
        raise InputError(
            f"tracker is 'wandb', which is not logged in ({reason}); run `wandb login`, set WANDB_MODE=offline, or choose "
            "another tracker"
        )


class Metrics:
    """Writes metrics.jsonl, a record a step or evaluation, and passes numbers on to accelerate's tracker.

    docs/training.md lists the metrics: those of `OptimiserStep` in training records, an `Acceptance` in evaluation records.

    Args:
        accelerator, run, config: of the run; `run` is its directory.
        start: steps behind the checkpoint that the run goes on from, or 0. What was logged after it is forgotten, and to
            its tracker it is still the same run.
    """

    def __init__(self, accelerator: Accelerator, run: Path, config: TrainConfig, start: int):
        self.accelerator = accelerator
        self.path = run / METRICS_FILE
        self.longest = from_first(lambda: _truncate(self.path, start))
        if accelerator.log_with:
            keys = asdict(config) | {"rollouts": " ".join(config.rollouts)}  # TensorBoard takes no lists
            options: dict[str, dict[str, Any]] = {
                "tensorboard": {"purge_step": start + 1 if start else 0},
                "wandb": {"dir": str(run), "resume": "allow"},
            }
            if config.tracker == "wandb" and accelerator.is_main_process:
                options["wandb"]["id"] = _run_id(run / "wandb" / "run_id", start)
            accelerator.init_trackers("bebop", config=keys, init_kwargs=options)

    def training(self, step: int, values: dict[str, Any]) -> None:
        self._write({"step": step, "kind": "training"} | values)

    def skipped(self, step: int) -> None:
        """A step whose loss or gradient was not finite."""
        self._write({"step": step, "kind": "skipped"})

    def evaluation(self, step: int, acceptance: Acceptance) -> bool:
        """Whether the accept length is longer than in any evaluation of the run before."""
        values = asdict(acceptance) | {
            "accept_length": acceptance.accept_length,
            "accept_length_target_only": acceptance.accept_length_target_only,
            "accept_length_eq13": acceptance.accept_length_eq13,
        }
        self._write({"step": step, "kind": "evaluation"} | values)
        before, self.longest = self.longest, max(self.longest, acceptance.accept_length)
        return self.longest > before

    def _write(self, record: dict[str, Any]) -> None:
        if self.accelerator.is_main_process:
            with writing(self.path), self.path.open("a") as file:
                file.write(json.dumps(record) + "\n")
        flat: dict[str, float] = {}
        for name, value in record.items():
            if isinstance(value, list):
                flat |= {f"{record['kind']}/{name}_{k}": x for k, x in enumerate(value, start=1)}
            elif isinstance(value, int | float) and name != "step":
                flat[f"{record['kind']}/{name}"] = value
        self.accelerator.log(flat, step=record["step"])

    def close(self) -> None:
        self.accelerator.end_training()


def _truncate(path: Path, start: int) -> float:
    """Drop what was logged behind step `start`, or everything at 0; the longest accept length of what is left, or 0.0."""
    if not path.exists():
        return 0.0
    whole = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    kept = [line for line in whole if start and json.loads(line)["step"] <= start]
    with complete(path) as partial:
        partial.write_text("".join(kept))
    return max((r["accept_length"] for r in map(json.loads, kept) if r["kind"] == "evaluation"), default=0.0)


def _run_id(file: Path, start: int) -> str:
    """wandb's name for the run, drawn when it begins."""
    if not start or not file.exists():
        with complete(file) as partial:
            partial.write_text(secrets.token_hex(4))
    return file.read_text()
