"""Rows of data sets: on the hub, in a directory, or in files."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from glob import has_magic
from pathlib import Path
from typing import Any

from datasets import DatasetDict, load_dataset, load_from_disk

from bebop.errors import InputError

_ENDINGS = (".json", ".jsonl", ".parquet", ".gz", ".bz2", ".xz", ".zst")


def read_data_set(
    names: Sequence[str], *, config: str | None = None, split: str = "train", streaming: bool = False
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a data set in its order, each with words that say where it stands.

    Args:
        names: a hub id; or a directory, that `save_to_disk` wrote or with files in it; or JSON, JSON-lines or parquet
            files, or patterns of such.
        config: of a hub data set that has several.
        split: of the data set; files are all in "train".
        streaming: read as the rows are needed, instead of fetching and preparing all first.

    Raises:
        InputError: the data set cannot be read.
    """
    with _refusing(names):
        data_set = _load(names, config, split, streaming)
    return _rows(names, data_set)


def _load(names: Sequence[str], config: str | None, split: str, streaming: bool) -> Any:
    directory = Path(names[0]).expanduser()
    if len(names) == 1 and any((directory / name).exists() for name in ("state.json", "dataset_dict.json")):
        return _saved(directory, config, split)
    for name in names:
        if Path(name).expanduser().is_file() and Path(name).suffix not in _ENDINGS:
            raise InputError(f"data set file {name} ends in {Path(name).suffix!r}; expected one of {', '.join(_ENDINGS)}")
    if len(names) == 1 and not has_magic(names[0]) and Path(names[0]).suffix not in _ENDINGS:
        return load_dataset(str(Path(names[0]).expanduser()), config, split=split, streaming=streaming)
    builders = {"parquet" if name.endswith(".parquet") else "json" for name in names}
    if len(builders) > 1:
        raise InputError(f"{' '.join(names)} are of several formats; give JSON files or parquet files")
    if missing := [name for name in names if not has_magic(name) and not Path(name).expanduser().is_file()]:
        raise InputError(
            f"data set file {missing[0]} does not exist; expected a hub id, a directory, or JSON or parquet files"
        )
    files = [str(Path(name).expanduser()) for name in names]
    return load_dataset(builders.pop(), data_files=files, split=split, streaming=streaming)


def _saved(directory: Path, config: str | None, split: str) -> Any:
    """What save_to_disk wrote: splits by name, or one, which may have a name too."""
    if config is not None:
        raise InputError(f"data set {directory} was saved to disk without configurations; leave out {config!r}")
    found = load_from_disk(directory)
    splits = found if isinstance(found, DatasetDict) else {str(found.split or "train"): found}
    if split not in splits:
        raise InputError(f"data set {directory} has no split {split!r}; its splits are {', '.join(splits)}")
    return splits[split]


def _rows(names: Sequence[str], data_set: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    rows = iter(data_set)
    number = 0
    while True:
        with _refusing(names):
            if (row := next(rows, None)) is None:
                return
        yield f"{' '.join(names)}, row {number}", row
        number += 1


@contextmanager
def _refusing(names: Sequence[str]) -> Iterator[None]:
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # datasets raises many kinds, those of the formats' readers among them
        cause = error.__cause__ or error  # what the reader of the format said
        reason = str(cause).strip().partition("\n")[0] or type(cause).__name__
        raise InputError(
            f"data set {' '.join(names)} cannot be read ({reason}); expected a hub id, a directory, or JSON or parquet files"
        ) from error


def without_none(value: Any) -> Any:
    """Without the keys that only other rows have, which columns of records hold as None: templates ask if they are there."""
    if isinstance(value, dict):
        return {key: without_none(item) for key, item in value.items() if item is not None}
    return [without_none(item) for item in value] if isinstance(value, list) else value
