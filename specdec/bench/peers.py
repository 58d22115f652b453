"""The worker behind `--peers transformers`: a plain `generate()` loop in another process.

    python -m specdec.bench.peers --model FOLDER --dtype bfloat16 --device cpu

It speaks JSON lines. It writes `{"ready": true}` once the model is loaded, then answers each line of stdin,
`{"prompt" or "token_ids", "max_new_tokens", "temperature", "seed"}`, by one line on stdout:
`{"token_ids", "input_tokens", "ttft_ms", "tpot_ms", "total_ms", "finish_reason"}`, or `{"error"}`.
A line `{"context_token_ids"}` fills a cache instead, and `{"pass_token_ids"}` then times one forward pass
over it: `{"pass_ns"}`.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any, TextIO

import click


class TokenClock:
    """A streamer for `generate()` that notes when each token arrives."""

    def __init__(self) -> None:
        self._arrivals_s: list[float] = []

    def put(self, value: object) -> None:
        """Note the time; called with the prompt first, then with every token."""
        self._arrivals_s.append(time.perf_counter())

    def end(self) -> None:
        """Do nothing; called after the last token."""

    @property
    def token_arrivals_s(self) -> list[float]:
        """Times of the emitted tokens, seconds on the monotonic clock."""
        return self._arrivals_s[1:]


class TransformersPeer:
    """A checkpoint served by `transformers`: batch 1, KV cache, no speculation.

    Args:
        folder: Hugging Face model folder; without a tokenizer in it, requests must carry token ids.
        dtype: torch data type of the weights, such as "bfloat16".
        device: torch device.
    """

    def __init__(self, folder: Path, dtype: str, device: str) -> None:
        # Imported here so that the parent process and `--help` never load them.
        from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

        has_tokenizer = (folder / "tokenizer.json").is_file()
        self._tokenizer: Any = AutoTokenizer.from_pretrained(folder) if has_tokenizer else None
        self._model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()
        eos = self._model.generation_config.eos_token_id
        eos_ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
        self._eos_token_ids = frozenset(eos_ids)
        # A fresh configuration: the checkpoint's own sampling defaults would mix with ours.
        self._model.generation_config = GenerationConfig(
            eos_token_id=eos_ids or None, pad_token_id=eos_ids[0] if eos_ids else 0
        )

        self._cache: Any = None

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Do what a request asks for: fill the cache, time a pass, or generate."""
        if "context_token_ids" in request:
            return self._fill_cache(request["context_token_ids"])
        if "pass_token_ids" in request:
            return self._time_pass(request["pass_token_ids"])
        return self._generate(request)

    def _fill_cache(self, token_ids: list[int]) -> dict[str, Any]:
        import torch
        from transformers import DynamicCache

        self._cache = DynamicCache(config=self._model.config)
        with torch.inference_mode():
            self._model(
                torch.tensor([token_ids], device=self._model.device),
                past_key_values=self._cache,
                logits_to_keep=1,
            )
        return {"cached_tokens": len(token_ids)}

    def _time_pass(self, token_ids: list[int]) -> dict[str, Any]:
        """Time a forward pass and the arg max of every row, as in a verify pass; keep the first token."""
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
        return {"pass_ns": elapsed_ns}

    def _generate(self, request: dict[str, Any]) -> dict[str, Any]:
        """Generate an answer; times are milliseconds from the call."""
        import torch

        started_s = time.perf_counter()
        input_ids = torch.tensor([self._input_ids(request)], device=self._model.device)  # [1, input_tokens]
        clock = TokenClock()
        torch.manual_seed(request.get("seed", 0))
        output = self._model.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=request["max_new_tokens"],
            use_cache=True,
            streamer=clock,
            **_sampling(request["temperature"]),
        )
        token_ids = output[0, input_ids.shape[1] :].tolist()
        arrivals_ms = [(arrival_s - started_s) * 1e3 for arrival_s in clock.token_arrivals_s]
        first_ms, last_ms = arrivals_ms[0], arrivals_ms[-1]
        num_later = len(token_ids) - 1
        return {
            "token_ids": token_ids,
            "input_tokens": input_ids.shape[1],
            "ttft_ms": first_ms,
            "tpot_ms": (last_ms - first_ms) / num_later if num_later else None,
            "total_ms": last_ms,
            "finish_reason": "stop_token" if token_ids[-1] in self._eos_token_ids else "length",
        }

    def _input_ids(self, request: dict[str, Any]) -> list[int]:
        if "token_ids" in request:
            return list(request["token_ids"])
        if self._tokenizer is None:
            raise ValueError("the model folder has no tokenizer.json; send token_ids")
        turns = [{"role": "user", "content": request["prompt"]}]
        encoded = self._tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)
        return list(encoded["input_ids"])


def _sampling(temperature: float) -> dict[str, Any]:
    if temperature == 0:
        return {"do_sample": False}
    # top_k defaults to 50 in transformers; 0 samples from the whole vocabulary, as the gateway does.
    return {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}


def serve(peer: TransformersPeer, requests: TextIO, replies: TextIO) -> None:
    """Answer requests line by line until their stream ends."""
    _reply(replies, {"ready": True})
    for line in requests:
        try:
            reply = peer.answer(json.loads(line))
        except Exception as error:  # whatever one prompt provokes must not end the worker
            reply = {"error": f"{type(error).__name__}: {error}"}
        _reply(replies, reply)


def _reply(replies: TextIO, reply: dict[str, Any]) -> None:
    replies.write(json.dumps(reply) + "\n")
    replies.flush()


@click.command()
@click.option("--model", required=True, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--dtype", default="bfloat16", show_default=True, help="Data type of the weights.")
@click.option("--device", default="cpu", show_default=True, help="Torch device.")
def main(model: Path, dtype: str, device: str) -> None:
    """Serve a model folder with transformers over stdin and stdout."""
    # Stdout carries the replies, and libraries print to it now and then.
    replies, sys.stdout = sys.stdout, sys.stderr
    serve(TransformersPeer(model, dtype, device), sys.stdin, replies)


if __name__ == "__main__":
    main()
