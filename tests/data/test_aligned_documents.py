"""Documents of two tokenizers: what is a chunk, what is compared, and what only one side has."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from tiny_tokenizers import TEXTS

from jaxdistill.data.aligned import AlignedTokenizer
from jaxdistill.data.chat import ChatFormat, ChatTemplateError
from jaxdistill.data.sources import DataError
from jaxdistill.tokenizers import ByteTokenizer, HuggingFaceTokenizer

GOLDEN = json.loads((Path(__file__).parent.parent / "golden" / "chat.json").read_text(encoding="utf-8"))
CHATML = GOLDEN["templates"]["chatml"]
LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}{{ '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' + "
    "message.content | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% set at = namespace(system='') %}{% for message in messages %}"
    "{% if message.role == 'system' %}{% set at.system = message.content + '\n\n' %}{% else %}"
    "{{ '<start_of_turn>' + ('model' if message.role == 'assistant' else 'user') + '\n' + "
    "at.system + message.content | trim + '<end_of_turn>\n' }}{% set at.system = '' %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
LLAMA3_SPECIAL = ("<bos>", "<eos>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
GEMMA_SPECIAL = ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>")
TURNS = [
    {"role": "system", "content": "user"},
    {"role": "user", "content": "user asks é?"},
    {"role": "assistant", "content": " Yes \n"},
    {"role": "user", "content": "And"},
    {"role": "assistant", "content": "No 😀"},
]


def aligned(record, student=None, teacher=None, *, prepend_bos=False, append_eos=False, chunks="minimal"):
    sides = (student or ByteTokenizer(), teacher or ByteTokenizer())
    (document,) = AlignedTokenizer(*sides, prepend_bos=prepend_bos, append_eos=append_eos, chunks=chunks)(
        [record], ["text"]
    )
    return document


def spelled(document, tokenizers, *, supervised=True):
    """The chunks that are compared (or all) as their tokens' bytes, for both sides."""
    vocabularies = [tokenizer.token_bytes() for tokenizer in tokenizers]
    numbers = [c for c, wanted in enumerate(document.supervised, start=1) if wanted or not supervised]
    return [
        [b"".join(vocabulary[i] for i in tokens.ids[chunks == number]) for number in numbers]
        for (tokens, chunks), vocabulary in zip(document.sides, vocabularies, strict=True)
    ]


def test_a_plain_text_framed_on_both_sides():
    document = aligned({"text": "aé"}, prepend_bos=True, append_eos=True)
    for _, chunks in document.sides:
        assert chunks.tolist() == [1, 2, 3, 4, 5]
    assert document.supervised.tolist() == [False, True, True, True, True], (
        "the beginning token is predicted by nothing"
    )


def test_the_first_chunk_is_not_compared_if_one_side_alone_begins_with_a_token():
    """The teacher has a probability of the student's first token, and the student has none."""
    student = ByteTokenizer(("<eos>",))
    document = aligned({"text": "abc"}, student, prepend_bos=True, append_eos=True)
    assert document.student.ids.tolist() == [*b"abc", 256]
    assert document.alignment.student.tolist() == [1, 2, 3, 4]
    assert document.alignment.teacher.tolist() == [0, 1, 2, 3, 4]
    assert document.supervised.tolist() == [False, True, True, True]
    document = aligned({"text": "abc"}, ByteTokenizer(), student, prepend_bos=True, append_eos=True)
    assert document.supervised.tolist() == [False, True, True, True], "the same the other way round"


def test_a_beginning_token_and_a_prefix_space_of_the_teacher_alone(loaded):
    """By lengths of strings there would be no chunk at all."""
    teacher = loaded["sentencepiece_bpe"]
    document = aligned({"text": "the dog"}, ByteTokenizer(()), teacher, prepend_bos=True)
    assert document.teacher.ids[0] == teacher.special.bos
    assert document.alignment.teacher[0] == 0
    assert len(document.supervised) >= 2
    assert document.supervised.tolist() == [False] + [True] * (len(document.supervised) - 1)


