"""A disk that fills up."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def full_disk(size: int) -> Iterator[None]:
    """No file can become larger: every library that writes fails as on a full disk, behind the first bytes.

    torch.compile writes too, and would keep workers that may not.
    """
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with torch.compiler.set_stance("force_eager"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
