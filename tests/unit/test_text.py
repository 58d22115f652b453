"""Text in and out of the gateway: incremental decoding, stop strings, chat templates. The tokenizer has one
token per byte, so most characters and all stop strings span tokens."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, processors
from transformers import AutoTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from gateway.request.text import TextCodec
from gateway.request.text_stream import TextStream, TextToken
from specdec.contract.errors import InvalidArgumentError, NotFoundError
from specdec.contract.request_limits import (
    MAX_STOP_STRING_LENGTH,
    MAX_STOP_STRINGS,
    validate_stop_strings,
)
from specdec.models.embedded import DEFAULT_MODEL, prepare_default_model
from tests.tiny_models import BOS, EOS, VOCAB_SIZE, byte_tokenizer

REPLACEMENT = "\ufffd"
BYTE_IDS = {
    byte: byte_tokenizer().backend_tokenizer.token_to_id(character)
    for byte, character in bytes_to_unicode().items()
}
"""The token of each byte."""
PIECES = [
    b"a",
    b"\xe2\x82\xac",
    b"\xe2",
    b"\xe2\x82",
    b"\xf0\x9f\x98\x80",
    b"\xf0\x9f\x98",
    b"\xc3",
    b"\x80",
    b"\xff",
]
"""Characters, their beginnings, and bytes that begin none."""
CONVERSATIONS = [
    [("user", "Hello!")],
    [("system", "Answer in French."), ("user", "Good morning")],
    [("user", "Hi"), ("assistant", "你好 👋"), ("user", "é <s/> </ s>")],
]


@pytest.fixture(scope="module")
def codec(tiny_llama: Path) -> TextCodec:
    return TextCodec.load(str(tiny_llama))


def stream_out(
    codec: TextCodec, token_ids: Sequence[int], stops: Sequence[str] = (), continued: Sequence[int] = ()
) -> tuple[list[TextToken], bool]:
    """Push tokens until a stop string ends the text, or flush; return what was released, and whether it
    stopped.
    """
    stream = TextStream(codec, stops, continued)
    released: list[TextToken] = []
    for token_id in token_ids:
        released += stream.push(token_id)
        if stream.stopped:
            break
    else:
        released += stream.flush()
    assert [token.index for token in released] == list(range(stream.num_tokens))
    assert [token.token_id for token in released] == list(token_ids[: stream.num_tokens])
    return released, stream.stopped


def join(released: Sequence[TextToken]) -> str:
    return "".join(token.text for token in released)


def cut_at_first_stop(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """Cut a text where its first stop string appears as it arrives character by character; return what is
    left and whether it was cut.
    """
    for length in range(1, len(text) + 1):
        starts = [at for stop in stops if (at := text[:length].find(stop)) >= 0]
        if starts:
            return text[: min(starts)], True
    return text, False


class TestTextStream:
    @given(token_ids=st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=40))
    def test_any_tokens_join_to_the_decode_of_the_whole(self, codec: TextCodec, token_ids: list[int]) -> None:
        released, _ = stream_out(codec, token_ids)
        assert join(released) == codec.decode(token_ids)

    @given(text=st.text(max_size=30) | st.text(st.sampled_from("aé€你👩\u200d🚀e\u0301\u0308"), max_size=30))
    def test_whole_characters_only(self, codec: TextCodec, text: str) -> None:
        released, _ = stream_out(codec, codec.encode_text(text))
        assert join(released) == text
        if REPLACEMENT not in text:
            assert all(REPLACEMENT not in token.text for token in released)

    @given(text=st.text(st.characters(exclude_characters=REPLACEMENT, codec="utf-8"), min_size=1))
    def test_a_whole_character_is_released_at_once(self, codec: TextCodec, text: str) -> None:
        stream = TextStream(codec)
        for character in text:
            released = [token for token_id in codec.encode_text(character) for token in stream.push(token_id)]
            assert join(released) == character

    def test_half_a_character_is_held_and_flushed(self, codec: TextCodec) -> None:
        first, second, third = codec.encode_text("€")
        stream = TextStream(codec)
        assert stream.push(first) == []
        assert stream.push(second) == [TextToken(first, "", 0)]
        assert stream.push(third) == [TextToken(second, "", 1), TextToken(third, "€", 2)]
        assert stream.push(first) == []
        assert stream.flush() == [TextToken(first, REPLACEMENT, 3)]
        assert stream.flush() == []

    @given(prompt=st.text(max_size=4), token_ids=st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=12))
    def test_a_continuation_joins_to_the_decode_of_the_whole(
        self, codec: TextCodec, prompt: str, token_ids: list[int]
    ) -> None:
        continued = codec.encode_text(prompt)
        released, _ = stream_out(codec, token_ids, continued=continued)
        assert prompt + join(released) == codec.decode([*continued, *token_ids])

    def test_endless_garbage_is_not_held_for_ever(self, codec: TextCodec) -> None:
        stream = TextStream(codec)
        half = codec.encode_text("€")[0]
        released = [token for _ in range(50) for token in stream.push(half)]
        assert len(released) == 49
        assert len(join(released)) >= 47
        assert join(released) + join(stream.flush()) == REPLACEMENT * 50

    @given(data=st.binary(max_size=40) | st.lists(st.sampled_from(PIECES), max_size=12).map(b"".join))
    def test_bytes_that_form_no_character_stall_nothing(self, codec: TextCodec, data: bytes) -> None:
        stream = TextStream(codec)
        so_far = ""
        for length, byte in enumerate(data, start=1):
            so_far += join(stream.push(BYTE_IDS[byte]))
            whole = data[:length].decode(errors="replace")
            assert whole.startswith(so_far.rstrip(REPLACEMENT))
            assert len(whole) - len(so_far) <= 3
        assert so_far + join(stream.flush()) == data.decode(errors="replace")

    def test_each_token_costs_the_same_whatever_bytes_came_before(self, codec: TextCodec) -> None:
        decoded = []

        class CountingCodec(TextCodec):
            """Notes how many tokens are decoded."""

            def __init__(self) -> None:
                """Leave out the tokenizer."""

            def decode(self, token_ids: Sequence[int]) -> str:
                decoded.append(len(token_ids))
                return codec.decode(token_ids)

        half, continuation = codec.encode_text("é")
        for token_ids in ([half] * 400, [continuation] * 400, [half, *[EOS] * 400]):
            stream = TextStream(CountingCodec())
            for token_id in token_ids:
                stream.push(token_id)
            assert max(decoded) < 16
            assert sum(decoded) < 16 * 4 * len(token_ids)
            decoded.clear()

    def test_special_tokens_within_a_character_leave_it_whole(self, codec: TextCodec) -> None:
        first, second, third = codec.encode_text("€")
        released, _ = stream_out(codec, [first, *[EOS] * 9, second, EOS, third])
        assert join(released) == "€"

    def test_invalid_bytes_become_replacement_characters_where_they_are(self, codec: TextCodec) -> None:
        half = codec.encode_text("€")[:1]
        released, _ = stream_out(codec, [*half, *codec.encode_text("ab"), *half, *half])
        assert join(released) == f"{REPLACEMENT}ab{REPLACEMENT}{REPLACEMENT}"

    def test_special_tokens_have_no_text_and_are_not_held(self, codec: TextCodec) -> None:
        stream = TextStream(codec)
        (letter,) = codec.encode_text("a")
        assert stream.push(EOS) == [TextToken(EOS, "", 0)]
        assert stream.push(letter) == [TextToken(letter, "a", 1)]
        assert stream.push(EOS) == [TextToken(EOS, "", 2)]


@pytest.fixture(scope="module")
def words() -> TextCodec:
    """Return a codec whose tokens begin with a space, or are bytes where no token fits."""
    pieces = ["<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", "\u2581a", "b", "\u2581b"]
    tokenizer = Tokenizer(
        models.BPE(
            {piece: index for index, piece in enumerate(pieces)}, [("\u2581", "b")], byte_fallback=True
        )
    )
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    return TextCodec(tokenizer, "", {}, "")


class TestTokensOfWords:
    """Tokens as Llama 2 and Gemma have them: their text depends on where they stand."""

    @given(token_ids=st.lists(st.sampled_from([0, 1, 2 + 65, 2 + 32, 258, 259, 260, 261]), max_size=20))
    def test_tokens_join_to_the_decode_of_the_whole(self, words: TextCodec, token_ids: list[int]) -> None:
        released, _ = stream_out(words, token_ids)
        assert join(released) == words.decode(token_ids)

    @given(
        prompt=st.text(st.sampled_from("ab €"), min_size=1, max_size=6),
        token_ids=st.lists(st.sampled_from([0, 1, 2 + 65, 258, 259, 260, 261]), max_size=12),
    )
    def test_a_continuation_keeps_its_first_space(
        self, words: TextCodec, prompt: str, token_ids: list[int]
    ) -> None:
        continued = words.encode_text(prompt)
        released, _ = stream_out(words, token_ids, continued=continued)
        assert prompt + join(released) == words.decode([*continued, *token_ids])

    def test_what_begins_a_text_has_no_space_before_it(self, words: TextCodec) -> None:
        word = words.encode_text("b")[-1]
        assert join(stream_out(words, [word])[0]) == "b"
        assert join(stream_out(words, [word], continued=[0, 0])[0]) == "b"
        assert join(stream_out(words, [word], continued=[word, 0])[0]) == " b"

    def test_a_text_that_begins_with_the_beginning_token_gets_no_other(self, words: TextCodec) -> None:
        plain = words.encode_text("ab")
        assert plain.count(0) == 1
        assert words.encode_text("<s>ab").count(0) == 1
        assert words.encode_text("<s><s>ab").count(0) == 2
        assert words.encode_text("ab<s>").count(0) == 2

    @given(data=st.lists(st.sampled_from(PIECES), max_size=12).map(b"".join))
    def test_bytes_that_form_no_character_stall_nothing(self, words: TextCodec, data: bytes) -> None:
        stream = TextStream(words)
        token_ids = [2 + byte for byte in data]
        so_far = [token for token_id in token_ids for token in stream.push(token_id)]
        # Each byte is a U+FFFD of its own; at most three may still begin a character.
        assert len(token_ids) - len(so_far) <= 3
        assert [token.token_id for token in [*so_far, *stream.flush()]] == token_ids

    @given(text=st.text(st.sampled_from("ab €👋"), max_size=12))
    def test_text_gets_the_tokenizers_own_bos_and_comes_back(self, words: TextCodec, text: str) -> None:
        token_ids = words.encode_text(text)
        assert token_ids[0] == 0
        assert join(stream_out(words, token_ids)[0]) == text


class TestStopStrings:
    @given(
        text=st.text(st.sampled_from("ab€"), max_size=14),
        stops=st.lists(st.text(st.sampled_from("ab€"), min_size=1, max_size=4), max_size=3),
    )
    def test_the_text_ends_before_the_first_stop_string(
        self, codec: TextCodec, text: str, stops: list[str]
    ) -> None:
        released, stopped = stream_out(codec, codec.encode_text(text), stops)
        assert (join(released), stopped) == cut_at_first_stop(text, stops)

    @given(
        text=st.text(st.sampled_from("ab"), max_size=14),
        stops=st.lists(st.text(st.sampled_from("abc"), min_size=1, max_size=4), max_size=3),
    )
    def test_no_more_is_held_than_could_become_a_stop_string(
        self, codec: TextCodec, text: str, stops: list[str]
    ) -> None:
        stream = TextStream(codec, stops)
        so_far = ""
        for length, token_id in enumerate(codec.encode_text(text), start=1):
            so_far += join(stream.push(token_id))
            if stream.stopped:
                return
            held = text[len(so_far) : length]
            assert not held or any(stop.startswith(held) for stop in stops)
            longer = [text[start:length] for start in range(len(so_far))]
            assert not any(stop.startswith(suffix) for stop in stops for suffix in longer)

    def test_a_stop_string_that_spans_tokens(self, codec: TextCodec) -> None:
        stream = TextStream(codec, ["END"])
        released = [stream.push(token_id) for token_id in codec.encode_text("okEND")]
        assert [join(tokens) for tokens in released] == ["o", "k", "", "", ""]
        assert [len(tokens) for tokens in released] == [1, 1, 0, 0, 3]
        assert stream.stopped

    def test_held_text_that_turns_out_to_be_no_stop_string_is_released(self, codec: TextCodec) -> None:
        stream = TextStream(codec, ["END"])
        released = [join(stream.push(token_id)) for token_id in codec.encode_text("ENEND.")[:4]]
        assert released == ["", "", "EN", ""]
        assert not stream.stopped
        assert join(stream.flush()) == "EN"

    def test_one_token_may_hold_text_stop_string_and_more(self, tmp_path: Path) -> None:
        class WordCodec(TextCodec):
            """Decodes by looking words up."""

            def __init__(self) -> None:
                """Leave out the tokenizer."""

            def decode(self, token_ids: Sequence[int]) -> str:
                return "".join(["before STOP after", "tail", "ST", "OP!"][token_id] for token_id in token_ids)

        codec = WordCodec()
        assert stream_out(codec, [1, 0], ["STOP"]) == (
            [TextToken(1, "tail", 0), TextToken(0, "before ", 1)],
            True,
        )
        assert stream_out(codec, [1, 2, 3], ["STOP"]) == (
            [TextToken(1, "tail", 0), TextToken(2, "", 1), TextToken(3, "", 2)],
            True,
        )

    def test_the_end_may_complete_a_stop_string(self, codec: TextCodec) -> None:
        # U+FFFD itself looks like half a character until nothing can follow.
        stream = TextStream(codec, [f"a{REPLACEMENT}"])
        released = [
            token for token_id in codec.encode_text(f"xa{REPLACEMENT}") for token in stream.push(token_id)
        ]
        assert join(released) == "x"
        assert not stream.stopped
        released += stream.flush()
        assert stream.stopped
        assert join(released) == "x"
        assert len(released) == stream.num_tokens

    @pytest.mark.parametrize(
        "stops",
        [[""], ["x" * (MAX_STOP_STRING_LENGTH + 1)], [str(number) for number in range(MAX_STOP_STRINGS + 1)]],
    )
    def test_limits(self, stops: list[str]) -> None:
        with pytest.raises(InvalidArgumentError) as caught:
            validate_stop_strings(stops)
        assert caught.value.field == "stop_strings"

    def test_the_longest_and_the_most_are_accepted(self) -> None:
        validate_stop_strings(["x" * MAX_STOP_STRING_LENGTH] * MAX_STOP_STRINGS)


def reference_ids(tokenizer: Any, conversation: Sequence[tuple[str, str]]) -> list[int]:
    """Return the token ids by transformers' own chat layout."""
    messages = [{"role": role, "content": content} for role, content in conversation]
    ids: list[int] = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    return ids


TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message.role }}: {{ message.content }}{{ eos_token }}"
    "{% endfor %}"
)
BOS_AS_DICT = {
    "content": "<s>",
    "lstrip": False,
    "normalized": False,
    "rstrip": False,
    "single_word": False,
}
LAYOUTS: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "template in a file": ({}, {"chat_template.jinja": TEMPLATE}),
    "template in tokenizer_config.json": ({"chat_template": TEMPLATE}, {}),
    "a file goes before it": ({"chat_template": "other"}, {"chat_template.jinja": TEMPLATE}),
    "named templates": (
        {
            "chat_template": [
                {"name": "rag", "template": "other"},
                {"name": "default", "template": TEMPLATE},
                {"name": "tool_use", "template": "other"},
            ]
        },
        {},
    ),
    "a special token as a dict": (
        {"bos_token": BOS_AS_DICT | {"__type": "AddedToken"}},
        {"chat_template.jinja": TEMPLATE},
    ),
    "special tokens in a file of their own": (
        {"bos_token": "left out", "eos_token": "<unk>"},
        {
            "chat_template.jinja": TEMPLATE,
            "special_tokens_map.json": json.dumps({"bos_token": BOS_AS_DICT, "eos_token": "</s>"}),
        },
    ),
    "which is not asked where all tokens are listed": (
        {"added_tokens_decoder": {"256": BOS_AS_DICT | {"special": True}}},
        {
            "chat_template.jinja": TEMPLATE,
            "special_tokens_map.json": json.dumps({"bos_token": "<unk>", "eos_token": "<unk>"}),
        },
    ),
    "no such token": ({"bos_token": None}, {"chat_template.jinja": TEMPLATE}),
    "tokens of the model's own": (
        {"extra_special_tokens": {"image_token": "<pad>"}, "add_bos_token": True, "sound_token": "<unk>"},
        {
            "chat_template.jinja": TEMPLATE
            + "{{ image_token }}{{ sound_token }}{% if add_bos_token %}other{% endif %}"
        },
    ),
    "a template that looks for tools": (
        {},
        {
            "chat_template.jinja": TEMPLATE
            + "{% if tools is not none or documents is not none or tools is undefined %}other{% endif %}"
        },
    ),
    "a template that marks answers": (
        {},
        {
            "chat_template.jinja": "{% for message in messages %}{% if message.role == 'assistant' %}"
            "{% generation %}{{ message.content }}{{ eos_token }}{% endgeneration %}"
            "{% else %}{{ message.content }}{% endif %}{% endfor %}"
        },
    ),
}
"""How checkpoints keep templates and special tokens: changes of tokenizer_config.json, files beside it."""


