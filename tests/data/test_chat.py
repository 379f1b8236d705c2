"""Templates as models have them, rendered turn by turn."""

import json
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, PreTrainedTokenizerFast

from bebop.data.chat import ChatConverter, closing_tokens
from bebop.data.conversations import Conversation, read_conversations
from bebop.data.rollouts import Rollout, read_rollouts, tokenizer_hash
from bebop.errors import InputError
from recipes.convert_chats import main
from tests.tiny_models import make_checkpoint

CHATML = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou help.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As Qwen3's: answers before the last question lose their reasoning, and the last one has it even if it is empty.
REASONING = """
{%- set ns = namespace(last=-1) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- if tools %}{{ '<|im_start|>system\\n' }}{% for t in tools %}{{ t | tojson }}{% endfor %}{{ '<|im_end|>\\n' }}{% endif %}
{%- for m in messages %}
    {%- set content = m.content if m.content is string else '' %}
    {%- if m.role == 'assistant' %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if loop.index0 > ns.last %}{{- '<think>\\n' + (m.reasoning_content or '') + '\\n</think>\\n\\n' }}{% endif %}
        {{- content }}
        {%- if 'tool_calls' in m %}{% for c in m.tool_calls %}{{ '<call>' + (c.function | tojson) }}{% endfor %}{% endif %}
        {{- '<|im_end|>\\n' }}
    {%- else %}{{- '<|im_start|>' + m.role + '\\n' + content + '<|im_end|>\\n' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
LLAMA_3 = (
    "{{ '<|begin_of_text|>' }}{% for m in messages %}"
    "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>",
    "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
)  # fmt: skip
TALK = [
    {"role": "user", "content": "What is two and two?"},
    {"role": "assistant", "content": "It is four."},
    {"role": "user", "content": "And three?"},
    {"role": "assistant", "content": "Then it is seven.\nMore?"},
]


def make_tokenizer(template: str | None) -> PreTrainedTokenizerFast:
    """Byte-level BPE over a few words, split as Qwen and Llama 3 do: line ends that follow each other are a token."""
    core = Tokenizer(models.BPE())
    words = Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(words, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    core.decoder = decoders.ByteLevel()
    texts = [m["content"] for m in TALK] * 10 + ["user", "assistant", "think\n\nA\n\n"] * 10
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|endoftext|>")
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL[1:])})
    tokenizer.chat_template = template
    return tokenizer


def make_converter(template: str, end: str, max_length: int = 200) -> tuple[PreTrainedTokenizerFast, ChatConverter]:
    tokenizer = make_tokenizer(template)
    return tokenizer, ChatConverter(tokenizer, {tokenizer.convert_tokens_to_ids(end)}, max_length)


def texts(template: str, end: str, messages: list[dict], **conversation) -> list[tuple[str, str]]:
    tokenizer, converter = make_converter(template, end)
    rollouts = list(converter.convert([Conversation(messages, **conversation)]))
    assert {r.finish_reason for r in rollouts} == {"stop"}
    return [(tokenizer.decode(r.prompt_ids), tokenizer.decode(r.response_ids)) for r in rollouts]


def test_chatml():
    """A rollout a turn; the line end behind <|im_end|> is the template's, not the model's."""
    opening = (
        "<|im_start|>system\nYou help.<|im_end|>\n<|im_start|>user\nWhat is two and two?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert texts(CHATML, "<|im_end|>", TALK) == [
        (opening, "It is four.<|im_end|>"),
        (
            opening + "It is four.<|im_end|>\n<|im_start|>user\nAnd three?<|im_end|>\n<|im_start|>assistant\n",
            "Then it is seven.\nMore?<|im_end|>",
        ),
    ]


def test_reasoning_stands_in_its_own_turn_only():
    """The first answer is trained with its reasoning, but is context of the second without, as in an engine."""
    talk = [dict(m) for m in TALK]
    talk[1]["reasoning_content"] = "two plus two"
    (_, first), (prompt, second) = texts(REASONING, "<|im_end|>", talk)
    assert first == "<think>\ntwo plus two\n</think>\n\nIt is four.<|im_end|>"
    assert "two plus two" not in prompt
    assert "It is four.<|im_end|>" in prompt
    assert second == "<think>\n\n</think>\n\nThen it is seven.\nMore?<|im_end|>"


def test_llama_3():
    (first, answer), (second, _) = texts(LLAMA_3, "<|eot_id|>", TALK)
    assert first.startswith("<|begin_of_text|><|start_header_id|>user")
    assert first.count("<|begin_of_text|>") == second.count("<|begin_of_text|>") == 1
    assert answer == "It is four.<|eot_id|>"


def test_the_last_turn_is_what_generation_markers_say():
    """transformers masks by {% generation %} and character offsets: another implementation."""
    tokenizer, converter = make_converter(MARKED, "<|im_end|>")
    last = list(converter.convert([Conversation(TALK)]))[-1]
    masked = tokenizer.apply_chat_template(TALK, return_dict=True, return_assistant_tokens_mask=True)
    supervised = masked["assistant_masks"]
    start = len(supervised) - supervised[::-1].index(1) - len(last.response_ids)  # of the last run of ones
    assert supervised[start - 1] == 0
    assert all(supervised[start : start + len(last.response_ids)])
    assert masked["input_ids"][:start] == last.prompt_ids
    assert masked["input_ids"][start : start + len(last.response_ids)] == last.response_ids


def test_tools_and_calls_go_to_the_template():
    call = {"function": {"name": "add", "arguments": {"a": 2}}}
    messages = [TALK[0], {"role": "assistant", "tool_calls": [call]}, {"role": "tool", "content": "4"}, TALK[1]]
    first, second = texts(REASONING, "<|im_end|>", messages, tools=[{"name": "add"}])
    assert '{"name": "add"}' in first[0]
    assert first[1].endswith('<call>{"name": "add", "arguments": {"a": 2}}<|im_end|>')
    assert "<|im_start|>tool\n4<|im_end|>" in second[0]


def test_an_answer_ends_at_its_first_end_token():
    """An engine stops there, whatever the text goes on with."""
    talk = [TALK[0], {"role": "assistant", "content": "Yes.<|im_end|>\nNo."}]
    assert texts(CHATML, "<|im_end|>", talk)[0][1] == "Yes.<|im_end|>"


def test_long_turns_are_left_out_and_counted():
    tokenizer, converter = make_converter(CHATML, "<|im_end|>")
    both = list(converter.convert([Conversation(TALK)]))
    converter = ChatConverter(tokenizer, converter.ends, len(both[1]) - 1)
    assert list(converter.convert([Conversation(TALK)])) == both[:1]
    assert (converter.turns, converter.too_long) == (2, 1)
    converter = ChatConverter(tokenizer, converter.ends, len(both[0]) - 1)
    with pytest.raises(InputError, match=r"none of 2 turns .* 2 are longer than"):
        list(converter.convert([Conversation(TALK)]))


def test_unfit_conversations_are_left_out_if_that_is_asked_for(tmp_path):
    tokenizer, converter = make_converter(CHATML, "<|im_end|>")
    bad = [Conversation(TALK[1:], place="chats, row 4"), Conversation(TALK[:1], place="chats, row 5")]
    with pytest.raises(InputError, match=r"chats, row 4 begins with an assistant's message; leave it out \(skip_unfit"):
        list(converter.convert([Conversation(TALK), *bad]))
    converter = ChatConverter(tokenizer, converter.ends, 4096, skip_unfit=True)
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": []}) + "\n")
    bad += read_conversations([str(tmp_path / "chats.jsonl")])
    half = Conversation([*TALK[:2], TALK[0], {"role": "assistant", "content": ""}], place="chats, row 6")
    assert len(list(converter.convert([bad[0], Conversation(TALK), *bad[1:], half]))) == 2
    assert converter.turns == 2, "of the good one"
    assert (converter.unfit, converter.reason) == (4, "chats, row 4 begins with an assistant's message; leave it out")
    converter = ChatConverter(tokenizer, converter.ends, 4096, skip_unfit=True)
    with pytest.raises(InputError, match=r"none of 0 turns .* 3 conversations do not fit \(chats, row 4 begins"):
        list(converter.convert(bad))


@pytest.mark.parametrize("streaming", [False, True])
def test_data_sets_that_were_saved_to_disk(streaming, tmp_path):
    """One split, or several by name."""
    rows = Dataset.from_list([{"messages": TALK[:2]}] * 3)
    rows.save_to_disk(tmp_path / "one")
    DatasetDict({"train": rows, "test": rows.select([0])}).save_to_disk(tmp_path / "several")
    Dataset.from_list([{"messages": TALK[:2]}] * 3, split="test").save_to_disk(tmp_path / "named")
    for name, split, expected in (
        ("one", "train", 3), ("named", "test", 3), ("several", "train", 3), ("several", "test", 1)
    ):  # fmt: skip
        found = list(read_conversations([str(tmp_path / name)], split=split, streaming=streaming))
        assert [c.messages for c in found] == [TALK[:2]] * expected
    with pytest.raises(InputError, match="has no split 'dev'; its splits are train, test"):
        read_conversations([str(tmp_path / "several")], split="dev")
    with pytest.raises(InputError, match="has no split 'train'; its splits are test"):
        read_conversations([str(tmp_path / "named")])
    with pytest.raises(InputError, match="without configurations; leave out 'main'"):
        read_conversations([str(tmp_path / "one")], config="main")


def test_count_ends_the_conversion():
    _, converter = make_converter(CHATML, "<|im_end|>")
    assert len(list(converter.convert([Conversation(TALK)] * 5, count=3))) == 3


def test_turns_with_a_token_across_the_seam_are_skipped_or_refused():
    """The prompt's last line end joins the answer's first one: a context that no engine has."""
    joined = [TALK[0], {"role": "assistant", "content": "\nIt is four."}]
    _, converter = make_converter(CHATML, "<|im_end|>")
    rollouts = list(converter.convert([Conversation(TALK)] * 100 + [Conversation(joined)]))
    assert len(rollouts) == 200
    assert (converter.turns, converter.merged) == (201, 1)
    with pytest.raises(InputError, match="in 1 of 3 turns the tokenizer joins"):
        list(make_converter(CHATML, "<|im_end|>")[1].convert([Conversation(TALK), Conversation(joined)]))
    endless = iter(lambda: Conversation(joined), None)
    with pytest.raises(InputError, match="in 11 of 11 turns the tokenizer joins"):
        list(make_converter(CHATML, "<|im_end|>")[1].convert(endless))


@pytest.mark.parametrize(
    ("template", "messages", "message"),
    [
        (CHATML, [TALK[0]], "set, row 7 has no assistant's message"),
        (CHATML, TALK[1:], "set, row 7 begins with an assistant's message"),
        (CHATML, [TALK[0], {"role": "assistant", "content": ""}], "row 7: message 1, the assistant's, is empty"),
        ("{% if messages[1:] %}Yes.<|im_end|>{% endif %}", TALK[:2], "row 7: the prompt of message 1 is empty"),
        ("{{ messages | length }}<|im_end|>", TALK[:2], "row 7: with message 1 the chat template does not go on"),
        ("{% for m in messages %}{{ m.content }}\n{% endfor %}", TALK[:2], "message 1, the assistant's, is not closed"),
        ("{{ raise_exception('roles must alternate') }}", TALK, r"row 7: .*first 1 messages \(roles must alternate\)"),
    ],
)
def test_what_gives_no_rollout_is_refused_by_name(template, messages, message):
    _, converter = make_converter(template, "<|im_end|>")
    with pytest.raises(InputError, match=message):
        list(converter.convert([Conversation(messages, place="set, row 7")]))


@pytest.mark.parametrize(
    ("template", "generation", "expected"),
    [
        (CHATML, None, {"<|im_end|>", "<|endoftext|>"}),  # the model's own end token is in config.json
        (LLAMA_3, ["<|endoftext|>", "<|im_end|>"], {"<|eot_id|>", "<|endoftext|>", "<|im_end|>"}),
    ],
)
def test_closing_tokens_are_the_templates_and_the_models(template, generation, expected, tmp_path):
    tokenizer = make_tokenizer(template)
    model = make_checkpoint(tmp_path / "model", "qwen2", vocab_size=600, eos_token_id=tokenizer.eos_token_id)
    (model / "generation_config.json").unlink(missing_ok=True)
    if generation:
        GenerationConfig(eos_token_id=tokenizer.convert_tokens_to_ids(generation)).save_pretrained(model)
    assert set(tokenizer.convert_ids_to_tokens(sorted(closing_tokens(model, tokenizer)))) == expected


@pytest.mark.parametrize(
    ("template", "message"),
    [(None, "no chat template"), ("{% for m in messages %}{{ m.content }}\n\n{% endfor %}", "no special token to end it")],
)
def test_templates_that_do_not_end_answers_are_refused(template, message, tmp_path):
    with pytest.raises(InputError, match=message):
        closing_tokens(make_checkpoint(tmp_path / "model", "qwen2"), make_tokenizer(template))


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    directory = make_checkpoint(tmp_path_factory.mktemp("chat") / "model", "qwen2", vocab_size=600)
    make_tokenizer(REASONING).save_pretrained(directory)
    return directory


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))


def rows() -> list[dict]:
    """Conversations of different keys, as columns cannot hold them without filling in."""
    call = {"function": {"name": "add", "arguments": '{"a": 2}'}}
    return [
        {"messages": TALK, "domain": "sums"},
        {"messages": [TALK[0], {"role": "assistant", "content": "It is four.", "tool_calls": [call]}], "domain": "calls"},
    ]


def write_rows(directory: Path, kind: str) -> Path:
    directory.mkdir()
    path = directory / f"chats.{kind}"
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows()), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows()))
    return path


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["jsonl", "parquet", "directory"])
def test_all_ways_to_read_give_the_same(kind, streaming, tmp_path):
    path = write_rows(tmp_path / "set", "jsonl" if kind == "directory" else kind)
    name = str(path.parent if kind == "directory" else path)
    found = list(read_conversations([name], source="domain", streaming=streaming))
    assert [c.messages for c in found] == [row["messages"] for row in rows()], "keys of other rows must not appear as None"
    assert [c.source for c in found] == ["sums", "calls"]
    assert [c.place for c in found] == [f"{name}, row 0", f"{name}, row 1"]


def test_tools_may_be_json_and_a_source_may_be_named(tmp_path):
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps({"talk": TALK, "tools": '[{"name": "add"}]'}) + "\n")
    (found,) = read_conversations([str(path)], column="talk", source="mine")
    assert (found.tools, found.source) == ([{"name": "add"}], "mine")
    path.write_text(json.dumps({"talk": TALK, "tools": "add"}) + "\n")
    (found,) = read_conversations([str(path)], column="talk", streaming=True)
    with pytest.raises(InputError, match="row 0: tools is not JSON"):
        list(make_converter(CHATML, "<|im_end|>")[1].convert([found]))


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        ({"talk": TALK, "domain": "a"}, {}, "row 0 has no column 'messages', only talk, domain"),
        (
            {"messages": "hello", "domain": "a"},
            {},
            "messages is 'hello', expected a list of messages .* are messages, domain",
        ),
        ({"messages": [{"from": "human", "value": "a"}]}, {}, "expected a list of messages"),
        ({"messages": []}, {}, "expected a list of messages"),
        ({"messages": TALK}, {"split": "test"}, "cannot be read .*test"),
    ],
)
def test_other_data_sets_are_refused(content, options, message, tmp_path):
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps(content) + "\n")
    _, converter = make_converter(CHATML, "<|im_end|>")
    with pytest.raises(InputError, match=message):
        list(converter.convert(read_conversations([str(path)], streaming=True, **options)))


def test_missing_files_and_mixed_formats_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"nothing.*cannot be read"):
        read_conversations([str(tmp_path / "nothing*.jsonl")])
    with pytest.raises(InputError, match="several formats"):
        read_conversations(["a.jsonl", "b.parquet"])


def test_recipe_from_data_set_to_rollouts(model, tmp_path, monkeypatch, capsys, caplog):
    path = write_rows(tmp_path / "set", "jsonl")
    output = tmp_path / "rollouts.parquet"
    arguments = ["--dataset", path, "--model", model, "--temperature", 0.7, "--source", "domain", "--streaming"]
    monkeypatch.setattr(sys, "argv", ["convert_chats.py", *map(str, arguments), "--output", str(output)])
    main()
    assert "wrote 3 rollouts" in capsys.readouterr().out
    assert "text that the model did not sample" in caplog.text
    header, rollouts = read_rollouts(output)
    assert header.tokenizer_hash == tokenizer_hash(make_tokenizer(None))
    assert (header.vocab_size, header.temperature, header.sampling["converted_from"]) == (600, 0.7, [str(path)])
    _, converter = make_converter(REASONING, "<|im_end|>")
    conversations = [Conversation(row["messages"], source=row["domain"]) for row in rows()]
    expected: list[Rollout] = list(converter.convert(conversations))
    assert rollouts == expected

    with pytest.raises(SystemExit, match=f"error: output {output} exists; choose another name or remove it"):
        main()
