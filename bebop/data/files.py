"""Rollout files as they lie on a disk: JSON lines, plain or compressed, or parquet; the ending of the name says which.

In JSON lines the header is the first line, in parquet it is JSON in the schema's metadata; a record is a line or a row.
"""

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from glob import glob
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.compression import available_compressions
from fsspec.implementations.local import LocalFileSystem

from bebop.errors import InputError
from bebop.writing import complete

HEADER_KEY = "bebop_rollouts"  # of the version in a header, and of the whole header in parquet's metadata
_IDS = pa.list_(pa.int32())
_TEXTS = {name: pa.string() for name in ("finish_reason", "source", "conversation")}
_SCHEMA = pa.schema({"prompt_ids": _IDS, "response_ids": _IDS} | _TEXTS)
_BLOCK = 4096  # rows of parquet in memory at once


def find_files(paths: str | Path | Sequence[str | Path]) -> list[Path]:
    """The files that paths and glob patterns (`**` for any depth) stand for, sorted, each once.

    Raises:
        InputError: a path that is no file, or a pattern that matches none.
    """
    found: dict[Path, Path] = {}
    for path in [paths] if isinstance(paths, str | Path) else paths:
        name = os.path.expanduser(path)
        matches = (
            [name] if os.path.isfile(name) else [match for match in glob(name, recursive=True) if os.path.isfile(match)]
        )
        if os.path.isdir(name):
            raise InputError(f"{path} is a directory; give the rollout files in it, as '{path}/*.jsonl'")
        if not matches:
            if os.path.isfile(f"{name}.partial"):
                raise InputError(f"rollout file {path} is not complete yet: the command that began {path}.partial goes on")
            raise InputError(f"rollout file {path} does not exist; write one with recipes/generate_rollouts.py")
        for match in matches:
            found.setdefault(Path(match).resolve(), Path(match))
    return sorted(found.values())


def read_header(path: Path) -> tuple[str, dict[str, Any]]:
    """Where the header of a file stands, and what it says.

    Raises:
        InputError: the file cannot be read or has no header.
    """
    place, text = (f"{path}'s schema", _parquet_header(path)) if _is_parquet(path) else (f"{path}:1", _first_line(path))
    if not text.strip():
        raise InputError(f'{place} is empty; expected a header with "{HEADER_KEY}", and rollouts behind it')
    header = _parse(place, text)
    if HEADER_KEY not in header:
        raise InputError(f'{place}: expected a header with "{HEADER_KEY}", found {text[:60]!r}')
    return place, header


def read_records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Records as they stand in a file, each with its place ("file:line", or "file, row n", the first row being 0).

    Lists of ids from parquet are numpy arrays, which are cheaper to check than lists.

    Raises:
        InputError: a damaged or truncated file.
    """
    if _is_parquet(path):
        yield from _parquet_rows(path)
        return
    for number, line in islice(_lines(path), 1, None):
        if not line.endswith("\n"):
            raise InputError(f"{path}:{number}: the last line has no line end; the file is truncated, write it again")
        yield f"{path}:{number}", _parse(f"{path}:{number}", line)


def write_file(path: Path, header: dict[str, Any], records: Iterable[dict[str, Any]]) -> int:
    """Write a file that appears under its name once it is complete. Returns the number of records.

    Raises:
        InputError: a compression that needs a package which is not there; or the file cannot be written.
    """
    compression = _compression(path)
    text = json.dumps(header)
    with complete(path) as partial:
        if _is_parquet(path):
            return _write_parquet(partial, text, iter(records))
        count = 0
        with LocalFileSystem().open(partial, "wt", encoding="utf-8", compression=compression) as file:
            file.write(text + "\n")
            for record in records:
                file.write(json.dumps(record) + "\n")
                count += 1
    return count


def _is_parquet(path: Path) -> bool:
    return path.suffix == ".parquet"


def _compression(path: Path) -> str | None:
    """fsspec's name of the compression that the ending stands for."""
    names = {".gz": "gzip", ".bz2": "bz2", ".xz": "xz", ".zst": "zstd"}
    compression = names.get(path.suffix)
    if compression not in available_compressions():
        raise InputError(f"{path} needs a package to read or write {path.suffix}; pip install zstandard")
    return compression


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    compression = _compression(path)
    try:
        with LocalFileSystem().open(path, "rt", encoding="utf-8", compression=compression) as file:
            yield from enumerate(file, start=1)
    except UnicodeDecodeError:
        raise InputError(f"{path} is not a text file; expected JSON lines, or a name that ends in .parquet") from None
    except Exception as error:  # every compression has an exception of its own
        if isinstance(error, OSError) and error.strerror:
            raise InputError(f"{path} cannot be read ({error.strerror})") from error
        raise InputError(f"{path} is damaged or truncated ({error}); write it again") from error


def _first_line(path: Path) -> str:
    return next(_lines(path), (1, ""))[1].rstrip("\n")


def _parse(place: str, text: str) -> dict[str, Any]:
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:  # also numbers of thousands of digits, and brackets thousands deep
        raise InputError(f"{place}: not JSON ({getattr(error, 'msg', error)}); the file is damaged or truncated") from None
    if not isinstance(record, dict):
        raise InputError(f"{place}: expected a JSON object, found {text[:40]!r}")
    return record


@contextmanager
def _parquet(path: Path) -> Iterator[pq.ParquetFile]:
    try:
        with pq.ParquetFile(path) as file:
            yield file
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path} is damaged or not parquet ({error}); write it again") from error


def _parquet_header(path: Path) -> str:
    with _parquet(path) as file:
        header = (file.schema_arrow.metadata or {}).get(HEADER_KEY.encode())
    if header is None:
        raise InputError(
            f'{path} has no "{HEADER_KEY}" in its schema\'s metadata; put the header there as JSON, or write the file with '
            "bebop.data.rollouts.write_rollouts"
        )
    return header.decode()


def _parquet_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with _parquet(path) as file:
        schema = file.schema_arrow
        for name in ("prompt_ids", "response_ids"):
            if name not in schema.names:
                raise InputError(f"{path} has no column {name}; its columns are {', '.join(schema.names)}")
            kind = schema.field(name).type
            if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)) or not pa.types.is_integer(kind.value_type):
                raise InputError(f"{path}: column {name} is of type {kind}, expected lists of integers")
        number = 0
        for batch in file.iter_batches(_BLOCK, columns=[name for name in _SCHEMA.names if name in schema.names]):
            columns = {
                name: _arrays(batch[name]) if name.endswith("_ids") else batch[name].to_pylist()
                for name in batch.schema.names
            }
            for values in zip(*columns.values(), strict=True):
                yield f"{path}, row {number}", {k: v for k, v in zip(columns, values, strict=True) if v is not None}
                number += 1


def _arrays(column: pa.ListArray) -> list[Any]:
    """A column of lists as numpy arrays that share its memory, or as plain lists where something is missing."""
    if column.null_count or column.values.null_count:
        return column.to_pylist()
    values, offsets = column.values.to_numpy(), column.offsets.to_pylist()
    return [values[start:end] for start, end in pairwise(offsets)]


def _write_parquet(path: Path, header: str, records: Iterator[dict[str, Any]]) -> int:
    schema = _SCHEMA.with_metadata({HEADER_KEY: header})
    count = 0
    with pq.ParquetWriter(path, schema, compression="zstd") as file:
        while block := list(islice(records, _BLOCK)):
            file.write_batch(pa.RecordBatch.from_pylist(block, schema))
            count += len(block)
    return count
