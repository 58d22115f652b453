"""The peer `transformers`: a plain `generate()` loop, or one with prompt lookup.

python -m specdec.bench.peers.transformers_worker --model FOLDER --dtype bfloat16 --device cpu --threads 2
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click

from specdec.bench.peers.worker import (
    MAX_NGRAM_TOKENS,
    Reply,
    Request,
    Served,
    TokenClock,
    answer_passes,
    finish_reason,
    run,
)


class TransformersEngine:
    """A checkpoint run by `transformers`: batch 1, KV cache.

    Args:
        folder: Hugging Face model folder.
        dtype: torch data type of the weights, such as "bfloat16".
        device: torch device.
        lookup_tokens: draft tokens that each step copies from the text so far; 0: no speculation.
    """

    def __init__(self, folder: Path, dtype: str, device: str, lookup_tokens: int = 0) -> None:
        # Imported here: `--help` does without them.
        from transformers import AutoModelForCausalLM, GenerationConfig

        self._model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()
        eos = self._model.generation_config.eos_token_id
        self._eos_token_ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
        # A fresh configuration: the checkpoint's own sampling defaults would mix with ours.
        self._model.generation_config = GenerationConfig(
            eos_token_id=self._eos_token_ids or None, pad_token_id=(self._eos_token_ids or [0])[0]
        )
        self._lookup = (
            {"prompt_lookup_num_tokens": lookup_tokens, "max_matching_ngram_size": MAX_NGRAM_TOKENS}
            if lookup_tokens
            else {}
        )
        self._cache: Any = None

    def describe(self) -> Reply:
        """Return versions, threads and the type that the engine computes in."""
        import torch
        import transformers

        return {
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
            "threads": torch.get_num_threads(),
            "precision": str(self._model.dtype).removeprefix("torch."),
        }

    def generate(self, request: Request) -> Reply:
        """Answer a prompt; times are milliseconds from the call."""
        import torch

        clock = TokenClock()
        input_ids = torch.tensor([request["prompt_token_ids"]], device=self._model.device)
        torch.manual_seed(request["seed"])
        output = self._model.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=request["max_new_tokens"],
            use_cache=True,
            streamer=_Streamer(clock),
            **self._lookup,
            **_sampling(request["temperature"]),
        )
        token_ids = output[0, input_ids.shape[1] :].tolist()
        reason = finish_reason(token_ids, self._eos_token_ids)
        return {"token_ids": token_ids, "finish_reason": reason, **clock.times()}

    def fill_cache(self, token_ids: list[int]) -> None:
        """Let the cache hold these tokens and no others."""
        import torch
        from transformers import DynamicCache

        self._cache = DynamicCache(config=self._model.config)
        with torch.inference_mode():
            self._model(
                torch.tensor([token_ids], device=self._model.device),
                past_key_values=self._cache,
                logits_to_keep=1,
            )

    def time_pass(self, token_ids: list[int]) -> int:
        """Return the time of a pass over the cache, which keeps the first token, nanoseconds."""
        import torch

        started_ns = time.perf_counter_ns()
        with torch.inference_mode():
            output = self._model(
                torch.tensor([token_ids], device=self._model.device), past_key_values=self._cache
            )
            output.logits[0].argmax(-1).tolist()
        elapsed_ns = time.perf_counter_ns() - started_ns
        if len(token_ids) > 1:
            self._cache.crop(1 - len(token_ids))
        return elapsed_ns


class _Streamer:
    """Tells a clock of the tokens of `generate()`, which hands over the prompt first."""

    def __init__(self, clock: TokenClock) -> None:
        self._clock = clock
        self._has_prompt = False

    def put(self, token_ids: Any) -> None:
        if self._has_prompt:
            self._clock.note(token_ids.numel())
        self._has_prompt = True

    def end(self) -> None:
        """Do nothing; `generate()` calls it after the last token."""


def _sampling(temperature: float) -> dict[str, Any]:
    if temperature == 0:
        return {"do_sample": False}
    # top_k defaults to 50 in transformers; 0 samples from the whole vocabulary, as the gateway does.
    return {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}


@click.command()
@click.option("--model", required=True, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--dtype", required=True, help="Data type of the weights, such as bfloat16.")
@click.option("--device", required=True, help="Torch device.")
@click.option("--threads", type=int, required=True, help="CPU threads.")
@click.option("--lookup-tokens", type=int, default=0, help="Draft tokens of a step; 0: no prompt lookup.")
@click.option("--passes", is_flag=True, help="Run passes over a cache instead of answering prompts.")
def main(model: Path, dtype: str, device: str, threads: int, lookup_tokens: int, passes: bool) -> None:
    """Serve a model folder with transformers over stdin and stdout."""

    def load() -> Served:
        import torch

        torch.set_num_threads(threads)
        engine = TransformersEngine(model, dtype, device, lookup_tokens)
        return Served(engine.describe(), answer_passes(engine) if passes else engine.generate)

    run(load)


if __name__ == "__main__":
    main()
