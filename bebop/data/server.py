"""A server that runs the model, vLLM or SGLang, as a sampler: token ids in, token ids out, many requests at once.

Of vLLM /v1/completions is used, which returns ids if asked for them (version 0.10.2 or newer), of SGLang /generate, which
always does. Text is never tokenised again. Every request says how to sample, because a server takes what is left out from
the model's generation_config.json.
"""

import asyncio
import json
import os
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx

from bebop.errors import InputError

Item = TypeVar("Item")

_TRIES = 7
_FIRST_WAIT = 1.0  # seconds before the second try, twice as many before each one after it: a minute in all
_TIMEOUT = httpx.Timeout(30.0, read=1800.0, pool=None)  # an answer may have to wait for its turn
_UNCHANGED = {
    "top_p": 1.0,
    "top_k": -1,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}


@dataclass
class Server:
    """A model on a server.

    Attributes:
        url: of the server, without /v1.
        model: the name under which the model is served.
        is_sglang: whether it is SGLang; otherwise it is taken for vLLM.
        max_length: most tokens of prompt and answer; None if the server does not say.
    """

    url: str
    model: str
    is_sglang: bool
    max_length: int | None


def find_server(url: str, model: str | None = None) -> Server:
    """Ask a server what it serves.

    Args:
        url: of the server, with or without /v1. The environment's OPENAI_API_KEY is sent if it is set.
        model: the name under which the model is served; may be left out if there is only one.

    Raises:
        InputError: no server answers, it does not serve that model, or the model is an adapter.
    """
    url = url.rstrip("/").removesuffix("/v1")
    if not url.startswith(("http://", "https://")):
        raise InputError(f"server {url!r} is no URL; expected one like http://localhost:8000")
    try:
        response = httpx.get(f"{url}/v1/models", headers=_headers(), timeout=30.0)
    except (httpx.TransportError, httpx.InvalidURL) as error:
        raise InputError(f"no server answers at {url} ({error}); start it or give another URL") from error
    if response.is_error:
        raise InputError(f"the server at {url} does not list its models: {_complaint(response)}")
    try:
        cards = {card["id"]: card for card in response.json()["data"]}
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{url}/v1/models is no list of models; expected a vLLM or SGLang server") from None
    # An adapter's answers are not those of the model whose head is trained.
    names = [name for name, card in cards.items() if not card.get("parent")]
    if model is None and len(names) == 1:
        model = names[0]
    if model is None or model not in names:
        asked = "several models" if model is None else f"no model {model!r} of its own"
        raise InputError(f"the server at {url} has {asked}; name one of these as the served model: {', '.join(names)}")
    card = cards[model]
    return Server(url, model, card.get("owned_by") == "sglang", card.get("max_model_len"))


