"""The one error that recipes show as a single line."""


class InputError(ValueError):
    """Something the user gave does not fit: says what was found, what was expected, and what to do."""
