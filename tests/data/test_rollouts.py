import json
from dataclasses import replace

import pytest

from bebop.data.rollouts import (
    Rollout,
    RolloutHeader,
    check_rollouts_of,
    read_rollouts,
    split_held_out,
    tokenizer_hash,
    write_rollouts,
)
from bebop.errors import InputError
from tests.rollouts import make_tokenizer
from tests.tiny_models import make_checkpoint

HEADER = RolloutHeader(model="m", tokenizer_hash="abc", vocab_size=50, temperature=0.7, sampling={"seed": 1})
ROLLOUTS = [Rollout([1, 2], [3, 4, 2]), Rollout([1], [9] * 5, "length")]


def _record(**changes):
    return json.dumps({"prompt_ids": [1], "response_ids": [2]} | changes)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["nonsense"], r":1: not JSON"),
        ([_record()], r":1: expected a header"),
        (["HEADER"], "has a header but no rollouts"),
        (["HEADER", _record(), '{"prompt_ids": [1], "respo'], r":3: .*truncated"),
        (["HEADER", _record(response_ids=[])], r":2: response_ids is empty"),
        (["HEADER", '{"prompt_ids": [1]}'], r":2: response_ids is missing"),
        (["HEADER", _record(prompt_ids=[50])], r":2: prompt_ids has an id that is no integer from 0 to 49"),
        (["HEADER", _record(response_ids=["a"])], r":2: response_ids has an id"),
        (["HEADER", _record(response_ids=[1, True])], r":2: response_ids has an id"),
        (["HEADER", _record(response_ids=[1.0])], r":2: response_ids has an id"),
        (["HEADER", _record(response_ids=[-1])], r":2: response_ids has an id"),
        (["HEADER", _record(response_ids=[2**70])], r":2: response_ids has an id"),
        (["HEADER", _record(response_ids="12")], r":2: response_ids is '12'; expected a list"),
        ([json.dumps({"bebop_rollouts": 1, **vars(HEADER)} | {"vocab_size": "50"}), _record()], r":1: vocab_size is '50'"),
        (["HEADER", "[1, 2]"], r":2: expected a JSON object"),
        (["HEADER", _record(source=3)], r":2: source is 3, expected a string"),
        (['{"bebop_rollouts": 1, "model": "m"}', _record()], r":1: the header does not fit"),
    ],
)
def test_damaged_files_are_refused_with_the_line(lines, message, tmp_path):
    path = tmp_path / "rollouts.jsonl"
    write_rollouts(path, HEADER, [])
    header = path.read_text().strip()
    text = "\n".join(header if line == "HEADER" else line for line in lines)
    path.write_text(text if text.endswith("respo") else text + "\n")
    with pytest.raises(InputError, match=message):
        read_rollouts(path)


def test_missing_file_is_refused(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        read_rollouts(tmp_path / "nothing.jsonl")


def test_rollouts_of_another_model_are_refused(tmp_path):
    model = make_checkpoint(tmp_path / "model", "qwen2")  # a vocabulary of 131, 256 tokens at most
    make_tokenizer().save_pretrained(model)
    own = RolloutHeader("m", tokenizer_hash(make_tokenizer()), 131, 0.7)
    for name in ("a", "b"):
        write_rollouts(tmp_path / f"{name}.jsonl", own, ROLLOUTS[:1] if name == "a" else ROLLOUTS)
    header, rollouts = read_rollouts(tmp_path / "*.jsonl")
    check_rollouts_of(model, "both", header, rollouts)
    with pytest.raises(InputError, match=r"b.jsonl:3: 6 tokens, longer than the 5 .*1 of 3 rollouts"):
        check_rollouts_of(model, "both", header, rollouts, max_length=5)
    with pytest.raises(InputError, match="longer than the 256"):
        check_rollouts_of(model, "both", header, [Rollout([1] * 250, [2] * 7)], max_length=1000)
    header.vocab_size = 150
    with pytest.raises(InputError, match="both was sampled with a vocabulary of 150, the backbone has 131"):
        check_rollouts_of(model, "both", header, rollouts)
    header.vocab_size, header.tokenizer_hash = 131, "abc"
    with pytest.raises(InputError, match="both was written with another tokenizer"):
        check_rollouts_of(model, "both", header, rollouts)


def test_several_files_are_read_in_order_and_once(tmp_path):
    for i, name in enumerate(("c.parquet", "a.jsonl", "deep/b.jsonl.gz")):
        write_rollouts(tmp_path / name, HEADER, [Rollout([i], [i])])
    paths = [tmp_path / "c.parquet", str(tmp_path / "**" / "*.jsonl*"), tmp_path / "deep" / ".." / "a.jsonl"]
    header, rollouts = read_rollouts(paths)
    assert header == HEADER
    assert [r.prompt_ids for r in rollouts] == [[1], [0], [2]]
    assert [r.place.removeprefix(f"{tmp_path}/") for r in rollouts] == ["a.jsonl:2", "c.parquet, row 0", "deep/b.jsonl.gz:2"]


def test_a_pattern_without_a_file_is_refused(tmp_path):
    write_rollouts(tmp_path / "a.jsonl", HEADER, ROLLOUTS)
    with pytest.raises(InputError, match=r"rollout file .*\*.parquet does not exist"):
        read_rollouts([tmp_path / "a.jsonl", tmp_path / "*.parquet"])


@pytest.mark.parametrize(("key", "value"), [("tokenizer_hash", "other"), ("vocab_size", 51), ("temperature", 1.0)])
def test_files_that_do_not_agree_are_refused(key, value, tmp_path):
    write_rollouts(tmp_path / "a.jsonl", HEADER, ROLLOUTS)
    write_rollouts(tmp_path / "b.parquet", replace(HEADER, **{key: value}), ROLLOUTS)
    with pytest.raises(InputError, match=rf"b.parquet has {key} '?{value}'? where .*a.jsonl has '?{getattr(HEADER, key)}'?"):
        read_rollouts(tmp_path / "*")


def test_one_object_for_each_id(tmp_path):
    """What keeps a million rollouts in memory."""
    header = replace(HEADER, vocab_size=100_000)
    for name in ("a.jsonl", "a.parquet"):
        write_rollouts(tmp_path / name, header, [Rollout([1], [99_999] * 3), Rollout([99_999], [2])])
        first, second = read_rollouts(tmp_path / name)[1]
        assert all(i is second.prompt_ids[0] for i in first.response_ids)
        assert type(second.prompt_ids[0]) is int


def test_held_out_side_depends_on_the_text_alone():
    rollouts = [Rollout([i], [i, i + 1]) for i in range(1000)]
    train, held_out = split_held_out(rollouts, 0.2)
    assert len(train) + len(held_out) == 1000
    assert 150 < len(held_out) < 250
    again = split_held_out([*rollouts[::-1], Rollout([5000], [1])], 0.2)[1]
    assert {r.key for r in held_out} <= {r.key for r in again}
    assert split_held_out(rollouts, 0.0)[1] == []