def test_an_end_token_of_one_side_is_supervised_there_and_in_no_chunk():
    document = aligned({"text": "ab"}, teacher=ByteTokenizer(("<bos>",)), prepend_bos=True, append_eos=True)
    assert document.alignment.student.tolist() == [1, 2, 3, 0]
    assert document.student.supervised[-1]
    assert document.alignment.teacher.tolist() == [1, 2, 3]


def test_tokens_that_neither_side_has_are_refused():
    with pytest.raises(ValueError, match="append_eos is set and neither tokenizer has such a token; unset it"):
        aligned({"text": "ab"}, ByteTokenizer(()), ByteTokenizer(("<bos>",)), prepend_bos=True, append_eos=True)


def test_strings_of_special_tokens_in_a_text_are_text():
    document = aligned({"text": "<eos>"}, teacher=ByteTokenizer(("<eos>", "<bos>")))
    assert document.alignment.student.tolist() == document.alignment.teacher.tolist() == [1, 2, 3, 4, 5]


def test_a_text_of_which_a_lossy_tokenizer_leaves_nothing(loaded):
    teacher = loaded["sentencepiece_unigram"]
    for text in ("", "  "):
        document = aligned({"text": text}, ByteTokenizer(), teacher, prepend_bos=True, append_eos=True)
        assert len(document.teacher) == 0
        assert not document.alignment.student.any()
        assert len(document.supervised) == 0


def test_completions_are_compared_and_prompts_are_not():
    record = {"prompt": "ab", "completion": "cd"}
    document = aligned(record, prepend_bos=True, append_eos=True)
    assert document.supervised.tolist() == [False, False, False, True, True, True]
    # No word ends inside either part, but a part ends one.
    words = aligned(record, prepend_bos=True, append_eos=True, chunks="words")
    assert words.alignment.student.tolist() == [1, 2, 2, 3, 3, 4]
    assert words.supervised.tolist() == [False, False, True, True]


def test_a_prompt_of_which_a_lossy_tokenizer_leaves_nothing(loaded):
    """Its bytes are passed all the same: they go with the first token of the completion."""
    sides = (ByteTokenizer(), loaded["sentencepiece_unigram"])
    document = aligned({"prompt": "   ", "completion": "a b c"}, *sides, prepend_bos=True)
    assert b"".join(spelled(document, sides)[0]) == b" b c"
    first = document.alignment.student == document.alignment.student[1]
    assert bytes(document.student.ids[first].astype(np.uint8)) == b"   a"


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(prompt=TEXTS, completion=TEXTS)
def test_chunks_of_pairs_hold_the_same_bytes(loaded, prompt, completion):
    sides = (loaded["byte_level"], ByteTokenizer())
    record = {"prompt": prompt, "completion": completion + "x"}
    document = aligned(record, *sides, prepend_bos=True, append_eos=True)
    # Ids of framing tokens differ in how they are spelled; they are the first chunk and the last one.
    student, teacher = (side[1:-1] for side in spelled(document, sides, supervised=False))
    assert student == teacher
    assert b"".join(student) == (prompt + completion + "x").encode()
    student, teacher = (side[:-1] for side in spelled(document, sides))
    assert student == teacher
    assert b"".join(student) == (completion + "x").encode()


CHATS = {
    "llama3": ByteTokenizer(LLAMA3_SPECIAL, chat_template=LLAMA3),
    "gemma": ByteTokenizer(GEMMA_SPECIAL, chat_template=GEMMA),
}
STUDENT = ByteTokenizer(chat_template=CHATML)


def test_conversations_of_chatml_and_llama3():
    sides = (STUDENT, CHATS["llama3"])
    document = aligned({"messages": TURNS}, *sides)
    every = [b"".join(side) for side in spelled(document, sides, supervised=False)]
    assert every == [
        b"useruser asks \xc3\xa9?Yes<|im_end|>AndNo \xf0\x9f\x98\x80<|im_end|>",
        b"useruser asks \xc3\xa9?Yes<|eot_id|>AndNo \xf0\x9f\x98\x80<|eot_id|>",
    ]
    compared = [b"".join(side) for side in spelled(document, sides)]
    assert compared == [
        b"Yes<|im_end|>No \xf0\x9f\x98\x80<|im_end|>",
        b"Yes<|eot_id|>No \xf0\x9f\x98\x80<|eot_id|>",
    ]


