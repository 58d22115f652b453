"""A program that says what all engines of a run share: the token ids of the prompts, and the CPU threads.

    python -m specdec.bench.peers.encode FOLDER

It reads a JSON list of prompts from stdin, and writes `{"token_ids", "threads"}`: the token ids of each
prompt as the user's turn in the model's chat template, and how many threads torch takes unless it is told
otherwise.
"""

from __future__ import annotations

import json
import sys


def main() -> None:
    """Encode the prompts on stdin for the model folder that the first argument names."""
    import torch
    from transformers import AutoTokenizer

    prompts = json.load(sys.stdin)
    token_ids = []
    if prompts:
        tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
        for prompt in prompts:
            turns = [{"role": "user", "content": prompt}]
            encoded = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)
            token_ids.append(list(encoded["input_ids"]))
    json.dump({"token_ids": token_ids, "threads": torch.get_num_threads()}, sys.stdout)


if __name__ == "__main__":
    main()
