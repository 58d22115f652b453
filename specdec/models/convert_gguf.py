"""Convert a GGUF checkpoint to a bf16 folder: `python -m specdec.models.convert_gguf IN OUT`."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig


def convert(gguf: Path, output: Path) -> None:
    """Write the model, tokenizer and chat template of a GGUF file to a folder."""
    # Without dequantize, the weights stay in GGUF's blocks, which safetensors cannot hold.
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
    )
    model.config.name_or_path = ""
    model.save_pretrained(output)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(output)


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
