"""What the user gave does not fit, or cannot be written: one error, which recipes show as one line."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager


class InputError(ValueError):
    """Something the user gave does not fit: says what was found, what was expected, and what to do."""


@contextmanager
def errors_as_one_line() -> Iterator[None]:
    """End the program with "error: ..." and exit code 1 where something does not fit, or the system refuses a file; with 130
    where it is interrupted.

    Other exceptions are faults of the program, and keep their traceback.
    """
    try:
        yield
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except (InputError, OSError) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")  # libraries' own messages, quoted in it, may have several lines