def codec_with_template(template: str) -> TextCodec:
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    return TextCodec(byte_tokenizer().backend_tokenizer, template, special, "")


class TestTextCodec:
    def test_chat_equals_transformers(self, tiny_llama: Path, codec: TextCodec) -> None:
        tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
        for conversation in CONVERSATIONS:
            assert codec.encode_chat(conversation) == reference_ids(tokenizer, conversation)

    @pytest.mark.default_model
    def test_special_tokens_are_known_by_their_text(self) -> None:
        codec = TextCodec.load(DEFAULT_MODEL)
        token_id = codec.special_token("<|im_end|>")
        assert token_id is not None
        assert codec.encode_text("<|im_end|>") == [token_id]
        assert codec.decode([token_id]) == ""
        assert codec.special_token("Hello") is codec.special_token("") is None

    @pytest.mark.default_model
    def test_default_models_chat_equals_transformers(self) -> None:
        codec, folder = TextCodec.load(DEFAULT_MODEL), prepare_default_model()
        tokenizer = AutoTokenizer.from_pretrained(folder)
        for conversation in CONVERSATIONS:
            assert codec.encode_chat(conversation) == reference_ids(tokenizer, conversation)

    def test_a_template_has_what_transformers_offers(self, tiny_llama: Path, tmp_path: Path) -> None:
        template = (
            "{{ bos_token }}\n"
            "{% for message in messages %}\n"
            "  {% if message.content == 'skip' %}\n    {% continue %}\n  {% endif %}\n"
            "{{ message | tojson }}{{ loop.index }}{{ eos_token }}\n"
            "{% endfor %}\n"
            "{% if not strftime_now('%Y').isdigit() %}{{ raise_exception('no year') }}{% endif %}\n"
        )
        tokenizer = byte_tokenizer()
        tokenizer.chat_template = template
        tokenizer.save_pretrained(tmp_path)
        (tmp_path / "config.json").write_text((tiny_llama / "config.json").read_text())
        conversation = [("user", "é"), ("assistant", "skip"), ("user", 'a "quote"')]
        ids = TextCodec.load(str(tmp_path)).encode_chat(conversation)
        assert ids == reference_ids(AutoTokenizer.from_pretrained(tmp_path), conversation)

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_every_layout_of_a_checkpoint_is_read_as_transformers_reads_it(
        self, layout: str, tiny_llama: Path, tmp_path: Path
    ) -> None:
        tokenizer = byte_tokenizer()
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            "<s> $A </s>", special_tokens=[("<s>", BOS), ("</s>", EOS)]
        )
        tokenizer.save_pretrained(tmp_path)
        (tmp_path / "config.json").write_text((tiny_llama / "config.json").read_text())
        changes, files = LAYOUTS[layout]
        path = tmp_path / "tokenizer_config.json"
        config = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({key: value for key, value in config.items() if value != "left out"}))
        (tmp_path / "chat_template.jinja").unlink()
        for name, content in files.items():
            (tmp_path / name).write_text(content)
        codec, reference = TextCodec.load(str(tmp_path)), AutoTokenizer.from_pretrained(tmp_path)
        for conversation in CONVERSATIONS:
            assert codec.encode_chat(conversation) == reference_ids(reference, conversation)
        assert codec.encode_text("é") == reference("é").input_ids
        assert codec.encode_text("é")[0] == BOS

    def test_a_template_without_the_name_default_is_none(self, tiny_llama: Path, tmp_path: Path) -> None:
        byte_tokenizer().save_pretrained(tmp_path)
        (tmp_path / "config.json").write_text((tiny_llama / "config.json").read_text())
        (tmp_path / "chat_template.jinja").unlink()
        config = {"chat_template": [{"name": "rag", "template": "other"}]}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        with pytest.raises(InvalidArgumentError, match="no chat template"):
            TextCodec.load(str(tmp_path)).encode_chat([("user", "hi")])

    def test_raw_text_and_back(self, tiny_llama: Path, codec: TextCodec) -> None:
        text = "naïve 你好 👋"
        ids = codec.encode_text(text)
        assert ids == AutoTokenizer.from_pretrained(tiny_llama)(text).input_ids
        assert len(ids) == len(text.encode())
        assert codec.decode([*ids, EOS]) == text

    def test_no_messages(self, codec: TextCodec) -> None:
        with pytest.raises(InvalidArgumentError, match="no messages") as caught:
            codec.encode_chat([])
        assert caught.value.reason == "EMPTY_PROMPT"

    def test_unknown_role(self, codec: TextCodec) -> None:
        with pytest.raises(InvalidArgumentError, match=r"'robot'.*system, user, assistant") as caught:
            codec.encode_chat([("user", "hi"), ("robot", "beep")])
        assert caught.value.field == "chat.messages.role"

    @pytest.mark.parametrize(
        ("template", "reason"),
        [
            ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
            ("{{ nobody.knows }}", "nobody"),
            ("{{ messages[0].content + 1 }}", "str"),
        ],
    )
    def test_a_template_that_refuses(self, template: str, reason: str) -> None:
        with pytest.raises(InvalidArgumentError, match=reason) as caught:
            codec_with_template(template).encode_chat([("user", "hi")])
        assert caught.value.field == "chat"

    def test_a_template_cannot_reach_out_of_its_sandbox(self) -> None:
        escape = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
        with pytest.raises(InvalidArgumentError):
            codec_with_template(escape).encode_chat([("user", "hi")])

    def test_no_template(self) -> None:
        codec = codec_with_template("")
        with pytest.raises(InvalidArgumentError, match="no chat template"):
            codec.encode_chat([("user", "hi")])
        assert codec.decode(codec.encode_text("hi")) == "hi"

    def test_no_tokenizer(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text("{}")
        with pytest.raises(NotFoundError, match=r"tokenizer\.json"):
            TextCodec.load(str(tmp_path))
