"""What a path holds: roles, templates, GGUF vocabularies, saving and loading again, and refusals."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
from gguf import GGUFWriter
from sentencepiece import sentencepiece_model_pb2

from jaxdistill.tokenizers import ByteTokenizer, TokenizerError, load_tokenizer

ALPHABET_BYTES = [*range(33, 127), *range(161, 173), *range(174, 256)]
TEXTS = [
    "the quick dog",
    " 12  345\n",
    "Café 😀 東京",
    "<|im_start|>user\nhi<|im_end|>\n",
    "",
    "\t",
    "e\u0301",
    "a<s>b</s><unk> <0x41>",
]


def same_ids(left, right, *, parse_special=False):
    for text in TEXTS:
        np.testing.assert_array_equal(
            left.encode(text, parse_special=parse_special).ids, right.encode(text, parse_special=parse_special).ids
        )


def byte_characters() -> list[str]:
    """GPT-2's alphabet by its definition: printable Latin-1 stands for itself, the rest is shifted up to 256."""
    shifted = iter(range(256, 512))
    return [chr(byte) if byte in ALPHABET_BYTES else chr(next(shifted)) for byte in range(256)]


def gguf_bpe(**changes) -> dict:
    """Metadata of a byte-level vocabulary with seven merges."""
    merges = ["Ġ t", "h e", "Ġt he", "Ġ Ġ", "1 2", "12 3", "123 4"]
    tokens = ["<|endoftext|>", "<|im_end|>", *byte_characters(), *(merge.replace(" ", "") for merge in merges)]
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3, 3] + [1] * (len(tokens) - 2),
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.padding_token_id": 1,
        "tokenizer.chat_template": "{{ messages }}",
    }
    return {key: value for key, value in (metadata | changes).items() if value is not None}


def gguf_file(path, metadata: dict):
    writer = GGUFWriter(path, "llama")
    for key, value in metadata.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        else:
            writer.add_string(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def test_roles_and_template_come_from_the_directory(places, tmp_path):
    tokenizer = load_tokenizer(places["byte_level"])
    assert (tokenizer.special.bos, tokenizer.special.eos, tokenizer.special.pad) == (1, 0, None)
    assert tokenizer.special.stop == {0, 2}
    assert tokenizer.special.all == {"<|endoftext|>": 0, "<|im_start|>": 1, "<|im_end|>": 2}
    assert tokenizer.chat_template is None
    for name in ("tokenizer.json",):
        (tmp_path / name).write_bytes((places["byte_level"] / name).read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "from the config"}))
    assert load_tokenizer(tmp_path).chat_template == "from the config"
    named = [{"name": "tools", "template": "no"}, {"name": "default", "template": "yes"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert load_tokenizer(tmp_path).chat_template == "yes"
    (tmp_path / "chat_template.jinja").write_text("from its own file")
    assert load_tokenizer(tmp_path / "tokenizer.json").chat_template == "from its own file"
    assert load_tokenizer(tmp_path).special.eos is None, "nothing is guessed"


def test_added_tokens_of_the_config_get_their_ids(places, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes((places["byte_level"] / "tokenizer.json").read_bytes())
    size = load_tokenizer(tmp_path).vocab_size
    added = {"content": "<|extra|>", "special": True, "normalized": False}
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"added_tokens_decoder": {str(size): added}}))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.vocab_size == size + 1
    assert tokenizer.encode("<|extra|>", parse_special=True).ids.tolist() == [size]
    assert size not in tokenizer.encode("<|extra|>").ids
    config.write_text(json.dumps({"added_tokens_decoder": {str(size + 7): added}}))
    with pytest.raises(TokenizerError, match=rf"'<\|extra\|>' the id {size + 7}, but the next free id is {size}"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "kind", ["bytes", "byte_level", "byte_level_nfc", "word_piece", "sentencepiece_bpe", "sentencepiece_unigram"]
)
def test_what_is_saved_gives_equal_ids(places, tmp_path, kind):
    tokenizer = load_tokenizer(places[kind])
    tokenizer.save(tmp_path)
    again = load_tokenizer(tmp_path)
    same_ids(tokenizer, again)
    same_ids(tokenizer, again, parse_special=True)
    assert again.special == tokenizer.special
    if kind.startswith("sentencepiece"):
        model = load_tokenizer(tmp_path / "tokenizer.model")
        assert model.fingerprint == tokenizer.fingerprint
    else:
        assert again.fingerprint == tokenizer.fingerprint
    assert not list(tmp_path.glob("*tmp*")), "no temporary files are left"