def test_conversations_where_one_template_has_no_system_role():
    sides = (STUDENT, CHATS["gemma"])
    compared = spelled(aligned({"messages": TURNS}, *sides), sides)
    assert b"".join(compared[0]) == b"Yes<|im_end|>No \xf0\x9f\x98\x80<|im_end|>"
    assert b"".join(compared[1]) == b"Yes<end_of_turn>No \xf0\x9f\x98\x80<end_of_turn>"
    every = spelled(aligned({"messages": TURNS}, *sides), sides, supervised=False)
    assert b"".join(every[1]).startswith(b"useruser asks"), "the system's words are found in the user's turn"


@pytest.mark.parametrize("teacher", CHATS)
def test_tokens_and_losses_of_conversations_are_those_of_each_side_alone(teacher):
    sides = (STUDENT, CHATS[teacher])
    document = aligned({"messages": TURNS}, *sides)
    for (tokens, chunks), tokenizer in zip(document.sides, sides, strict=True):
        ids, supervised, text_bytes = ChatFormat(tokenizer).supervise(TURNS)
        np.testing.assert_array_equal(tokens.ids, ids)
        np.testing.assert_array_equal(tokens.supervised, supervised)
        np.testing.assert_array_equal(tokens.text_bytes, text_bytes)
        assert (np.diff(chunks[chunks > 0]) >= 0).all()


def test_white_space_that_one_template_strips_is_in_no_chunk():
    document = aligned({"messages": TURNS[:3]}, STUDENT, CHATS["llama3"])
    said = np.flatnonzero(document.student.supervised)
    assert bytes(document.student.ids[said[:-1]].astype(np.uint8)) == b" Yes \n"
    assert (document.alignment.student[said] > 0).tolist() == [False, True, True, True, False, False, True]


def test_a_content_that_is_also_in_a_header_is_found_in_its_place():
    contents = ChatFormat(STUDENT).locate(TURNS).contents
    text = ChatFormat(STUDENT).render(TURNS).encode()
    assert [text[start:end].decode() for start, end in contents] == [turn["content"].strip() for turn in TURNS]
    assert text[: contents[0, 0]].endswith(b"system\n")
    assert text[: contents[1, 0]].endswith(b"<|im_start|>user\n")


def test_contents_that_a_template_does_not_write_as_they_are_are_in_no_chunk():
    """Escaped, left out, or absent on one side: the rest of the conversation is aligned all the same."""
    template = CHATML.replace("message['content'] +", "(message['content'] | string | replace('s', 'S')) +")
    sides = (STUDENT, ByteTokenizer(chat_template=template))
    turns = [*TURNS[:2], {"role": "assistant", "content": ""}, TURNS[3], TURNS[4]]
    document = aligned({"messages": turns}, *sides)
    assert [b"".join(side) for side in spelled(document, sides, supervised=False)] == [
        b"AndNo \xf0\x9f\x98\x80<|im_end|>"
    ] * 2
    assert ChatFormat(STUDENT).locate(turns).contents[2].tolist() == [-1, -1]
    assert ChatFormat(STUDENT).locate(turns).turn_ends[2] == -1


def test_a_template_that_looks_at_its_contents_is_read_as_it_is():
    """Marks in the text would change what it writes: such a message is left out, not guessed."""
    template = CHATML.replace(
        "message['content'] +", "('!' if message['content'][0] == 'A' else '') + message['content'] +"
    )
    form = ChatFormat(ByteTokenizer(chat_template=template))
    assert (form.locate(TURNS).contents[:, 0] >= 0).tolist() == [True, True, True, False, True]


def test_marks_in_a_text_misplace_nothing():
    turns = [{"role": "user", "content": "a\ufdd2b"}, {"role": "assistant", "content": "c\ufdd3"}, *TURNS[3:]]
    contents = ChatFormat(STUDENT).locate(turns).contents
    assert (contents >= 0).all(axis=1).tolist() == [True, False, False, False]
    assert ChatFormat(STUDENT).render(turns).encode()[slice(*contents[0])].decode() == "a\ufdd2b"
    assert (ChatFormat(STUDENT).locate(turns[2:]).contents >= 0).all()


