"""Conversations: rendered text, ids and loss masks written out by hand, and what cannot be supervised."""

import datetime
import json
from pathlib import Path

import numpy as np
import pytest

from jaxdistill.data.chat import ChatFormat, ChatTemplateError
from jaxdistill.data.packing import cut, to_arrays
from jaxdistill.data.sources import DataError
from jaxdistill.data.tokenize import DocumentTokenizer
from jaxdistill.tokenizers.byte_level import ByteTokenizer

DEFAULT_SYSTEM = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nBe kind<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TRIMS = DEFAULT_SYSTEM.replace("message['content'] +", "message['content'] | trim +")
NO_TURN_END = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '[' + message['content'] + ']' }}"
    "{% else %}{{ message['content'] }}{% endif %}{% endfor %}"
)
MARKED = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
)
START, END = 259, 260

TWO_TURNS = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Yo"},
    {"role": "user", "content": "é?"},
    {"role": "assistant", "content": " No "},
]


def supervised_parts(template, messages):
    """The supervised runs of tokens, as text, with their special tokens."""
    tokenizer = ByteTokenizer(chat_template=template)
    ids, supervised, text_bytes = ChatFormat(tokenizer).supervise(messages)
    assert len(ids) == len(supervised) == len(text_bytes)
    parts, run = [], []
    for token, wanted in zip([*ids.tolist(), 0], [*supervised.tolist(), False], strict=True):
        if wanted:
            run.append(token)
        elif run:
            parts.append(tokenizer.decode(run, skip_special=False))
            run = []
    return parts


def test_ids_and_mask_by_hand():
    format = ChatFormat(ByteTokenizer(chat_template=DEFAULT_SYSTEM))
    ids, supervised, text_bytes = format.supervise(TWO_TURNS[:2])
    pieces = [
        ([START], 0), (list(b"system\nBe kind"), 0), ([END], 0), (list(b"\n"), 0),
        ([START], 0), (list(b"user\nHi"), 0), ([END], 0), (list(b"\n"), 0),
        ([START], 0), (list(b"assistant\n"), 0), (list(b"Yo"), 1), ([END], 1), (list(b"\n"), 0),
    ]  # fmt: skip
    assert ids.tolist() == [token for tokens, _ in pieces for token in tokens]
    assert supervised.tolist() == [bool(wanted) for tokens, wanted in pieces for _ in tokens]
    assert text_bytes.tolist() == [int(token < 256) for tokens, _ in pieces for token in tokens]
    assert (ids.dtype, supervised.dtype, text_bytes.dtype) == (np.int32, bool, np.int32)


@pytest.mark.parametrize(
    ("template", "parts"),
    [
        (DEFAULT_SYSTEM, ["Yo<|im_end|>", " No <|im_end|>"]),
        (TRIMS, ["Yo<|im_end|>", "No<|im_end|>"]),
        (NO_TURN_END, ["Yo", " No "]),
        (MARKED, ["Yo<|im_end|>", " No <|im_end|>"]),
    ],
)
def test_the_assistants_words_and_the_end_of_its_turns_are_supervised(template, parts):
    assert supervised_parts(template, TWO_TURNS) == parts


def test_a_conversation_that_ends_with_the_user():
    assert supervised_parts(DEFAULT_SYSTEM, TWO_TURNS[:3]) == ["Yo<|im_end|>"]


def test_the_same_words_elsewhere_are_not_supervised():
    messages = [{"role": "user", "content": "Yo"}, {"role": "assistant", "content": "Yo"}]
    assert supervised_parts(DEFAULT_SYSTEM, messages) == ["Yo<|im_end|>"]
    ids, supervised, _ = ChatFormat(ByteTokenizer(chat_template=DEFAULT_SYSTEM)).supervise(messages)
    assert supervised.tolist().index(True) > ids.tolist().index(END)


def test_special_tokens_of_the_tokenizer_reach_the_template():
    assert ChatFormat(ByteTokenizer(chat_template=NO_TURN_END)).encode(TWO_TURNS[:1]).ids.tolist() == [256, *b"[Hi]"]


def test_the_generation_prompt_opens_a_turn():
    format = ChatFormat(ByteTokenizer(chat_template=DEFAULT_SYSTEM))
    text = format.render(TWO_TURNS[:1], add_generation_prompt=True)
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


def test_what_published_templates_use_is_there():
    template = (
        "{% for message in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ message | tojson }}{% endfor %}"
        "{{ strftime_now('%Y')[:2] }}{% if tools is not none %}tools{% endif %}\n   {% if true %}\nx{% endif %}\n"
    )
    text = ChatFormat(ByteTokenizer(chat_template=template)).render([{"role": "user", "content": "é<"}] * 2)
    # A block takes the line end after it and the spaces before it.
    assert text == '{"role": "user", "content": "é<"}20x'


