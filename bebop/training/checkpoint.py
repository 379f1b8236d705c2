"""Checkpoints of a run: everything needed to go on, written beside and renamed, the newest few kept."""

import json
import re
import shutil
from pathlib import Path

from accelerate import Accelerator

from bebop.errors import InputError

_NAME = re.compile(r"step-(\d+)")


def save_checkpoint(accelerator: Accelerator, run: Path, step: int, keep: int) -> Path:
    """Write run/checkpoints/step-N and drop all but the newest `keep`. A directory of that name is always complete."""
    directory = run / "checkpoints" / f"step-{step:06d}"
    partial = directory.with_name(directory.name + ".partial")
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(partial))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        (partial / "position.json").write_text(json.dumps({"step": step}))
        shutil.rmtree(directory, ignore_errors=True)
        partial.rename(directory)
        for old in _complete(run)[:-keep]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()
    return directory


def _complete(run: Path) -> list[Path]:
    found = [p for p in (run / "checkpoints").glob("step-*") if _NAME.fullmatch(p.name)]
    return sorted(found, key=lambda p: int(_NAME.fullmatch(p.name).group(1)))  # type: ignore[union-attr]


def find_checkpoint(run: Path, resume: str) -> Path:
    """The checkpoint that `resume` ("auto" or a directory) means.

    Raises:
        InputError: there is none.
    """
    if resume != "auto":
        if not (Path(resume) / "position.json").is_file():
            raise InputError(f"resume: {resume} is not a complete checkpoint directory (no position.json)")
        return Path(resume)
    complete = _complete(run)
    if not complete:
        raise InputError(f"resume: {run}/checkpoints has no complete checkpoint; start without --resume")
    return complete[-1]


def load_checkpoint(accelerator: Accelerator, directory: Path) -> int:
    """Restore head, optimiser, scheduler and random states; returns the number of steps done."""
    accelerator.load_state(str(directory))
    return json.loads((directory / "position.json").read_text())["step"]
