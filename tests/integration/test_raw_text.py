"""Raw text and its continuation, with a tokenizer that puts a space before a text, as SentencePiece's do."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from specdec.client import GenerateOptions
from tests.systems import running_system
from tests.tiny_models import VOCAB_SIZE

RAW = GenerateOptions(method="none", max_new_tokens=8, ignore_eos=True, raw=True)


@pytest.fixture
def spm_llama(tiny_llama: Path, tmp_path: Path) -> Path:
    """Return the tiny model with a tokenizer of words: each token is a space and a word, or is special."""
    model = shutil.copytree(tiny_llama, tmp_path / "spm")
    vocabulary = {"<s>": 0, **{f"\u2581w{number}": number for number in range(1, VOCAB_SIZE)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<s>"))
    tokenizer.add_special_tokens(["<s>"])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.save(str(model / "tokenizer.json"))
    return model


async def test_a_continuation_of_raw_text_begins_with_its_space(spm_llama: Path) -> None:
    async with running_system(spm_llama, "ngram") as system:
        answer = await system.client.generate("w5 w6 w7", RAW)
        assert answer.text == "".join(f" w{token_id}" for token_id in answer.token_ids)
        assert answer.usage.input_tokens == 4
        again = await system.client.generate("<s>w5 w6 w7", RAW)
        assert (again.usage.input_tokens, again.text) == (4, answer.text)
        # Token ids may be a chat's, whose answer begins a text.
        by_ids = await system.client.generate([0, 5, 6, 7], RAW)
        assert (by_ids.token_ids, by_ids.text) == (answer.token_ids, answer.text[1:])
