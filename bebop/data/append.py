"""A rollout file that grows line by line, so that a run that was stopped or killed can go on."""

import fcntl
import json
import os
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

from bebop.data.rollouts import Rollout, RolloutHeader, read_rollout_header
from bebop.errors import InputError
from bebop.writing import check_new, writing

_SECONDS_BETWEEN_SYNCS = 5.0


def check_output(output: Path) -> None:
    """Refuse a name under which no rollout file can grow.

    Raises:
        InputError: `output` exists, cannot be created, or does not end in .jsonl.
    """
    if output.suffix != ".jsonl":
        raise InputError(f"output {output} ends in {output.suffix!r}; expected .jsonl, rollouts are written as JSON lines")
    check_new(output)


class GrowingRolloutFile:
    """OUTPUT.partial, which is there from the first rollout on and becomes OUTPUT once it is complete.

    Every rollout is a whole line, handed to the operating system at once: a killed run loses none, a machine that crashes
    those of a few seconds. A line also has a prompt_number, of the prompt it answers; a run that goes on knows by it what is
    left to do, and readers of rollout files ignore it. A second run that would write the same file is refused.

    Attributes:
        partial: where the rollouts are until the file is complete.
        written: how many there are, by prompt number.

    Args:
        output: the file in the end; its name ends in .jsonl.
        header: of the file.

    Raises:
        InputError: as of `check_output`; or the partial file is damaged, was begun with other settings, or is being written.
    """

    def __init__(self, output: Path, header: RolloutHeader):
        check_output(output)
        self.output = output
        self.partial = output.with_name(output.name + ".partial")
        self.written: Counter[int] = Counter()
        self._header = header
        self._synced = time.monotonic()
        self._file = self._locked("r+b") if self.partial.exists() else None
        self._begun = False  # whether this run has written to it
        self._whole = 0 if self._file is None else self._read(self._file)
        if self.written:
            self._refuse_other_settings(_settings(read_rollout_header(self.partial)), _settings(header))

    def append(self, prompt_number: int, rollout: Rollout) -> None:
        """Add a rollout.

        Raises:
            InputError: it cannot be written; what was before it stays.
        """
        with writing(self.partial):
            try:
                self._write(rollout.record | {"prompt_number": prompt_number})
            except OSError:
                if self._begun and not self.written:
                    self.partial.unlink()
                raise
        self.written[prompt_number] += 1

    def complete(self) -> None:
        """Give the file its name."""
        with self._open() as file:
            file.flush()
            os.fsync(file.fileno())
            self.partial.rename(self.output)

    def _write(self, record: dict[str, Any]) -> None:
        file = self._open()
        file.write(json.dumps(record).encode() + b"\n")
        file.flush()
        if time.monotonic() - self._synced > _SECONDS_BETWEEN_SYNCS:
            os.fsync(file.fileno())
            self._synced = time.monotonic()

    def _open(self) -> BinaryIO:
        """The file, with its header at least, to write at its end."""
        if self._file is None:
            self.partial.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._locked("x+b")
        if not self._begun:
            self._begun = True
            self._file.truncate(self._whole if self.written else 0)  # drops a line that was not written to its end
            self._file.seek(0, os.SEEK_END)
            if not self.written:
                self._write(self._header.record)
        return self._file

    def _locked(self, mode: str) -> BinaryIO:
        """The partial file, which no other run may write until this one ends."""
        try:
            file = self.partial.open(mode)
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (FileExistsError, BlockingIOError):
            raise InputError(
                f"{self.partial} is being written by another run; wait for its end, or choose another output"
            ) from None
        except OSError as error:
            raise InputError(f"{self.partial} cannot be opened to be written ({error.strerror})") from error
        return file  # type: ignore[return-value]

    def _read(self, file: BinaryIO) -> int:
        """Count the rollouts that are there; the length of the file's whole lines in bytes."""
        size = 0
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                break
            size += len(line)
            if number == 1:  # the header
                continue
            try:
                self.written[int(json.loads(line)["prompt_number"])] += 1
            except (ValueError, KeyError, TypeError):
                raise InputError(f"{self.partial}:{number} is damaged; remove the file to start anew") from None
        return size

    def _refuse_other_settings(self, found: dict[str, Any], expected: dict[str, Any]) -> None:
        for key in [*expected, *(key for key in found if key not in expected)]:
            if found.get(key) != expected.get(key):
                raise InputError(
                    f"{self.partial} was begun with {key} = {found.get(key)!r}, now it is {expected.get(key)!r}; "
                    "give the settings of then to go on, or remove the file to start anew"
                )


def _settings(header: RolloutHeader) -> dict[str, Any]:
    """The header with its sampling settings beside the rest, so that they are named one by one."""
    settings = asdict(header)
    return settings | settings.pop("sampling")