def test_a_template_that_writes_the_date_writes_the_given_one():
    tokenizer = ByteTokenizer(chat_template="{{ strftime_now('%d %b %Y') }}")
    assert ChatFormat(tokenizer, date=datetime.date(2025, 3, 9)).render(TWO_TURNS) == "09 Mar 2025"
    assert ChatFormat(tokenizer).render(TWO_TURNS) == datetime.date.today().strftime("%d %b %Y")


def test_templates_are_sandboxed():
    for template in ("{{ messages.append(1) }}", "{{ ''.__class__.__mro__ }}"):
        with pytest.raises(ChatTemplateError, match=r"refuses a conversation with the roles \['user'\]"):
            ChatFormat(ByteTokenizer(chat_template=template)).render(TWO_TURNS[:1])


def test_a_turn_that_does_not_start_with_the_generation_prompt_is_refused():
    # The default system turn appears only once a message follows, so an assistant's first turn has no known start.
    with pytest.raises(ChatTemplateError, match=r"turn 0 .* Start the conversation with a user's turn"):
        supervised_parts(DEFAULT_SYSTEM, TWO_TURNS[1:])


def test_a_template_that_rewrites_earlier_turns_is_refused():
    template = DEFAULT_SYSTEM.replace("message['content'] +", "('' if kept else message['content']) +")
    template = template.replace("kept", "message['role'] == 'assistant' and not loop.last")
    with pytest.raises(ChatTemplateError, match=r"turn 1 differently when more turns follow"):
        supervised_parts(template, TWO_TURNS)
    assert supervised_parts(template, TWO_TURNS[:2]) == ["Yo<|im_end|>"]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "has no chat template"),
        ("{% for %}", "not valid Jinja"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
    ],
)
def test_templates_that_cannot_be_used(template, message):
    with pytest.raises(ChatTemplateError, match=message):
        ChatFormat(ByteTokenizer(chat_template=template)).render(TWO_TURNS)


def test_marks_of_spans_cannot_be_forged():
    with pytest.raises(ChatTemplateError, match="noncharacter U"):
        supervised_parts(MARKED, [{"role": "user", "content": "\ufdd0words\ufdd1"}])


def rows_of(record, template=None, **framing):
    tokenize = DocumentTokenizer(ByteTokenizer(chat_template=template), **framing)
    (document,) = tokenize([record], ["text"])
    pieces, _ = cut(document, length=16, long_documents="split")
    return {name: values[0].tolist() for name, values in to_arrays([pieces], 16).items()}


def test_pairs_supervise_the_first_completion_token_and_no_prompt_token():
    row = rows_of({"prompt": "ab", "completion": "cd"}, prepend_bos=True, append_eos=True)
    assert row["tokens"][:6] == [256, 97, 98, 99, 100, 0]
    assert row["targets"][:6] == [97, 98, 99, 100, 257, 0]
    assert row["loss_mask"][:6] == [0, 0, 1, 1, 1, 0]
    assert row["target_bytes"][:6] == [1, 1, 1, 1, 0, 0]


def test_conversations_are_shifted_like_any_document():
    row = rows_of({"messages": TWO_TURNS[:2]}, NO_TURN_END, prepend_bos=True, append_eos=True)
    assert row["tokens"][:7] == [256, *b"[Hi]Y", 0]  # the template's own start, and no end
    assert row["loss_mask"][:8] == [0, 0, 0, 0, 1, 1, 0, 0]
    assert bytes(row["targets"][4:6]) == b"Yo"


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": "", "completion": "a"}, "empty 'prompt'"),
        ({"prompt": "a", "completion": ""}, "empty 'completion'"),
        ({"prompt": ["a"], "completion": "b"}, "'prompt' holds list, not text"),
        ({"messages": []}, r"give a list of at least one message. The record begins: {.messages"),
        ({"messages": ["a"]}, "message 0 is 'a'; give an object with 'role'"),
    ],
)
def test_records_that_cannot_be_used(record, message):
    with pytest.raises(DataError, match=message):
        rows_of(record, DEFAULT_SYSTEM, prepend_bos=False, append_eos=True)


GOLDEN = json.loads((Path(__file__).parent.parent / "golden" / "chat.json").read_text(encoding="utf-8"))
CASES = [case for case in GOLDEN["cases"] if case["template"] != "smollm2"]


@pytest.mark.parametrize("case", CASES)
def test_text_ids_and_marked_words_equal_transformers(case):
    tokenizer = ByteTokenizer(chat_template=GOLDEN["templates"][case["template"]])
    form = ChatFormat(tokenizer)
    settings = {"add_generation_prompt": case["add_generation_prompt"]}
    assert form.render(case["messages"], **settings) == case["text"]
    assert form.encode(case["messages"], **settings).ids.tolist() == case["ids"]
    if case["assistant"] is not None and not case["add_generation_prompt"]:
        assert form.supervise(case["messages"])[1].astype(int).tolist() == case["assistant"]
