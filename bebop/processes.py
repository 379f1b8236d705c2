"""What the processes of a run tell each other beside tensors."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from bebop.errors import InputError

Found = TypeVar("Found")


def from_first(find: Callable[[], Found]) -> Found:
    """What process 0 finds, on every process; all must call.

    Raises:
        InputError: what `find` raised on process 0, on every process.
        RuntimeError: on the others, where it raised something else.
    """
    if not dist.is_initialized():
        return find()
    found: list[Any] = [None, None]
    failed: Exception | None = None
    if dist.get_rank() == 0:
        try:
            found[0] = find()
        except Exception as error:  # the others would wait for it for ever
            failed = error
            found[1] = error if isinstance(error, InputError) else RuntimeError(f"process 0 failed: {error!r}")
    dist.broadcast_object_list(found)
    if found[1] is not None:
        raise failed or found[1]
    return found[0]


def gathered(value: Found) -> list[Found]:
    """The values of all processes, which all must call; by process."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
