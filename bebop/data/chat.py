"""Conversations of messages into rollouts, by the model's own chat template.

A rollout for each of the assistant's turns, because templates render a turn otherwise when others follow it (Qwen3's drops
its reasoning): the prompt is what an engine would be sent for that turn, the response what the template puts behind it.
"""

from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

from tqdm import tqdm

from bebop.data.conversations import Conversation
from bebop.data.end_tokens import end_tokens
from bebop.data.rollouts import Rollout, conversation_id
from bebop.errors import InputError

_MARK = "\u2402bebop\u2402"
_MOST_MERGED = 0.01  # share of turns whose first token may reach back into the prompt


def closing_tokens(directory: Path, tokenizer: Any) -> set[int]:
    """Tokens that end an answer in the template's text: the one with which it closes an answer, and the model's own.

    Args:
        directory: of the model's checkpoint.
        tokenizer: of the model.

    Raises:
        InputError: the tokenizer has no chat template, or one that does not close an answer with a special token.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise InputError(f"{directory} has no chat template to render messages with; use an instruction-tuned model")
    ends = set(end_tokens(directory, tokenizer))
    answered = Conversation([{"role": "user", "content": "?"}, {"role": "assistant", "content": _MARK}], place="a dialogue")
    behind = _render(tokenizer, answered, 2, opened=False).rpartition(_MARK)[2]
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    closing = [i for i in tokenizer.encode(behind, add_special_tokens=False) if i in special | ends]
    if not closing:
        raise InputError(
            f"the chat template of {directory} puts {behind!r} behind an answer, which has no special token to end it; "
            "let the model write rollouts with recipes/generate_rollouts.py"
        )
    return ends | {closing[0]}


class ChatConverter:
    """Makes rollouts of conversations and counts what it leaves out.

    Attributes:
        turns: of the assistant, seen so far.
        too_long: turns left out because they are longer than `max_length`.
        merged: turns left out because the tokenizer joins text of prompt and response in one token. An engine tokenises the
            prompt by itself, so there is no context in which the model would say this.
        unfit: conversations left out for another reason, if that was asked for.
        reason: why the first of them was.

    Args:
        tokenizer: with the model's chat template.
        ends: tokens that end an answer.
        max_length: most tokens of prompt and response.
        skip_unfit: leave out conversations that have nothing to learn from or cannot be rendered, instead of refusing them.
    """

    def __init__(self, tokenizer: Any, ends: set[int], max_length: int, skip_unfit: bool = False):
        self.tokenizer = tokenizer
        self.ends = ends
        self.max_length = max_length
        self.skip_unfit = skip_unfit
        self.turns = self.too_long = self.merged = self.unfit = 0
        self.reason = ""

    def convert(self, conversations: Iterable[Conversation], count: int | None = None) -> Iterator[Rollout]:
        """Rollouts of conversations, in their order.

        Args:
            conversations: each with a turn of the assistant, or several, behind another's.
            count: most rollouts; all if None.

        Raises:
            InputError: nothing fits; a conversation cannot be rendered, or not turn by turn; or too many turns are merged.
        """
        found = 0
        rollouts = islice(chain.from_iterable(map(self._of, conversations)), count)
        for rollout in tqdm(rollouts, unit="rollout", total=count):
            found += 1
            yield rollout
        self._check_merged(self.turns)
        if not found:
            unfit = f", {self.unfit} conversations do not fit ({self.reason})" if self.unfit else ""
            raise InputError(
                f"none of {self.turns} turns of the assistant gave a rollout: {self.too_long} are longer than "
                f"{self.max_length} tokens{unfit}; give other conversations"
            )

    def _of(self, conversation: Conversation) -> list[Rollout]:
        """Its rollouts, all or none."""
        found, before = [], (self.turns, self.too_long, self.merged)
        try:
            found = list(self._turns(conversation))
        except InputError as error:
            if not self.skip_unfit:
                raise InputError(f"{error} (skip_unfit leaves out all such)") from error
            self.turns, self.too_long, self.merged = before
            self.unfit += 1
            self.reason = self.reason or str(error)
        self._check_merged(max(self.turns, 1000))  # early, if it is many
        return found

    def _turns(self, conversation: Conversation) -> Iterator[Rollout]:
        if conversation.problem:
            raise InputError(conversation.problem)
        turns = [i for i, message in enumerate(conversation.messages) if message["role"] == "assistant"]
        if not turns or turns[0] == 0:
            found = "begins with an assistant's message" if turns else "has no assistant's message"
            raise InputError(f"{conversation.place} {found}; leave it out")
        texts: list[str] = []
        for i in turns:
            prompt = _render(self.tokenizer, conversation, i, opened=True)
            whole = _render(self.tokenizer, conversation, i + 1, opened=False)
            if not whole.startswith(prompt):
                raise InputError(
                    f"{conversation.place}: with message {i} the chat template does not go on from the prompt that an "
                    "engine would send for it; let the model answer the prompts itself with recipes/generate_rollouts.py"
                )
            texts += [prompt, whole]
        ids = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        opening = conversation_id(ids[0])
        for i, prompt_ids, whole_ids in zip(turns, ids[::2], ids[1::2], strict=True):
            self.turns += 1
            if not prompt_ids:
                raise InputError(f"{conversation.place}: the prompt of message {i} is empty; leave it out")
            if whole_ids[: len(prompt_ids)] != prompt_ids:
                self.merged += 1
                continue
            response = whole_ids[len(prompt_ids) :]
            length = next((n for n, token in enumerate(response, start=1) if token in self.ends), 0)
            if length < 2:
                found = "is empty" if length else "is not closed by a token that ends an answer"
                raise InputError(f"{conversation.place}: message {i}, the assistant's, {found}; leave the conversation out")
            if len(prompt_ids) + length > self.max_length:
                self.too_long += 1
                continue
            yield Rollout(prompt_ids, response[:length], "stop", conversation.source, opening)

    def _check_merged(self, turns: int) -> None:
        if self.merged > _MOST_MERGED * turns:
            raise InputError(
                f"in {self.merged} of {self.turns} turns the tokenizer joins the end of the prompt and the start of the "
                "response in one token: no text that the model would write after that prompt; let it answer the prompts "
                "itself with recipes/generate_rollouts.py"
            )


def _render(tokenizer: Any, conversation: Conversation, count: int, opened: bool) -> str:
    """The first `count` messages as text, opened for an answer or not."""
    try:
        return tokenizer.apply_chat_template(
            conversation.messages[:count], tools=conversation.tools, tokenize=False, add_generation_prompt=opened
        )
    except Exception as error:  # templates raise what they like
        raise InputError(
            f"{conversation.place}: the chat template does not take its first {count} messages ({error}); leave it out"
        ) from error
