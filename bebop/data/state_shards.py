"""Backbone states on disk: shards that are whole or missing, in a directory named by everything they depend on."""

import errno
import hashlib
import json
import logging
import os
import shutil
import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from bebop.backbone import Backbone, checkpoint_shards
from bebop.data.rollouts import Rollout, digest
from bebop.errors import InputError

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
MANIFEST_FILE = "manifest.json"
_BYTES_PER_SHARD = 256 * 2**20
_ABANDONED_AFTER = 24 * 3600.0  # seconds; a file takes seconds to write


def describe(backbone: Backbone, rollouts: Sequence[Rollout], tokens_per_forward: int) -> dict[str, Any]:
    """Everything the states of rollouts depend on, as the manifest says it; equal descriptions mean equal states.

    Reads all weights once, for their checksums.
    """
    directory = backbone.directory
    return {
        "bebop_states": FORMAT_VERSION,
        "model_type": backbone.config.model_type,
        "tap": backbone.family.tap,
        "dtype": str(backbone.lm_head_weight.dtype).removeprefix("torch."),
        "device": backbone.device.type,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "config": _checksum(directory / "config.json"),
        "weights": {path.name: _checksum(path) for path in checkpoint_shards(directory)},
        "rollouts": digest(rollouts),
        "documents": len(rollouts),
        "tokens": sum(map(len, rollouts)),
        "tokens_per_forward": tokens_per_forward,
        "bytes_per_shard": _BYTES_PER_SHARD,
    }


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class StateShards:
    """The shards of one set of rollouts under one backbone.

    A shard is a safetensors file with the states [tokens, d] of the documents of consecutive micro-batches, one after
    another. The JSON file beside it, with the documents and the checksum, is written last: a shard that lacks it was never
    finished. Every file appears by rename, so that runs that write the same shards at the same time do not mix them.

    Attributes:
        directory: a sub-directory of the one given, named by the hash of the description.
        micro_batches: [shard][micro-batch][row][document].

    Args:
        parent: holds the caches of all backbones and rollouts.
        description: of `describe`.
        plan: all micro-batches.
        lengths: of the documents, in tokens.
        token_bytes: that the states of a token take.
    """

    def __init__(
        self,
        parent: Path,
        description: dict[str, Any],
        plan: Sequence[list[list[int]]],
        lengths: Sequence[int],
        token_bytes: int,
    ):
        self._description, self._lengths, self._token_bytes = description, lengths, token_bytes
        self.directory = parent / hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()[:16]
        self.micro_batches: list[list[list[list[int]]]] = []
        filled = 0
        for rows in plan:
            size = sum(lengths[i] for row in rows for i in row) * token_bytes
            if not self.micro_batches or filled + size > _BYTES_PER_SHARD:
                self.micro_batches.append([])
                filled = 0
            self.micro_batches[-1].append(rows)
            filled += size

    def __len__(self) -> int:
        return len(self.micro_batches)

    def path(self, number: int) -> Path:
        return self.directory / f"states-{number:05d}.safetensors"

    def _documents(self, number: int) -> list[int]:
        return [i for rows in self.micro_batches[number] for row in rows for i in row]

    def create(self) -> None:
        """Make the directory with its manifest, unless it is there, and clear away what killed runs left half written.

        Raises:
            InputError: it cannot be written, or its disk is full.
        """
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._unwritable(error) from error
        for partial in self.directory.glob("*.partial"):
            with suppress(OSError):  # another run finished it, or the directory is read only
                if time.time() - partial.stat().st_mtime > _ABANDONED_AFTER:
                    partial.unlink()
        if not self._has_manifest():
            self._write(self.directory / MANIFEST_FILE, (json.dumps(self._description, indent=2) + "\n").encode())

    def check_shared(self) -> None:
        """Look at the directory that another process made.

        Raises:
            InputError: this process does not see it.
        """
        if not self._has_manifest():
            raise self._not_shared(self.directory / MANIFEST_FILE)

    def _has_manifest(self) -> bool:
        try:
            return json.loads((self.directory / MANIFEST_FILE).read_text()) == self._description
        except (OSError, ValueError):
            return False

    def is_whole(self, number: int) -> bool:
        """Whether a shard is what was written, by its checksum; a warning names one that was finished and is not."""
        sidecar = self.path(number).with_suffix(".json")
        if not sidecar.exists():
            return False
        try:
            expected = self._record(number, _checksum(self.path(number)))
            if json.loads(sidecar.read_text()) == expected:
                return True
            found = "is damaged, or of other data"
        except (OSError, ValueError) as error:
            found = f"cannot be read ({error})"
        logger.warning("%s %s; its states are computed anew", self.path(number), found)
        return False

    def _record(self, number: int, checksum: str) -> dict[str, Any]:
        return {"states": self.directory.name, "documents": self._documents(number), "sha256": checksum}

    def check_space(self, missing: Sequence[int]) -> None:
        """Before shards are computed.

        Raises:
            InputError: they do not fit on the disk.
        """
        tokens = sum(self._lengths[i] for number in missing for i in self._documents(number))
        if tokens * self._token_bytes > shutil.disk_usage(self.directory).free:
            raise self._too_full()

    def write(self, number: int, states: Tensor) -> None:
        """Write a shard: the states [tokens, d] of its documents, in their order.

        Raises:
            InputError: the disk is full, or the directory cannot be written.
        """
        content = save({"states": states})
        self._write(self.path(number), content)
        record = self._record(number, hashlib.sha256(content).hexdigest())
        self._write(self.path(number).with_suffix(".json"), json.dumps(record).encode())

    def _write(self, path: Path, content: bytes) -> None:
        partial = path.with_name(f"{path.name}.{socket.gethostname()}-{os.getpid()}.partial")
        try:
            try:
                with partial.open("wb") as file:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())  # on the disk before it gets its name
                partial.rename(path)
            finally:
                partial.unlink(missing_ok=True)
        except OSError as error:
            raise (self._too_full() if error.errno in (errno.ENOSPC, errno.EDQUOT) else self._unwritable(error)) from error

    def map(self) -> list[Tensor]:
        """States [tokens, d] of every document, mapped: they are read from the disk where they are used.

        Raises:
            InputError: a shard is not there, though all were computed.
        """
        states = [torch.empty(0)] * len(self._lengths)
        for number in range(len(self)):
            try:
                with safe_open(self.path(number), framework="pt") as file:
                    whole = file.get_tensor("states")
            except (OSError, SafetensorError) as error:
                raise self._not_shared(self.path(number)) from error
            documents = self._documents(number)
            for i, part in zip(documents, whole.split([self._lengths[i] for i in documents]), strict=True):
                states[i] = part
        return states

    def _too_full(self) -> InputError:
        needed, free = sum(self._lengths) * self._token_bytes, shutil.disk_usage(self.directory).free
        return InputError(
            f"the disk of {self.directory} is too full: these states take {needed:,} bytes in all, {free:,} bytes are free; "
            "make room, and the next run computes what is missing, or set states_directory to another disk"
        )

    def _unwritable(self, error: OSError) -> InputError:
        return InputError(f"{self.directory} cannot be written ({error.strerror}); set states_directory to one that can")

    def _not_shared(self, path: Path) -> InputError:
        return InputError(
            f"{path} is there for one process and not for another; states_directory must lie on a file system that all "
            "processes share"
        )
