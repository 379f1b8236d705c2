"""The configuration of a training run: one dataclass, filled from YAML, overridden on the command line."""

import difflib
import importlib.util
import math
import sys
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser

from bebop.errors import InputError
from bebop.losses import LOSSES, loss_by_name

TRACKERS = ("none", "wandb", "tensorboard")
DTYPES = ("auto", "bf16", "fp32")


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass
class TrainConfig:
    """Every key of a training configuration; YAML key and command-line option have the same name."""

    backbone: str = _option("", "Directory or hub id of the frozen language model.")
    rollouts: list[str] = field(
        default_factory=list,
        metadata={"help": "Rollout files that the backbone wrote, or patterns of such: JSON lines or parquet."},
    )
    output: str = _option("", "Directory of this run: configuration, metrics, checkpoints, head, report.")
    head: str = _option(
        "auto", "Where the head starts: 'auto' (the checkpoint's own, else a cold start), or a head directory of a run."
    )
    draft_steps: int = _option(3, "K, draft steps of a chain in training and evaluation.")
    temperature: float = _option(1.0, "Divides draft and target logits; sample rollouts and serve at the same one.")
    temperature_low: float = _option(0.0, "With temperature_high: training draws every chain's temperature from this range.")
    temperature_high: float = _option(0.0, "Upper end of that range; 0 in both: `temperature` for all chains.")

    loss: str = _option("e2e_tv", f"Objective: {', '.join(LOSSES)}; or a weighted sum, as 'e2e_tv + 0.1 ce'.")
    cold_start_loss: str = _option("lk_hybrid", "Objective of the first cold_start_steps of a cold-started head.")
    cold_start_steps: int = _option(0, "Optimiser steps with cold_start_loss; a head that was trained before skips them.")
    max_steps: int = _option(1000, "Optimiser steps, the cold start's included.")
    learning_rate: float = _option(3.5e-5, "Peak learning rate of AdamW.")
    warmup_share: float = _option(0.03, "Share of max_steps over which the learning rate rises.")
    decay: str = _option("constant", "What the learning rate does after the warm-up: 'constant', 'linear' or 'cosine'.")
    weight_decay: float = _option(0.0, "Of AdamW, on matrices only.")
    max_grad_norm: float = _option(1.0, "Gradients are clipped to this norm.")
    seed: int = _option(0, "Of the order of the data.")

    tokens_per_micro_batch: int = _option(4096, "Most tokens, padding included, of a forward pass on one process.")
    accumulate: int = _option(1, "Micro-batches of an optimiser step on one process.")
    max_length: int = _option(0, "Longest conversation in tokens; 0 means what the backbone takes.")
    held_out_share: float = _option(0.05, "Share of rollouts kept for evaluation, chosen by their hash.")
    cache_states: bool = _option(False, "Compute backbone states once and keep them, instead of every epoch.")
    states_directory: str = _option("", "Where cache_states keeps them for later runs too; '' keeps them in memory.")
    dtype: str = _option("auto", "Of backbone and compute: 'bf16', 'fp32', or 'auto' (bf16 where the machine has it).")
    chunk_mib: int = _option(512, "Budget for the logits of one chunk of the loss, in MiB.")

    evaluate_every: int = _option(0, "Evaluate on the held-out rollouts every so many steps; 0: before and after only.")
    save_every: int = _option(200, "Write a checkpoint every so many steps, and after the best evaluation so far.")
    max_skipped_steps: int = _option(
        3, "So many steps in a row that are not finite, and so skipped, end the run; with DeepSpeed one."
    )
    keep_checkpoints: int = _option(2, "Newest checkpoints to keep, beside the best by held-out accept length.")
    resume: str = _option(
        "",
        "'auto': newest checkpoint in output, if any; a checkpoint: that one, removing later ones; '': a new run.",
    )
    dry_run: int = _option(
        0, "So many processes: print what a run on them would take, by the model's config alone, and end."
    )
    tracker: str = _option("none", f"Where metrics go besides metrics.jsonl: {', '.join(TRACKERS)}.")

    def check(self) -> None:
        """Refuse values that cannot be meant.

        Raises:
            InputError: names the key, what was found and what is expected.
        """
        for key in ("backbone",) if self.dry_run else ("backbone", "rollouts", "output"):
            if not getattr(self, key):
                raise InputError(f"{key} is not set; give --{key} or put it into the configuration file")
        choices = {
            "decay": ("constant", "linear", "cosine"),
            "dtype": DTYPES,
            "tracker": TRACKERS,
        }
        for key, known in choices.items():
            if getattr(self, key) not in known:
                raise InputError(f"{key} is {getattr(self, key)!r}, expected one of {', '.join(known)}")
        for key in ("loss", "cold_start_loss"):
            try:
                loss_by_name(getattr(self, key))
            except ValueError as error:
                raise InputError(f"{key}: {error}") from None
        if self.tracker != "none" and importlib.util.find_spec(self.tracker) is None:
            raise InputError(f"tracker is {self.tracker!r}, which is not installed; pip install 'bebop-mtp[{self.tracker}]'")
        at_least = {
            "draft_steps": 1, "max_steps": 1, "cold_start_steps": 0, "tokens_per_micro_batch": 1, "accumulate": 1,
            "max_length": 0, "chunk_mib": 1, "evaluate_every": 0, "save_every": 1, "keep_checkpoints": 1, "weight_decay": 0,
            "max_skipped_steps": 1, "dry_run": 0,
        }  # fmt: skip
        for key, least in at_least.items():
            if not least <= getattr(self, key) < math.inf:
                raise InputError(f"{key} is {getattr(self, key)}, expected {least} or more")
        for key in ("temperature", "learning_rate", "max_grad_norm"):
            if not 0 < getattr(self, key) < math.inf:
                raise InputError(f"{key} is {getattr(self, key)}, expected a number above 0")
        if not 0 <= self.seed < 2**32:
            raise InputError(f"seed is {self.seed}, expected a number from 0 to {2**32 - 1}")
        low, high = self.temperature_low, self.temperature_high
        if (low, high) != (0.0, 0.0) and not 0 < low <= high < math.inf:
            raise InputError(
                f"temperature_low and temperature_high are {low} and {high}, expected 0 < low <= high, or 0 and 0"
            )
        for key in ("held_out_share", "warmup_share"):
            if not 0 <= getattr(self, key) < 1:
                raise InputError(f"{key} is {getattr(self, key)}, expected a share from 0 to below 1")
        if self.states_directory and not self.cache_states:
            raise InputError("states_directory is set but cache_states is not; set cache_states: true as well")
        if self.cold_start_steps > self.max_steps:
            raise InputError(f"cold_start_steps is {self.cold_start_steps}, more than max_steps ({self.max_steps})")

    def as_yaml(self) -> str:
        return yaml.safe_dump(asdict(self), sort_keys=False)


