import json
from collections import Counter

import pytest

from bebop.data.prompts import Prompt, prompts_hash, read_prompts, unanswered
from bebop.errors import InputError
from tests.rollouts import CHAT_TEMPLATE, make_tokenizer

USER, ASSISTANT, END = 128, 129, 130


def read(path, tokenizer=None, **options):
    return read_prompts(
        str(path), tokenizer or make_tokenizer(CHAT_TEMPLATE), **{"vocab_size": 131, "max_tokens": 20} | options
    )


def lines(path, *records):
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in records) + "\n")
    return path


def message(role, content):
    return {"role": role, "content": content}


def test_json_lines(tmp_path):
    """Ids as they are, messages without the assistant's last words, text as a user's turn."""
    path = lines(
        tmp_path / "p.jsonl",
        {"prompt_ids": [3, 4], "source": "math"},
        "",
        {"messages": [message("user", "w5"), message("assistant", "w6")]},
        {"messages": [message("user", "w5"), message("assistant", "w6"), message("user", "w7")]},
        {"prompt": "w8 w9"},
        {"prompt": [message("user", "w8 w9")]},
    )
    prompts, left_out = read(path)
    assert left_out == 0
    turn = [USER, 8, 9, END, ASSISTANT]
    assert prompts == [
        Prompt(0, [3, 4], "math"),
        Prompt(1, [USER, 5, END, ASSISTANT]),
        Prompt(2, [USER, 5, END, ASSISTANT, 6, END, USER, 7, END, ASSISTANT]),
        Prompt(3, turn),
        Prompt(4, turn),
    ]
    assert read(path, most=2)[0] == prompts[:2]


def test_text_file(tmp_path):
    path = tmp_path / "p.txt"
    path.write_text("w1 w2\n\n  w3\n")
    assert read(path)[0] == [Prompt(0, [USER, 1, 2, END, ASSISTANT]), Prompt(1, [USER, 3, END, ASSISTANT])]


def test_data_set_directory(tmp_path):
    (tmp_path / "set").mkdir()
    lines(tmp_path / "set" / "train.jsonl", {"question": "w1", "source": "a"}, {"question": "w2", "source": None})
    lines(tmp_path / "set" / "test.jsonl", {"question": "w3", "source": "b"})
    prompts, _ = read(tmp_path / "set", column="question")
    assert prompts == [Prompt(0, [USER, 1, END, ASSISTANT], "a"), Prompt(1, [USER, 2, END, ASSISTANT])]
    assert read(f"{tmp_path}/set:test", column="question")[0][0].source == "b"
    with pytest.raises(InputError, match="row 0: no prompt_ids or messages or prompt, only question, source; name the col"):
        read(tmp_path / "set")
    with pytest.raises(InputError, match=r"cannot be read \(Bad split: other"):
        read(f"{tmp_path}/set:other", column="question")


def test_long_prompts_are_left_out_and_keep_the_numbers_of_the_others(tmp_path):
    path = lines(tmp_path / "p.jsonl", {"prompt_ids": [1] * 5}, {"prompt_ids": [1] * 6}, {"prompt_ids": [2]})
    assert read(path, max_tokens=5) == ([Prompt(0, [1] * 5), Prompt(2, [2])], 1)
    with pytest.raises(InputError, match=r"no prompt of 0 tokens or less \(3 are longer\)"):
        read(path, max_tokens=0)


@pytest.mark.parametrize(
    ("record", "text"),
    [
        ("nonsense", r":2: not JSON"),
        ("[1]", r":2: expected a JSON object"),
        ({"text": "w1"}, r":2: no prompt_ids or messages or prompt, only text"),
        ({"prompt_ids": [1, 131]}, r":2: the prompt has an id that is not from 0 to 130"),
        ({"prompt_ids": [True]}, r":2: the prompt is no list of token ids"),
        ({"prompt": []}, r":2: the prompt is '\[\]', expected"),
        ({"prompt": 3}, r":2: the prompt is '3', expected"),
        ({"messages": [{"from": "human", "value": "w1"}]}, r":2: .* messages with \"role\" and \"content\""),
        ({"messages": [message("assistant", "w1")]}, r":2: no message but the assistant's"),
        ({"prompt": "w1", "source": 3}, r":2: source is 3"),
    ],
)
def test_records_that_are_no_prompts_are_refused_with_their_line(record, text, tmp_path):
    path = lines(tmp_path / "p.jsonl", {"prompt_ids": [1]}, record)
    with pytest.raises(InputError, match=text):
        read(path)


def test_templates_that_fail_are_reported(tmp_path):
    path = lines(tmp_path / "p.jsonl", {"prompt": "w1"})
    with pytest.raises(InputError, match="no chat template to render messages with; give prompt_ids"):
        read(path, make_tokenizer())
    with pytest.raises(InputError, match=r":1: the chat template does not take the messages \(no users\)"):
        read(path, make_tokenizer("{{ raise_exception('no users') }}"))


def test_files_that_are_not_there_or_of_another_kind_are_refused(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        read(tmp_path / "p.jsonl")
    (tmp_path / "p.csv").touch()
    with pytest.raises(InputError, match=r"ends in '.csv'; expected one of .json, "):
        read(tmp_path / "p.csv")
    (tmp_path / "p.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="not UTF-8"):
        read(tmp_path / "p.txt")


def test_hash_tells_prompts_apart():
    prompts = [Prompt(0, [1, 2]), Prompt(1, [3])]
    others = [prompts[::-1], prompts[:1], [Prompt(0, [1, 3]), prompts[1]], [Prompt(0, [1, 2], "math"), prompts[1]]]
    assert len({prompts_hash(p) for p in [prompts, *others]}) == 5


def test_unanswered_counts_every_prompt():
    prompts = [Prompt(number, [1]) for number in (4, 4, 7, 4, 7)]
    assert unanswered(prompts, Counter({4: 2, 7: 1})) == [False, False, False, True, True]
