"""Files and directories that appear complete, and what is said where they cannot be written."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException

from bebop.errors import InputError


@contextmanager
def complete(path: Path) -> Iterator[Path]:
    """A name to write a file or a directory under, which becomes `path` when the block is done.

    Until then, and if the block fails, `path` is what it was, and nothing is left beside it.

    Args:
        path: replaced if it exists; only a file by a file, and a directory by a directory.

    Raises:
        InputError: as of `writing`.
    """
    partial = path.with_name(path.name + ".writing")
    with writing(path):
        remove(partial)
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield partial
            replace(partial, path)
        finally:
            remove(partial)


def replace(partial: Path, path: Path) -> None:
    """Give a file or directory its name once all of it is on the disk, and put the name on the disk too.

    A directory that has the name makes way at the last moment.
    """
    for written in [partial, *partial.rglob("*")]:
        if not written.is_symlink():
            _sync(written)
    making_way = partial.is_dir() and path.is_dir()
    old = path.with_name(path.name + ".old")
    if making_way:
        remove(old)
        path.rename(old)
    partial.rename(path)
    _sync(path.parent)
    if making_way:
        remove(old)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        if not path.is_dir():  # not every file system has that for directories
            raise
    finally:
        os.close(descriptor)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Name `path` where the system refuses to write.

    Raises:
        InputError: the disk is full, the place cannot be written, or anything else that the system says.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError, CheckpointException) as error:
        # torch.save raises RuntimeError of its own for a file that cannot be written on.
        if isinstance(error, RuntimeError) and "inline_container" not in str(error):
            raise
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(f"{path} cannot be written ({reason}); make room there, or choose another place") from error


def check_new(path: Path) -> None:
    """Refuse an output that is there already, or cannot be created, before any work is done for it.

    Raises:
        InputError: says which of the two.
    """
    if path.exists():
        raise InputError(f"output {path} exists; choose another name or remove it")
    check_parents(path)


def check_parents(path: Path) -> None:
    """Refuse an output in a place that is no directory, or cannot be written.

    Raises:
        InputError: names the place.
    """
    place = next(parent for parent in path.absolute().parents if parent.exists())
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        found = "cannot be written" if place.is_dir() else "is a file"
        raise InputError(f"output {path} cannot be created: {place} {found}; choose another place")


def remove(path: Path) -> None:
    """Remove a file or a directory, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
