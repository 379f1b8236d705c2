import asyncio

import pytest

import bebop.data.server
from bebop.data.server import Completions, find_server, serve_all
from bebop.errors import InputError
from tests.data.sampling_server import serving

STOP = [5, 7]


def one_token_more(prompt, _):
    """The token after the prompt's last one, and the end."""
    return [prompt[-1] + 1, 7]


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch):
    monkeypatch.setattr(bebop.data.server, "_FIRST_WAIT", 0.001)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def sample(server, prompts, concurrency=4, vocab_size=50):
    """Prompt -> tokens."""
    found = {}

    async def work(completions: Completions, prompt: int) -> None:
        found[prompt] = await completions.sample([1, prompt], temperature=0.7, max_tokens=9, stop=STOP, seed=prompt)

    serve_all(find_server(server.url), vocab_size, concurrency, prompts, work)
    return found


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_ids_come_back_and_nothing_is_left_to_the_servers_defaults(engine):
    """Servers take what a request leaves out from the model's generation config: a penalty, a top-k."""
    with serving(one_token_more, engine) as server:
        assert sample(server, range(20, 30)) == {p: [p + 1, 7] for p in range(20, 30)}
    request = next(r for r in server.requests if (r.get("prompt") or r.get("input_ids")) == [1, 20])
    sampling = request if engine == "vllm" else request["sampling_params"]
    expected = {
        "temperature": 0.7,
        "top_p": 1.0,
        "top_k": -1,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "stop_token_ids": STOP,
    }
    assert {key: sampling[key] for key in expected} == expected
    if engine == "vllm":
        assert (request["model"], request["max_tokens"], request["seed"]) == ("tiny", 9, 20)
    else:
        assert sampling["max_new_tokens"] == 9


@pytest.mark.parametrize("fault", ["drop", 429, 500, 503])
def test_what_passes_is_tried_again(fault):
    with serving(one_token_more) as server:
        server.faults.extend([fault] * 3)
        assert sample(server, range(20, 26)) == {p: [p + 1, 7] for p in range(20, 26)}
        assert len(server.requests) == 9


def test_an_answer_that_is_broken_off_is_asked_for_again():
    with serving(one_token_more, "sglang") as server:
        server.changes = {"meta_info": {"finish_reason": {"type": "abort"}, "prompt_tokens": 2, "completion_tokens": 1}}
        with pytest.raises(InputError, match="failed 7 times in a row"):
            sample(server, [20], concurrency=1)
        assert len(server.requests) == 7


def test_a_server_that_keeps_failing_is_given_up():
    with serving(one_token_more) as server:
        server.faults.extend([500] * 100)
        with pytest.raises(InputError, match=r"failed 7 times in a row \(500 fault 500\)"):
            sample(server, [20])


def test_a_refused_request_is_not_tried_again():
    with serving(one_token_more) as server:
        server.faults.append(400)
        with pytest.raises(InputError, match="refuses a request: 400 fault 400"):
            sample(server, [20])
        assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("engine", "changes", "message"),
    [
        ("vllm", {"token_ids": None}, "answers without token ids"),
        ("sglang", {"output_ids": None}, "answers without token ids"),
        # Some versions of SGLang put the end of the prompt before the answer.
        ("sglang", {"output_ids": [1, 20, 21, 7]}, "returned 4 ids for a prompt of 2 and counted 2 and 2"),
        ("vllm", {"token_ids": [50, 7]}, "outside the vocabulary of 50"),
        (
            "sglang",
            {"meta_info": {"finish_reason": {"type": "stop", "matched": "NaN"}, "prompt_tokens": 2, "completion_tokens": 2}},
            "or ended at 'NaN'",
        ),
        ("vllm", {"finish_reason": None}, "failed 7 times in a row"),
        ("sglang", {"meta_info": None}, "answer of unknown form"),
    ],
)
def test_answers_that_cannot_be_trusted_are_refused(engine, changes, message):
    with serving(one_token_more, engine) as server:
        server.changes = changes
        with pytest.raises(InputError, match=message):
            sample(server, [20])


def test_concurrency_bounds_the_requests_at_once():
    running = most = 0

    async def work(_: Completions, __: int) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.005)
        running -= 1

    with serving(one_token_more) as server:
        serve_all(find_server(server.url), 50, 3, range(10), work)
    assert most == 3


def test_the_key_is_sent(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    with serving(one_token_more) as server:
        sample(server, [20])
        assert server.headers[0]["Authorization"] == "Bearer secret"


def test_find_server():
    cards = [
        {"id": "base", "owned_by": "sglang", "max_model_len": 100},
        {"id": "adapter", "owned_by": "sglang", "parent": "base"},
    ]
    with serving(one_token_more, models=cards) as server:
        found = find_server(server.url + "/v1/")
        assert (found.url, found.model, found.is_sglang, found.max_length) == (server.url, "base", True, 100)
        with pytest.raises(InputError, match=r"no model 'other' of its own; .*: base"):
            find_server(server.url, "other")
        with pytest.raises(InputError, match="no model 'adapter' of its own"):
            find_server(server.url, "adapter")
        server.models.append({"id": "second"})
        with pytest.raises(InputError, match=r"several models; .*: base, second"):
            find_server(server.url)
        assert find_server(server.url, "second").max_length is None
        server.models = None
        with pytest.raises(InputError, match="no list of models"):
            find_server(server.url)


def test_a_server_that_is_not_there_is_refused():
    with serving(one_token_more) as server:
        url = server.url
    with pytest.raises(InputError, match=f"no server answers at {url}"):
        find_server(url)
    with pytest.raises(InputError, match="is no URL"):
        find_server("localhost:8000")


def test_missing_key_is_named():
    with serving(one_token_more) as server:
        server.faults.append(401)
        with pytest.raises(InputError, match="401 fault 401; set OPENAI_API_KEY"):
            sample(server, [20])
