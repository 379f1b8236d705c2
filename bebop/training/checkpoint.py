"""Checkpoints of a run: everything needed to go on, written beside and renamed, the newest few and the best kept."""

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from bebop.errors import InputError
from bebop.writing import remove, replace, writing

logger = logging.getLogger(__name__)

MANIFEST_FILE = "manifest.json"
_NAME = re.compile(r"step-(\d+)")


def save_checkpoint(
    accelerator: Accelerator,
    run: Path,
    position: dict[str, Any],
    write_head: Callable[[Path], None],
    keep: int,
    accept_length: float | None = None,
) -> Path:
    """Write run/checkpoints/step-N; of the others keep the newest, `keep` in all, and the one of the longest accept length.

    A directory of that name is complete, with a manifest of its files' sizes and checksums.

    Args:
        accelerator: holds the state to save.
        run: the run's directory.
        position: the step, and what decides which data come next.
        write_head: writes the head under its native names to a directory; called on process 0.
        keep: newest checkpoints to keep.
        accept_length: on held-out rollouts after this step, if it was measured.

    Raises:
        InputError: it cannot be written; earlier ones are as they were.
    """
    directory = run / "checkpoints" / f"step-{position['step']:06d}"
    partial = directory.with_name(directory.name + ".partial")
    with writing(directory):
        if accelerator.is_main_process:
            remove(partial)
            partial.mkdir(parents=True)
        accelerator.wait_for_everyone()
        try:
            accelerator.save_state(str(partial))
            accelerator.wait_for_everyone()
            if accelerator.is_main_process:
                write_head(partial / "head")
                files = {str(p.relative_to(partial)): _size_and_hash(p) for p in sorted(partial.rglob("*")) if p.is_file()}
                manifest = {"position": position, "accept_length": accept_length, "files": files}
                (partial / MANIFEST_FILE).write_text(json.dumps(manifest, indent=2) + "\n")
                replace(partial, directory)
        except BaseException:
            remove(partial)
            raise
        if accelerator.is_main_process:
            for old in _superseded(run, keep):
                shutil.rmtree(old)
    accelerator.wait_for_everyone()
    return directory


def _size_and_hash(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def checkpoints(run: Path) -> list[Path]:
    """Those that were written whole, by step; whether they still are is another question."""
    found = [p for p in (run / "checkpoints").glob("step-*") if _NAME.fullmatch(p.name)]
    return sorted(found, key=_step)


def _step(directory: Path) -> int:
    return int(directory.name.removeprefix("step-"))


def _superseded(run: Path, keep: int) -> list[Path]:
    there = checkpoints(run)
    best = max(there, key=_accept_length)
    return [directory for directory in there[:-keep] if directory != best or not _accept_length(best)]


def _manifest(directory: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((directory / MANIFEST_FILE).read_text())
        return {key: manifest[key] for key in ("position", "accept_length", "files")}
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(f"{directory} is not a complete checkpoint (no readable {MANIFEST_FILE})") from None


def check_intact(directory: Path) -> None:
    """Compare a checkpoint's files with its manifest.

    Raises:
        InputError: names the first file that is missing or differs.
    """
    for name, expected in _manifest(directory)["files"].items():
        path = directory / name
        if not path.is_file():
            raise InputError(f"{directory} is not a complete checkpoint ({name} is missing)")
        if _size_and_hash(path) != expected:
            raise InputError(f"{directory} is damaged ({name} is not what was written)")


def find_checkpoint(run: Path, resume: str) -> Path | None:
    """The checkpoint that `resume` ("auto" or a directory) means: with "auto" the newest that is intact.

    None if "auto" finds that none was written yet: so that one command starts a run and, after whatever ended it, goes on.

    Raises:
        InputError: there are some but none is intact, or the one that is named is not.
    """
    if resume != "auto":
        try:
            check_intact(Path(resume))
        except InputError as error:
            raise InputError(f"resume: {error}; --resume auto takes the newest that is intact") from None
        if Path(resume).resolve().parent != (run / "checkpoints").resolve():
            raise InputError(f"resume: {resume} does not lie in {run}/checkpoints; a run goes on in its own output")
        return Path(resume)
    for directory in reversed(checkpoints(run)):
        try:
            check_intact(directory)
        except InputError as error:
            logger.warning("left aside: %s", error)
        else:
            return directory
    if checkpoints(run):
        raise InputError(f"resume: no checkpoint in {run}/checkpoints is intact; remove {run} to start anew")
    return None


def _accept_length(directory: Path) -> float:
    try:
        return _manifest(directory)["accept_length"] or 0.0
    except InputError:
        return 0.0


def check_position(directory: Path, position: dict[str, Any], max_steps: int) -> None:
    """Refuse to go on from a checkpoint with other data, with data in another order, or to a step before it.

    Raises:
        InputError: names what differs.
    """
    saved = _manifest(directory)["position"]
    for key, value in position.items():
        if saved.get(key) != value:
            raise InputError(
                f"resume: {directory} was written with {key} = {saved.get(key)}, this run has {value}; set it back (the "
                f"configuration of then is {directory.parents[1] / 'config.yaml'}), or choose another output"
            )
    if saved["step"] > max_steps:
        raise InputError(f"resume: {directory} is of step {saved['step']}, beyond max_steps ({max_steps}); raise that")


def drop_checkpoints_after(accelerator: Accelerator, run: Path, step: int) -> None:
    """Remove checkpoints that a run resuming from `step` will write anew, and what a killed run left half written."""
    if accelerator.is_main_process:
        later = [directory for directory in checkpoints(run) if _step(directory) > step]
        for directory in [*later, *(run / "checkpoints").glob("*.partial")]:
            shutil.rmtree(directory)
    accelerator.wait_for_everyone()


def load_checkpoint(
    accelerator: Accelerator, directory: Path, optimizer: Any, scheduler: Any, learning_rate: float, weight_decay: float
) -> int:
    """Restore head, optimiser, scheduler and random states; returns the number of steps done.

    Learning rate and weight decay are the configuration's, as they may have been changed to go on.

    Args:
        accelerator, directory: that hold the state now, and then.
        optimizer, scheduler: prepared by the accelerator; its matrices' parameter group first.
        learning_rate: before warm-up and decay.
        weight_decay: of matrices.
    """
    accelerator.load_state(str(directory))
    schedule = scheduler.scheduler
    schedule.base_lrs = [learning_rate for _ in schedule.base_lrs]
    schedule._last_lr = [learning_rate * factor(schedule.last_epoch) for factor in schedule.lr_lambdas]
    for group, now in zip(optimizer.param_groups, schedule.get_last_lr(), strict=True):
        group["initial_lr"], group["lr"] = learning_rate, now
    optimizer.param_groups[0]["weight_decay"] = weight_decay
    return _manifest(directory)["position"]["step"]
