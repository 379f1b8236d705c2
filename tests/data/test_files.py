import bz2
import gzip
import json
import lzma

import fsspec.compression
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bebop.data.rollouts import Rollout, RolloutHeader, read_rollouts, write_rollouts
from bebop.errors import InputError

HEADER = RolloutHeader(model="m", tokenizer_hash="abc", vocab_size=50, temperature=0.7, sampling={"seed": 1})
ROLLOUTS = [Rollout([1, 2], [3, 4, 2]), Rollout([1], [9] * 5, "length", "math")]
NAMES = ("r.jsonl", "r.jsonl.gz", "r.jsonl.bz2", "r.jsonl.xz", "r.jsonl.zst", "r.parquet")


@pytest.mark.parametrize("name", NAMES)
def test_round_trip(name, tmp_path):
    path = tmp_path / "new" / name
    assert write_rollouts(path, HEADER, iter(ROLLOUTS)) == 2
    assert read_rollouts(path) == (HEADER, ROLLOUTS)
    assert [p.name for p in path.parent.iterdir()] == [name]


@pytest.mark.parametrize("name", NAMES)
def test_file_appears_only_when_complete(name, tmp_path):
    def breaks_off():
        yield ROLLOUTS[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_rollouts(tmp_path / name, HEADER, breaks_off())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("name", "module"), [("r.gz", gzip), ("r.bz2", bz2), ("r.xz", lzma)])
def test_compressed_files_are_what_their_name_says(name, module, tmp_path):
    write_rollouts(tmp_path / name, HEADER, ROLLOUTS)
    with module.open(tmp_path / name, "rt") as file:
        assert json.loads(file.readline())["tokenizer_hash"] == "abc"
        assert json.loads(file.readline()) == ROLLOUTS[0].record


@pytest.mark.parametrize("name", NAMES[1:])
def test_truncated_and_foreign_files_are_refused(name, tmp_path):
    path = tmp_path / name
    write_rollouts(path, HEADER, [Rollout([i % 50], [i % 7, i % 11]) for i in range(5000)])
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"r\.\w+.*(damaged|truncated)"):
        read_rollouts(path)
    path.write_bytes(b'{"bebop_rollouts": 1}\n')
    with pytest.raises(InputError, match=r"r\.\w+.* is damaged"):
        read_rollouts(path)


def test_zst_without_its_package_is_refused(tmp_path, monkeypatch):
    monkeypatch.delitem(fsspec.compression.compr, "zstd")
    with pytest.raises(InputError, match="pip install zstandard"):
        write_rollouts(tmp_path / "r.jsonl.zst", HEADER, ROLLOUTS)
    assert list(tmp_path.iterdir()) == []


def write_parquet(path, columns, header=HEADER):
    metadata = {"bebop_rollouts": json.dumps({"bebop_rollouts": 1} | vars(header))} if header else {}
    table = pa.table(columns)
    pq.write_table(table.replace_schema_metadata(metadata), path)


@pytest.mark.parametrize("kind", [pa.list_(pa.int64()), pa.large_list(pa.uint16())])
def test_parquet_of_other_writers(kind, tmp_path):
    """Wider or narrower integers, columns of their own, in another order, and no finish_reason, or none for a row."""
    ids = {"response_ids": pa.array([[3, 4, 2], [9]], kind), "reward": [1.0, 0.0], "prompt_ids": pa.array([[1], [2]], kind)}
    write_parquet(tmp_path / "r.parquet", ids)
    assert read_rollouts(tmp_path / "r.parquet")[1] == [Rollout([1], [3, 4, 2]), Rollout([2], [9])]
    write_parquet(
        tmp_path / "r.parquet", ids | {"finish_reason": [None, "length"], "source": pa.array(["a", "b"]).dictionary_encode()}
    )
    assert read_rollouts(tmp_path / "r.parquet")[1] == [
        Rollout([1], [3, 4, 2], source="a"),
        Rollout([2], [9], "length", "b"),
    ]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"prompt_ids": [[1]]}, "has no column response_ids; its columns are prompt_ids"),
        ({"prompt_ids": [[1]], "response_ids": ["2"]}, "column response_ids is of type string, expected lists of integers"),
        ({"prompt_ids": [[1]], "response_ids": [[2.0]]}, "expected lists of integers"),
        ({"prompt_ids": [[1], [1]], "response_ids": [[2], []]}, "row 1: response_ids is empty"),
        ({"prompt_ids": [[1], [1]], "response_ids": [[2], None]}, "row 1: response_ids is missing"),
        ({"prompt_ids": [[1], [1]], "response_ids": [[2], [2, None]]}, "row 1: response_ids has an id"),
        (
            {"prompt_ids": [[1], [50]], "response_ids": [[2], [2]]},
            "row 1: prompt_ids has an id that is no integer from 0 to 49",
        ),
        ({"prompt_ids": [[1]], "response_ids": [[2]], "source": [3]}, "row 0: source is 3, expected a string"),
    ],
)
def test_damaged_parquet_is_refused_with_the_row(columns, message, tmp_path):
    write_parquet(tmp_path / "r.parquet", columns)
    with pytest.raises(InputError, match=message):
        read_rollouts(tmp_path / "r.parquet")


def test_rows_are_counted_over_blocks(tmp_path):
    rows = 10_000
    write_parquet(tmp_path / "r.parquet", {"prompt_ids": [[1]] * rows, "response_ids": [[2]] * (rows - 1) + [[99]]})
    with pytest.raises(InputError, match="row 9999: response_ids"):
        read_rollouts(tmp_path / "r.parquet")


def test_parquet_without_a_header_is_refused(tmp_path):
    write_parquet(tmp_path / "r.parquet", {"prompt_ids": [[1]], "response_ids": [[2]]}, header=None)
    with pytest.raises(InputError, match='no "bebop_rollouts" in its schema\'s metadata'):
        read_rollouts(tmp_path / "r.parquet")
