"""Work on the data of the next step while the present one is computed."""

import logging
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

logger = logging.getLogger(__name__)

Item = TypeVar("Item")
Prepared = TypeVar("Prepared")


def prepared_ahead(
    items: Iterable[Item], prepare: Callable[[Item], Prepared], patience: float = 60.0
) -> Generator[Prepared, None, None]:
    """prepare(item) of every item, which a thread works out one item ahead.

    Args:
        items: as many as wanted; the thread takes them too.
        prepare: reads files and makes tensors; no collectives.
        patience: seconds to wait for an item before a warning says that the data stall, and again after as many.
    """
    rest = iter(items)

    def prepare_next() -> list[Prepared]:
        """The next item prepared, or nothing behind the last."""
        return [prepare(item) for item in islice(rest, 1)]

    with ThreadPoolExecutor(1, thread_name_prefix="data") as thread:
        waiting = thread.submit(prepare_next)
        while found := _wait(waiting, patience):
            waiting = thread.submit(prepare_next)
            yield found[0]


def _wait(future: "Future[Prepared]", patience: float) -> Prepared:
    waited = 0.0
    while True:
        try:
            return future.result(timeout=patience)
        except TimeoutError:
            if future.done():  # the work itself ran into a timeout
                raise
            waited += patience
            logger.warning("no data for %.0f s: the next step's batches are not ready; is the file system slow?", waited)
