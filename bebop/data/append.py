"""A rollout file that grows line by line, so that a run that was stopped or killed can go on."""

import fcntl
import json
import logging
import os
import time
from collections import Counter
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

from bebop.data.rollouts import Rollout, RolloutHeader, read_rollout_header
from bebop.errors import InputError
from bebop.writing import check_new, replace, writing

logger = logging.getLogger(__name__)

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
    """OUTPUT.partial, which becomes OUTPUT once it is complete.

    Every rollout is a whole line, handed to the operating system at once: a killed run loses none, a machine that crashes
    those of a few seconds. A line also has a prompt_number, of the prompt it answers; a run that goes on knows by it what is
    left to do, and readers of rollout files ignore it. A context manager: behind it no other run is kept from the file, and
    one that got no rollout is gone.

    Attributes:
        partial: where the rollouts are until the file is complete.
        written: how many there are, by prompt number.

    Args:
        output: the file in the end; its name ends in .jsonl.
        header: of the file.

    Raises:
        InputError: as of `check_output`; or the partial file is damaged, was begun with other settings, or another run
            writes it.
    """

    def __init__(self, output: Path, header: RolloutHeader):
        check_output(output)
        self.output = output
        self.partial = output.with_name(output.name + ".partial")
        self.written: Counter[int] = Counter()
        self._header = header
        self._synced = time.monotonic()
        self._begun = False  # whether this run has written to it
        self._file = self._locked()
        try:
            self._whole = self._read()
            if self.written:
                self._refuse_other_settings(_settings(read_rollout_header(self.partial)), _settings(header))
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> "GrowingRolloutFile":
        return self

    def __exit__(self, *error: object) -> None:
        if not self.written:
            self.partial.unlink(missing_ok=True)
        with suppress(OSError):  # what could not be written is no part of `written`
            self._file.close()

    def append(self, prompt_number: int, rollout: Rollout) -> None:
        """Add a rollout.

        Raises:
            InputError: it cannot be written; what was before it stays.
        """
        with writing(self.partial):
            self._begin()
            self._write(rollout.record | {"prompt_number": prompt_number})
        self.written[prompt_number] += 1

    def complete(self) -> None:
        """Give the file its name.

        Raises:
            InputError: another file has that name by now; the partial one stays.
        """
        with writing(self.partial):
            self._begin()
            os.fsync(self._file.fileno())
            if self.output.exists():
                raise InputError(f"{self.output} has appeared meanwhile; move it away and give the same command again")
            replace(self.partial, self.output)

    def _begin(self) -> None:
        """Drop a line that was not written to its end, and write the header unless it is there."""
        if not self._begun:
            self._begun = True
            self._file.truncate(self._whole if self.written else 0)
            self._file.seek(0, os.SEEK_END)
            if not self.written:
                self._write(self._header.record)

    def _write(self, record: dict[str, Any]) -> None:
        self._file.write(json.dumps(record).encode() + b"\n")
        self._file.flush()
        if time.monotonic() - self._synced > _SECONDS_BETWEEN_SYNCS:
            os.fsync(self._file.fileno())
            self._synced = time.monotonic()

    def _locked(self) -> BinaryIO:
        """The partial file, which no other run may write until this one ends."""
        with writing(self.partial):
            self.partial.parent.mkdir(parents=True, exist_ok=True)
            file = os.fdopen(os.open(self.partial, os.O_RDWR | os.O_CREAT, 0o666), "r+b")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                free = os.path.samestat(os.fstat(file.fileno()), self.partial.stat())
            except (BlockingIOError, PermissionError, FileNotFoundError):
                free = False  # another run has it, or has completed it or given it up in between
            except OSError as error:
                logger.warning(
                    "%s cannot be locked (%s): do not write it from two runs at once", self.partial, error.strerror
                )
                free = True
        if not free:
            file.close()
            raise InputError(f"{self.partial} is being written by another run; wait for its end, or choose another output")
        return file

    def _read(self) -> int:
        """Count the rollouts that are there; the length of the file's whole lines in bytes."""
        size = 0
        for number, line in enumerate(self._file, start=1):
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
