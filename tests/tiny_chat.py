"""A tiny model that takes text: a tokenizer of words and a chat template."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %} end"


def save_tiny_chat_model(folder: Path) -> Path:
    """Save a random Llama whose tokenizer knows the words w0 to w126, and "end", which ends each prompt."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=128,
        bos_token_id=None,
        eos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    vocabulary = {**{f"w{i}": i for i in range(127)}, "end": 127}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": CHAT_TEMPLATE})
    )
    return folder


def greedy(folder: Path, input_ids: list[int], num_tokens: int) -> tuple[int, ...]:
    """Return the most probable tokens after a prompt, each by a pass over all tokens before it."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    token_ids = list(input_ids)
    with torch.no_grad():
        for _ in range(num_tokens):
            token_ids.append(int(model(torch.tensor([token_ids])).logits[0, -1].argmax()))
    return tuple(token_ids[len(input_ids) :])
