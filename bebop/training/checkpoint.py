"""Checkpoints of a run: everything needed to go on, written beside and renamed, the newest few kept."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from bebop.errors import InputError

POSITION_FILE = "position.json"
_NAME = re.compile(r"step-(\d+)")


def save_checkpoint(accelerator: Accelerator, run: Path, position: dict[str, Any], keep: int) -> Path:
    """Write run/checkpoints/step-N and drop all but the newest `keep`. A directory of that name is always complete.

    `position` is written beside the state: the step, and what decides which data come next.
    """
    directory = run / "checkpoints" / f"step-{position['step']:06d}"
    partial = directory.with_name(directory.name + ".partial")
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(partial))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        (partial / POSITION_FILE).write_text(json.dumps(position))
        shutil.rmtree(directory, ignore_errors=True)
        partial.rename(directory)
        for old in _complete(run)[:-keep]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()
    return directory


def _complete(run: Path) -> list[Path]:
    found = [p for p in (run / "checkpoints").glob("step-*") if _NAME.fullmatch(p.name)]
    return sorted(found, key=_step)


def _step(directory: Path) -> int:
    return int(directory.name.removeprefix("step-"))


def find_checkpoint(run: Path, resume: str) -> Path:
    """The checkpoint that `resume` ("auto" or a directory) means.

    Raises:
        InputError: there is none.
    """
    if resume != "auto":
        if not (Path(resume) / POSITION_FILE).is_file():
            raise InputError(f"resume: {resume} is not a complete checkpoint directory (no {POSITION_FILE})")
        if Path(resume).resolve().parent != (run / "checkpoints").resolve():
            raise InputError(f"resume: {resume} does not lie in {run}/checkpoints; a run goes on in its own output")
        return Path(resume)
    complete = _complete(run)
    if not complete:
        raise InputError(f"resume: {run}/checkpoints has no complete checkpoint; start without --resume")
    return complete[-1]


def check_position(directory: Path, position: dict[str, Any]) -> None:
    """Refuse to go on from a checkpoint with other data, or data in another order.

    Raises:
        InputError: names what differs.
    """
    saved = json.loads((directory / POSITION_FILE).read_text())
    for key, value in position.items():
        if saved.get(key) != value:
            raise InputError(
                f"resume: {directory} was written with {key} = {saved.get(key)}, this run has {value}; set it back"
            )


def drop_checkpoints_after(accelerator: Accelerator, run: Path, step: int) -> None:
    """Remove checkpoints that a run resuming from `step` will write anew."""
    if accelerator.is_main_process:
        for directory in _complete(run):
            if _step(directory) > step:
                shutil.rmtree(directory)
    accelerator.wait_for_everyone()


def load_checkpoint(accelerator: Accelerator, directory: Path) -> int:
    """Restore head, optimiser, scheduler and random states; returns the number of steps done."""
    accelerator.load_state(str(directory))
    return json.loads((directory / POSITION_FILE).read_text())["step"]