def parse_config(arguments: list[str] | None = None) -> TrainConfig:
    """Configuration from `--config FILE` and `--key value` overrides, checked.

    Raises:
        InputError: an unknown key (with the nearest known one), a value of the wrong type, or one that `check` refuses.
    """
    parser = HfArgumentParser(TrainConfig, exit_on_error=False, allow_abbrev=False)  # type: ignore[arg-type]
    parser.add_argument("--config", help="YAML file with any of the keys below.")
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        known, _ = parser.parse_known_args([a for a in arguments if a in ("-h", "--help")] or _config_option(arguments))
        if known.config:
            parser.set_defaults(**_read_yaml(Path(known.config)))
        namespace, unknown = parser.parse_known_args(arguments)
    except InputError:
        raise
    except Exception as error:  # argparse raises its own types for what it cannot convert
        raise InputError(f"command line: {error}") from None
    if unknown:
        raise InputError(f"command line: unknown option {unknown[0]!r}{_nearest(unknown[0].lstrip('-'))}")
    values = vars(namespace)
    config = TrainConfig(**{f.name: values[f.name] for f in fields(TrainConfig)})
    config.check()
    return config


def _config_option(arguments: list[str]) -> list[str]:
    for i, argument in enumerate(arguments):
        if argument == "--config":
            return arguments[i : i + 2]
        if argument.startswith("--config="):
            return [argument]
    return []


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise InputError(f"configuration file {path} does not exist")
    try:
        values = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise InputError(f"{path}: expected 'key: value' lines, found {type(values).__name__}")
    types: dict[str, Any] = {f.name: f.type for f in fields(TrainConfig)}
    for key, value in values.items():
        if key not in types:
            raise InputError(f"{path}: unknown key {key!r}{_nearest(str(key))}")
        try:
            values[key] = _convert(value, types[key])
        except (TypeError, ValueError):
            expected = "a string or a list of strings" if key == "rollouts" else types[key].__name__
            raise InputError(f"{path}: {key} is {value!r}, expected {expected}") from None
    return values


def _convert(value: Any, kind: Any) -> Any:
    """YAML's value as the field's type; YAML reads 1e-3 as a string."""
    if kind == list[str]:
        values = value if isinstance(value, list) else [value]
        if not all(isinstance(v, str) for v in values):
            raise TypeError
        return values
    if kind is bool or kind is str:
        if not isinstance(value, kind):
            raise TypeError
        return value
    if isinstance(value, bool) or (kind is int and isinstance(value, float)):
        raise TypeError
    return kind(value)


def _nearest(key: str) -> str:
    found = difflib.get_close_matches(key.partition("=")[0], [f.name for f in fields(TrainConfig)], n=1, cutoff=0.0)
    return f"; did you mean {found[0]!r}?"