def test_fingerprints_are_stable_and_distinct(places):
    prints = {kind: load_tokenizer(place).fingerprint for kind, place in places.items()}
    assert len(set(prints.values())) == len(prints)
    script = "import sys; from jaxdistill.tokenizers import load_tokenizer as f; print(f(sys.argv[1]).fingerprint)"
    command = [sys.executable, "-c", script, str(places["byte_level"])]
    other = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    assert other == prints["byte_level"]


def test_byte_tokenizer():
    tokenizer = load_tokenizer("bytes")
    assert tokenizer.encode("aé").ids.tolist() == [97, 0xC3, 0xA9]
    assert (tokenizer.special.bos, tokenizer.special.eos, tokenizer.special.pad) == (256, 257, 258)
    assert tokenizer.special.stop == {257, 260}
    assert tokenizer.decode([0xC3]) == "\ufffd"
    assert ByteTokenizer(()).vocab_size == 256
    assert ByteTokenizer(()).encode("<eos>", parse_special=True).ids.tolist() == list(b"<eos>")


def test_gguf_byte_level(tmp_path):
    tokenizer = load_tokenizer(gguf_file(tmp_path / "model.gguf", gguf_bpe()))
    names = gguf_bpe()["tokenizer.ggml.tokens"]
    assert (tokenizer.special.bos, tokenizer.special.eos, tokenizer.special.pad) == (0, 1, 1)
    assert tokenizer.special.stop == {0, 1}
    assert tokenizer.chat_template == "{{ messages }}"

    def spelled(text, **flags):
        return [names[token] for token in tokenizer.encode(text, **flags).ids]

    # Hand-made: "smollm" cuts out every digit first, so both spaces before it stay together; " the" merges twice.
    assert spelled("x the  12") == ["x", "Ġthe", "ĠĠ", "1", "2"]
    # Without digits, the last space goes with the word.
    assert spelled("x  the") == ["x", "Ġ", "Ġthe"]
    assert spelled("x<|im_end|>", parse_special=True) == ["x", "<|im_end|>"]
    assert spelled("<|im_end|>") == list("<|im_end|>")


@pytest.mark.parametrize(
    ("pre", "expected"),
    [
        ("gpt-2", ["Ġ", "Ġ", "1234"]),
        ("llama-bpe", ["Ġ", "Ġ", "123", "4"]),
        ("qwen2", ["Ġ", "Ġ", "1", "2", "3", "4"]),
    ],
)
def test_pre_tokenizers_differ_where_they_should(tmp_path, pre, expected):
    metadata = gguf_bpe(**{"tokenizer.ggml.pre": pre})
    tokenizer = load_tokenizer(gguf_file(tmp_path / "model.gguf", metadata))
    names = metadata["tokenizer.ggml.tokens"]
    assert [names[token] for token in tokenizer.encode("  1234").ids] == expected
    composed = tokenizer.decode(tokenizer.encode("e\u0301").ids)
    assert composed == ("\u00e9" if pre == "qwen2" else "e\u0301"), "Qwen's tokenizer composes characters (NFC)"


def test_gguf_sentencepiece_equals_the_model(places, tmp_path):
    """The vocabulary of a SentencePiece model through GGUF metadata gives the same ids as the model."""
    model = load_tokenizer(places["sentencepiece_bpe"])
    content = (places["sentencepiece_bpe"] / "tokenizer.model").read_bytes()
    proto = sentencepiece_model_pb2.ModelProto.FromString(content)
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [piece.piece for piece in proto.pieces],
        "tokenizer.ggml.scores": [piece.score for piece in proto.pieces],
        "tokenizer.ggml.token_type": [piece.type for piece in proto.pieces],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }
    tokenizer = load_tokenizer(gguf_file(tmp_path / "model.gguf", metadata))
    same_ids(tokenizer, model)
    same_ids(tokenizer, model, parse_special=True)
    assert tokenizer.special == model.special
    tokenizer.save(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "tokenizer.json").read_text())
    assert saved["post_processor"]["single"][0]["SpecialToken"]["id"] == "<s>", "add_bos_token defaults to true here"
    same_ids(load_tokenizer(tmp_path / "saved"), model)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer.ggml.model": None}, "has no tokenizer"),
        ({"tokenizer.ggml.tokens": None}, "has no tokenizer"),
        ({"tokenizer.ggml.model": "t5"}, r"tokenizer.ggml.model = 't5'; supported: gpt2, llama"),
        ({"tokenizer.ggml.pre": "tekken"}, r"tokenizer.ggml.pre = 'tekken'; supported: gpt-2, smollm"),
        ({"tokenizer.ggml.pre": None}, r"tokenizer.ggml.pre = None; supported"),
        ({"tokenizer.ggml.token_type": [1]}, "265 tokens but 1 token types"),
        ({"tokenizer.ggml.model": "llama"}, "265 tokens but 0 scores"),
        ({"tokenizer.ggml.merges": ["q zz"]}, "is not a tokenizer.json that the `tokenizers` library reads"),
        ({"tokenizer.ggml.tokens": ["a", "a"], "tokenizer.ggml.token_type": [1, 1]}, "lists the token 'a' twice"),
    ],
)
def test_gguf_refusals(tmp_path, changes, message):
    with pytest.raises(TokenizerError, match=message):
        load_tokenizer(gguf_file(tmp_path / "model.gguf", gguf_bpe(**changes)))