def test_a_token_that_straddles_the_border_of_a_content_spoils_its_chunk(loaded):
    template = (
        "{% for message in messages %}{{ message.role + ': ' + message.content + '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    base = loaded["byte_level"]
    student = HuggingFaceTokenizer(base.definition, base.special, template)
    turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "the dog"}]
    sides = (student, STUDENT)
    document = aligned({"messages": turns}, *sides)
    every, compared = (spelled(document, sides, supervised=flag) for flag in (False, True))
    assert b" the" in [base.token_bytes()[i] for i in document.student.ids], "the space is the template's"
    assert every[1] == [b"x", b"the", b" dog", b"<|im_end|>"]
    assert every[0][1] == b" the"
    assert compared[1] == [b" dog", b"<|im_end|>"]


def test_the_end_of_a_turn_is_the_one_after_its_words():
    located = ChatFormat(CHATS["gemma"]).locate(TURNS)
    ends = located.turn_ends
    assert ends[[0, 1, 3]].tolist() == [-1, -1, -1], "only the assistant's turns"
    assert (located.ids[ends[[2, 4]]] == CHATS["gemma"].special.all["<end_of_turn>"]).all()
    assert located.offsets[ends[2], 0] == located.contents[2, 1]
    assert located.contents[2, 1] < located.offsets[ends[2], 1] <= located.contents[3, 0]


def test_turns_without_a_token_that_ends_them():
    template = (
        "{% for message in messages %}{{ '[' + message.content + ']' if message.role == 'user' else message.content }}"
        "{% endfor %}"
    )
    sides = (STUDENT, ByteTokenizer(chat_template=template))
    turns = TURNS[1:]
    document = aligned({"messages": turns}, *sides)
    assert [b"".join(side) for side in spelled(document, sides)] == [b"YesNo \xf0\x9f\x98\x80"] * 2
    ends = document.student.ids == STUDENT.special.all["<|im_end|>"]
    assert not document.alignment.student[ends].any()


def test_an_end_after_two_answers_is_the_second_ones():
    template = (
        "{% for message in messages %}{% if message.role == 'user' %}{{ message.content }}{% else %}{% generation %}"
        "{{ message.content }}{{ eos_token if loop.last else '' }}{% endgeneration %}{% endif %}{% endfor %}"
    )
    turns = [{"role": "user", "content": "a"}, *({"role": "assistant", "content": text} for text in "bc")]
    located = ChatFormat(ByteTokenizer(chat_template=template)).locate(turns)
    assert located.supervised.tolist() == [False, True, True, True]
    assert located.turn_ends.tolist() == [-1, -1, 3]


def test_a_conversation_that_one_template_refuses_is_named():
    teacher = ByteTokenizer(chat_template="{{ raise_exception('no') }}")
    with pytest.raises(ChatTemplateError, match=r"no\. Change the conversation.*The record begins: {.messages"):
        aligned({"messages": TURNS}, STUDENT, teacher)
    with pytest.raises(DataError, match="'messages' is \\[\\]"):
        aligned({"messages": []}, STUDENT, STUDENT)


def test_words_of_conversations_end_with_the_turn():
    sides = (STUDENT, CHATS["llama3"])
    turns = [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "two words"}]
    document = aligned({"messages": turns}, *sides, chunks="words")
    assert spelled(document, sides, supervised=False) == [
        [b"a", b" b", b"two", b" words", b"<|im_end|>"],
        [b"a", b" b", b"two", b" words", b"<|eot_id|>"],
    ]


def test_records_of_all_kinds_together_are_those_of_each_alone():
    make = AlignedTokenizer(STUDENT, CHATS["gemma"], prepend_bos=True, append_eos=True)
    records = [{"text": "one"}, {"messages": TURNS}, {"text": ""}, {"prompt": "p", "completion": "c"}, {"text": "x y"}]
    for record, document in zip(records, make(records, ["text"] * 5), strict=True):
        (alone,) = make([record], ["text"])
        np.testing.assert_array_equal(document.supervised, alone.supervised)
        for (tokens, chunks), (own, wanted) in zip(document.sides, alone.sides, strict=True):
            np.testing.assert_array_equal(tokens.ids, own.ids)
            np.testing.assert_array_equal(chunks, wanted)