class Completions:
    """Completions that a server samples from the whole vocabulary.

    Args:
        client: carries the requests.
        server: where they go.
        vocab_size: token ids are below it.
    """

    def __init__(self, client: httpx.AsyncClient, server: Server, vocab_size: int):
        self.client = client
        self.server = server
        self.vocab_size = vocab_size

    async def sample(
        self, prompt: list[int], *, temperature: float, max_tokens: int, stop: Sequence[int], seed: int
    ) -> list[int]:
        """Tokens that go on from a prompt, the one that ended them included.

        A request that fails for want of a connection, because the server is busy or by an error of its own is sent again, a
        few times.

        Args:
            prompt: token ids.
            temperature: at which to sample.
            max_tokens: most tokens.
            stop: tokens at which to end, besides the model's own.
            seed: of vLLM's sampling; SGLang goes by its own.

        Raises:
            InputError: every try failed, the server refuses the request, or what it returns cannot be trusted.
        """
        path, body = self._request(prompt, temperature, max_tokens, list(stop), seed)
        failure = ""
        for attempt in range(_TRIES):
            if attempt:
                await asyncio.sleep(_FIRST_WAIT * 2 ** (attempt - 1))
            try:
                response = await self.client.post(path, json=body)
            except httpx.ReadTimeout:
                raise InputError(
                    f"the server at {self.server.url} has left a request without answer for {_TIMEOUT.read} s; does it hang?"
                ) from None
            except httpx.TransportError as error:
                failure = str(error) or type(error).__name__
                continue
            if response.status_code == httpx.codes.TOO_MANY_REQUESTS or response.is_server_error:
                failure = _complaint(response)
            elif response.is_error:
                raise InputError(f"the server at {self.server.url} refuses a request: {_complaint(response)}")
            elif (ids := self._tokens(response, prompt)) is not None:
                return ids
            else:
                failure = "it broke off an answer"
        raise InputError(f"the server at {self.server.url} failed {_TRIES} times in a row ({failure}); see to it and go on")

    def _request(
        self, prompt: list[int], temperature: float, max_tokens: int, stop: list[int], seed: int
    ) -> tuple[str, dict[str, Any]]:
        sampling = _UNCHANGED | {"temperature": temperature, "stop_token_ids": stop}
        if self.server.is_sglang:
            return "/generate", {"input_ids": prompt, "sampling_params": sampling | {"max_new_tokens": max_tokens}}
        request = {"model": self.server.model, "prompt": prompt, "max_tokens": max_tokens, "seed": seed}
        return "/v1/completions", request | sampling | {"return_token_ids": True}

    def _tokens(self, response: httpx.Response, prompt: list[int]) -> list[int] | None:
        """The ids that a response brings, None if the server broke off."""
        try:
            answer = response.json()
            if self.server.is_sglang:
                ids, usage, end = answer.get("output_ids"), answer["meta_info"], answer["meta_info"]["finish_reason"]
                reason, matched = end["type"], end.get("matched")
            else:
                choice = answer["choices"][0]
                ids, usage, reason = choice.get("token_ids"), answer["usage"], choice["finish_reason"]
                matched = choice.get("stop_reason")
            counted = (usage["prompt_tokens"], usage["completion_tokens"])
        except (ValueError, LookupError, TypeError, AttributeError):
            raise InputError(
                f"the server at {self.server.url} gave an answer of unknown form: {response.text[:80]!r}"
            ) from None
        if reason not in ("stop", "length"):
            return None
        if ids is None:
            raise InputError(
                f"the server at {self.server.url} answers without token ids, and text must not be tokenised again; use vLLM "
                "0.10.2 or newer, or SGLang"
            )
        if not ids or counted != (len(prompt), len(ids)):
            raise InputError(
                f"the server at {self.server.url} returned {len(ids)} ids for a prompt of {len(prompt)} and counted "
                f"{counted[1]} and {counted[0]}; use a version in which they agree"
            )
        if not all(type(i) is int and 0 <= i < self.vocab_size for i in ids) or isinstance(matched, str):
            raise InputError(
                f"the server at {self.server.url} returned ids outside the vocabulary of {self.vocab_size}, or ended at "
                f"{matched!r}; does it serve the same model, in a dtype that suits it?"
            )
        return ids


def serve_all(
    server: Server,
    vocab_size: int,
    concurrency: int,
    items: Iterable[Item],
    work: Callable[[Completions, Item], Awaitable[None]],
) -> None:
    """Do some work with a server for every item, for `concurrency` of them at once; the first error ends it.

    Args:
        server, vocab_size: as for `Completions`.
        concurrency: items at once.
        items: taken one by one, in their order.
        work: for one item.
    """

    async def run() -> None:
        limits = httpx.Limits(max_connections=concurrency, max_keepalive_connections=concurrency)
        async with (
            httpx.AsyncClient(base_url=server.url, headers=_headers(), timeout=_TIMEOUT, limits=limits) as client,
            asyncio.TaskGroup() as group,
        ):
            completions, waiting = Completions(client, server, vocab_size), iter(items)

            async def worker() -> None:
                for item in waiting:
                    await work(completions, item)

            for _ in range(concurrency):
                group.create_task(worker())

    try:
        asyncio.run(run())
    except ExceptionGroup as group:
        raise group.exceptions[0] from None


def _headers() -> dict[str, str]:
    key = os.environ.get("OPENAI_API_KEY")
    return {"Authorization": f"Bearer {key}"} if key else {}


def _complaint(response: httpx.Response) -> str:
    """What a server says of an error, in a line."""
    hint = "; set OPENAI_API_KEY" if response.status_code in (401, 403) else ""
    try:
        answer = response.json()
        text = str(answer.get("error", {}).get("message") or answer["message"])
    except (json.JSONDecodeError, LookupError, AttributeError):
        text = response.text
    return f"{response.status_code} {' '.join(text.split())[:200] or response.reason_phrase}{hint}"