def test_refusals_name_what_is_allowed(tmp_path):
    with pytest.raises(TokenizerError, match=r"there is no file .*absent; allowed: a directory with tokenizer.json"):
        load_tokenizer(tmp_path / "absent")
    with pytest.raises(TokenizerError, match=r"has no tokenizer; allowed"):
        load_tokenizer(tmp_path)
    unknown = tmp_path / "tokenizer.tiktoken"
    unknown.write_text("IQ== 0\n")
    with pytest.raises(TokenizerError, match=r"of an unknown kind \(it starts with b'IQ== 0"):
        load_tokenizer(unknown)


@pytest.mark.parametrize("content", ['{"version": "1.0", "model"', "[1]", "{}", '{"model": {"type": "Nothing"}}'])
def test_corrupt_tokenizer_json(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(TokenizerError, match=r"is not a tokenizer.json that the `tokenizers` library reads.*again"):
        load_tokenizer(tmp_path)


def test_corrupt_files_beside_it(places, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(b'{"\xff')
    with pytest.raises(TokenizerError, match="is not UTF-8 text"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes((places["byte_level"] / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(TokenizerError, match=r"tokenizer_config.json is not JSON"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(TokenizerError, match=r"holds list, not a JSON object"):
        load_tokenizer(tmp_path)


def test_decoders_without_bytes_are_refused(places, tmp_path):
    definition = json.loads((places["byte_level"] / "tokenizer.json").read_text())
    definition["decoder"] = {"type": "CTC", "pad_token": "<pad>", "word_delimiter_token": "|", "cleanup": True}
    (tmp_path / "tokenizer.json").write_text(json.dumps(definition))
    with pytest.raises(TokenizerError, match=r"decoder step 'CTC'.*supported: BPEDecoder"):
        load_tokenizer(tmp_path)


def test_sentencepiece_refusals(places, tmp_path):
    content = (places["sentencepiece_bpe"] / "tokenizer.model").read_bytes()
    (tmp_path / "tokenizer.model").write_bytes(content[: len(content) // 2])
    with pytest.raises(TokenizerError, match="is not a SentencePiece model"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(content)
    added = {"480": {"content": "<extra>", "special": True}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
    with pytest.raises(TokenizerError, match=r"has 480 pieces, but .* adds the tokens \{480: '<extra>'\}"):
        load_tokenizer(tmp_path)


def test_sentencepiece_without_a_json_form_is_not_exported(tmp_path):
    proto = sentencepiece_model_pb2.ModelProto()
    for piece, kind in (("<unk>", 2), ("a", 1), ("b", 5)):
        proto.pieces.add(piece=piece, score=0.0, type=kind)
    proto.trainer_spec.bos_id = proto.trainer_spec.eos_id = -1
    (tmp_path / "any_name").write_bytes(proto.SerializeToString())
    with pytest.raises(TokenizerError, match=r"unused pieces .* has no tokenizer.json form; keep its tokenizer.model"):
        load_tokenizer(tmp_path / "any_name").save(tmp_path / "out")
    proto.pieces[2].type = 1
    proto.trainer_spec.model_type = sentencepiece_model_pb2.TrainerSpec.CHAR
    (tmp_path / "any_name").write_bytes(proto.SerializeToString())
    with pytest.raises(TokenizerError, match=r"of type CHAR has no tokenizer.json form; supported: BPE, UNIGRAM"):
        load_tokenizer(tmp_path / "any_name").save(tmp_path / "out")
    assert not (tmp_path / "out").exists()
