"""Conversations to tokens through the model's own chat template, with a loss on the assistant's words only."""

from __future__ import annotations

import dataclasses
import datetime
import json
import re
from collections.abc import Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox
import numpy as np

from jaxdistill.data.sources import DataError
from jaxdistill.tokenizers.base import Encoding, Tokenizer

Message = dict[str, Any]

# Unicode noncharacters: they mean nothing in any text, so they can mark spans of rendered text.
_SPAN_START, _SPAN_END = "\ufdd0", "\ufdd1"
_CONTENT_START, _CONTENT_END = "\ufdd2", "\ufdd3"
_GENERATION_TAG = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


class ChatTemplateError(DataError):
    """A conversation that the template refuses, or a template whose assistant turns cannot be told apart."""


class _GenerationBlock(jinja2.ext.Extension):
    """`{% generation %} ... {% endgeneration %}`: the template marks what the assistant says."""

    tags = {"generation"}  # noqa: RUF012 - Jinja's own interface

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller) -> str:
        return f"{_SPAN_START}{caller()}{_SPAN_END}"


def _raise_exception(message: str):
    raise jinja2.TemplateError(message)


def _to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _environment(date: datetime.date) -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    """Jinja as published chat templates expect it; sandboxed, since a template comes with a downloaded model."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = date.strftime
    return environment


@dataclasses.dataclass(frozen=True)
class Located:
    """A tokenized conversation that knows where its messages are.

    ids, supervised, text_bytes: as `ChatFormat.supervise` gives them. offsets: int64 [n, 2], byte offsets into the
    rendered text. contents: int64 [messages, 2], the byte span of each content there, without the white space around
    it, which many templates strip; -1 where the template does not write it as it is, or there is nothing to write.
    turn_ends: int64 [messages], the token that ends an assistant's turn; -1 where there is none.
    """

    ids: np.ndarray
    supervised: np.ndarray
    text_bytes: np.ndarray
    offsets: np.ndarray
    contents: np.ndarray
    turn_ends: np.ndarray


class ChatFormat:
    """A tokenizer's chat template, ready to render and to tokenize conversations.

    A message is {"role": ..., "content": ...} plus whatever the template reads. Ids equal those of transformers'
    `apply_chat_template`: the rendered text is tokenized with its special tokens and nothing is added.

    date: what a template that writes the current date writes (None: today's). Data to train on wants a fixed one, so
    that it is the same data on another day.
    """

    def __init__(self, tokenizer: Tokenizer, *, date: datetime.date | None = None):
        if tokenizer.chat_template is None:
            raise ChatTemplateError(
                "the tokenizer has no chat template, which conversations need. Use the tokenizer of an "
                "instruction-tuned model, put a chat_template in its tokenizer_config.json, or give 'prompt' and "
                "'completion' instead."
            )
        self._tokenizer = tokenizer
        self._marked = bool(_GENERATION_TAG.search(tokenizer.chat_template))
        try:
            self._template = _environment(date or datetime.date.today()).from_string(tokenizer.chat_template)
        except jinja2.TemplateSyntaxError as error:
            raise ChatTemplateError(
                f"the chat template is not valid Jinja: {error.message}, line {error.lineno}."
            ) from None
        special = tokenizer.special
        strings = {token: text for text, token in special.all.items()}
        roles = {"bos_token": special.bos, "eos_token": special.eos, "pad_token": special.pad, "unk_token": special.unk}
        self._strings = {role: strings[token] for role, token in roles.items() if token in strings}
        self._special_ids = np.asarray(sorted(special.all.values()), np.int64)
        self._stop_ids = special.stop

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
        """The conversation as the text that the model sees; `add_generation_prompt` opens an assistant turn."""
        marked = self._render(messages, add_generation_prompt)
        return marked.replace(_SPAN_START, "").replace(_SPAN_END, "") if self._marked else marked

    def encode(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> Encoding:
        """Ids of the rendered conversation, with byte offsets into it."""
        text = self.render(messages, add_generation_prompt=add_generation_prompt)
        return self._tokenizer.encode(text, parse_special=True)

    def supervise(self, messages: Sequence[Message]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Ids int32 [n], supervised bool [n] and text bytes int32 [n] of each token of a conversation.

        Supervised are the assistant's words and the token that ends its turn, not the header of the turn nor what the
        template writes after it. Special tokens stand for 0 bytes of text.
        """
        return self._supervised(messages)[1:]

    def locate(self, messages: Sequence[Message]) -> Located:
        """What `supervise` gives, and where the contents of the messages are."""
        (_, offsets), ids, supervised, text_bytes = self._supervised(messages)
        contents = self._contents(messages)
        stops = supervised & np.isin(ids, list(self._stop_ids))
        turn_ends = np.full(len(messages), -1)
        for index, (message, (start, end)) in enumerate(zip(messages, contents.tolist(), strict=True)):
            if message["role"] != "assistant" or start < 0:
                continue
            # Before the next header, which is not supervised, and the next content, if there is no header.
            later = contents[contents[:, 0] >= end, 0].min(initial=offsets[-1, 1])
            after, before = np.searchsorted(offsets[:, 0], (end, later))
            run = np.logical_and.accumulate(supervised[after:before])
            if (run & stops[after:before]).any():
                turn_ends[index] = after + int(np.argmax(stops[after:before]))
        return Located(ids, supervised, text_bytes, offsets, contents, turn_ends)

    def _supervised(self, messages: Sequence[Message]) -> tuple[Encoding, np.ndarray, np.ndarray, np.ndarray]:
        """The encoded conversation, and what `supervise` gives."""
        text, spans = self._marked_spans(messages) if self._marked else self._prefix_spans(messages)
        encoding = self._tokenizer.encode(text, parse_special=True)
        ids, offsets = encoding
        supervised = np.zeros(len(ids), bool)
        for start, end in spans:
            # A token that begins before the words holds part of the header, so it is not supervised.
            inside = np.flatnonzero((offsets[:, 0] >= start) & (offsets[:, 0] < end))
            supervised[inside[: self._turn_length(ids[inside], offsets[inside], text)]] = True
        widths = np.where(np.isin(ids, self._special_ids), 0, offsets[:, 1] - offsets[:, 0])
        return encoding, ids.astype(np.int32), supervised, widths.astype(np.int32)

    def _contents(self, messages: Sequence[Message]) -> np.ndarray:
        """Byte spans of the contents in the rendered text, found by marking one at a time: int64 [messages, 2].

        The marks are inside the white space around a content, so that the template strips what it would strip. A
        content counts as found if nothing else of the text depends on the marks and it stands between them as it is.
        """
        text, spans = self.render(messages), np.full((len(messages), 2), -1)
        for index, message in enumerate(messages):
            content = message.get("content")
            if not isinstance(content, str) or not (words := content.strip()):
                continue
            marked = {**message, "content": content.replace(words, _CONTENT_START + words + _CONTENT_END, 1)}
            try:
                rendered = self.render([*messages[:index], marked, *messages[index + 1 :]])
            except ChatTemplateError:
                continue
            before, _, rest = rendered.partition(_CONTENT_START)
            found, _, after = rest.partition(_CONTENT_END)
            if found == words and before + found + after == text:
                start = len(before.encode())
                spans[index] = start, start + len(words.encode())
        return spans

    def _turn_length(self, ids: np.ndarray, offsets: np.ndarray, text: str) -> int:
        """How many tokens of a span belong to the turn: up to its last stop token if only white space follows it."""
        stops = [index for index, token in enumerate(ids.tolist()) if token in self._stop_ids]
        if not stops:
            return len(ids)
        rest = text.encode()[offsets[stops[-1], 1] : offsets[-1, 1]]
        return len(ids) if rest.strip() else stops[-1] + 1

    def _render(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        if self._marked and any(mark in json.dumps(messages, ensure_ascii=False) for mark in (_SPAN_START, _SPAN_END)):
            raise ChatTemplateError("a message holds the noncharacter U+FDD0 or U+FDD1; remove it from the text.")
        try:
            return self._template.render(
                messages=list(messages),
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._strings,
            )
        except (jinja2.TemplateError, TypeError) as error:
            roles = [message.get("role") for message in messages]
            raise ChatTemplateError(
                f"the chat template refuses a conversation with the roles {roles}: {error}. Change the conversation, "
                "or use a template that takes it."
            ) from None

    def _marked_spans(self, messages: Sequence[Message]) -> tuple[str, list[tuple[int, int]]]:
        """Rendered text and byte spans of what the template's generation blocks wrote."""
        parts = re.split(f"({_SPAN_START}|{_SPAN_END})", self._render(messages, False))
        text, spans, start, at = [], [], 0, 0
        for part in parts:
            if part == _SPAN_START:
                start = at
            elif part == _SPAN_END:
                spans.append((start, at))
            else:
                text.append(part)
                at += len(part.encode())
        return "".join(text), spans

    def _prefix_spans(self, messages: Sequence[Message]) -> tuple[str, list[tuple[int, int]]]:
        """Rendered text and byte spans of assistant turns, found by rendering the conversation up to each of them."""
        whole, spans = self._render(messages, False), []
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._render(messages[:index], True)
            after = self._render(messages[: index + 1], False)
            if not after.startswith(before):
                raise ChatTemplateError(
                    f"the chat template does not begin the assistant's turn {index} with what it gives as generation "
                    f"prompt ({before[-40:]!r} against {after[: len(before)][-40:]!r}), so its words cannot be told "
                    "from its header. Start the conversation with a user's turn, or mark the assistant's words in the "
                    "template with {% generation %} ... {% endgeneration %}."
                )
            if not whole.startswith(after):
                raise ChatTemplateError(
                    f"the chat template writes the assistant's turn {index} differently when more turns follow (some "
                    "remove earlier reasoning), so it cannot be supervised in place. Split the conversation so that "
                    "each ends with one assistant's turn, or mark the assistant's words in the template with "
                    "{% generation %} ... {% endgeneration %}."
                )
            spans.append((len(before.encode()), len(after.encode())))
        return whole, spans


def check_messages(messages: Any) -> list[Message]:
    """The conversation itself, when it is a list of messages with a role."""
    if not isinstance(messages, list) or not messages:
        raise DataError(f"'messages' is {messages!r}; give a list of at least one message.")
    for index, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise DataError(f"message {index} is {message!r}; give an object with 'role' and 'content'.")
    return messages
