"""The peer `openvino`: openvino-genai, plain or with prompt lookup, or bare passes of the same model.

    python -m specdec.bench.peers.openvino_worker --model FOLDER --dtype bfloat16 --threads 2

The folder is an export of optimum-intel. The program runs in the environment of the peers.
"""

from __future__ import annotations

import json
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

_PRECISIONS = {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}
"""What OpenVINO calls torch's data types."""
_DEVICE = "CPU"


def describe(dtype: str, threads: int) -> Reply:
    """Return versions, threads and the type that the engine computes in."""
    import openvino
    import openvino_genai

    return {
        "versions": {"openvino": openvino.__version__, "openvino-genai": openvino_genai.__version__},
        "threads": threads,
        "precision": _computed_type(dtype),
    }


def _computed_type(dtype: str) -> str:
    """Return torch's name of the type that this CPU computes in, which is fp32 where it has no kernels."""
    import openvino

    names = {"bfloat16": "BF16", "float16": "FP16", "float32": "FP32"}
    has_kernels = names[dtype] in openvino.Core().get_property(_DEVICE, "OPTIMIZATION_CAPABILITIES")
    return dtype if has_kernels else "float32"


def _settings(dtype: str, threads: int) -> dict[str, Any]:
    return {"INFERENCE_PRECISION_HINT": _PRECISIONS[dtype], "INFERENCE_NUM_THREADS": threads}


class OpenVinoAnswers:
    """A pipeline of openvino-genai.

    Args:
        folder: exported model.
        dtype: torch's name of the type to compute in.
        threads: CPU threads.
        lookup_tokens: draft tokens that each step copies from the text so far; 0: no speculation.
    """

    def __init__(self, folder: Path, dtype: str, threads: int, lookup_tokens: int = 0) -> None:
        import openvino_genai as genai

        self._eos_token_ids = _eos_token_ids(folder)
        self._lookup_tokens = lookup_tokens
        lookup = {"prompt_lookup": True} if lookup_tokens else {}
        settings = _settings(dtype, threads) | lookup
        self._pipeline: Any = genai.LLMPipeline(str(folder), _DEVICE, **settings)

    def generate(self, request: Request) -> Reply:
        """Answer a prompt greedily; times are milliseconds from the call."""
        import numpy as np
        import openvino
        import openvino_genai as genai

        clock = TokenClock()
        input_ids = np.array([request["prompt_token_ids"]], dtype=np.int64)
        inputs = genai.TokenizedInputs(openvino.Tensor(input_ids), openvino.Tensor(np.ones_like(input_ids)))
        output = self._pipeline.generate(inputs, self._config(request), _streamer(clock))
        token_ids = [int(token_id) for token_id in output.tokens[0]]
        reason = finish_reason(token_ids, self._eos_token_ids)
        return {"token_ids": token_ids, "finish_reason": reason, **clock.times()}

    def _config(self, request: Request) -> Any:
        import openvino_genai as genai

        # A fresh configuration: the checkpoint's own sampling defaults would mix with ours.
        config = genai.GenerationConfig()
        config.max_new_tokens = request["max_new_tokens"]
        config.do_sample = False
        config.stop_token_ids = self._eos_token_ids
        # Left unset, the tokenizer's end token counts, which may be another one or none.
        config.eos_token_id = min(self._eos_token_ids, default=0)
        config.ignore_eos = not self._eos_token_ids
        if self._lookup_tokens:
            config.num_assistant_tokens = self._lookup_tokens
            config.max_ngram_size = MAX_NGRAM_TOKENS
        return config


class OpenVinoPasses:
    """The exported model itself, whose cache is a state within its infer request. Arguments as above."""

    def __init__(self, folder: Path, dtype: str, threads: int) -> None:
        import openvino

        settings = _settings(dtype, threads) | {"PERFORMANCE_HINT": "LATENCY"}
        model = openvino.Core().compile_model(str(folder / "openvino_model.xml"), _DEVICE, settings)
        self._request: Any = model.create_infer_request()
        self._inputs = {name for port in model.inputs for name in port.get_names()}
        self._cached_tokens = 0

    def fill_cache(self, token_ids: list[int]) -> None:
        """Let the cache hold these tokens and no others."""
        self._request.reset_state()
        self._cached_tokens = 0
        self._run(token_ids)

    def time_pass(self, token_ids: list[int]) -> int:
        """Return the time of a pass over the cache, which keeps the first token, nanoseconds."""
        num_cached = self._cached_tokens
        started_ns = time.perf_counter_ns()
        self._run(token_ids)
        elapsed_ns = time.perf_counter_ns() - started_ns
        if len(token_ids) > 1:
            self._crop(num_cached)
            # A cropped cache has no room, and the next pass would first copy it: this one does, untimed.
            self._run(token_ids[:1])
        return elapsed_ns

    def _run(self, token_ids: list[int]) -> list[int]:
        """Run a pass and return the arg max of every row."""
        import numpy as np

        num_tokens, length = len(token_ids), self._cached_tokens + len(token_ids)
        inputs = {
            "input_ids": np.array([token_ids], dtype=np.int64),
            "attention_mask": np.ones((1, length), dtype=np.int64),
            "position_ids": np.arange(length - num_tokens, length, dtype=np.int64)[None],
            "beam_idx": np.zeros(1, dtype=np.int32),
        }
        self._request.infer({name: inputs[name] for name in self._inputs}, share_inputs=True)
        self._cached_tokens = length
        logits = self._request.get_output_tensor(0).data  # [1, num_tokens, vocab_size]
        picks: list[int] = logits[0].argmax(-1).tolist()
        return picks

    def _crop(self, num_tokens: int) -> None:
        import numpy as np
        import openvino

        for state in self._request.query_state():
            kept = state.state.data[:, :, :num_tokens]  # [1, num_heads, num_tokens, head_dim]
            state.state = openvino.Tensor(np.ascontiguousarray(kept))
        self._cached_tokens = num_tokens


def _eos_token_ids(folder: Path) -> set[int]:
    eos = json.loads((folder / "generation_config.json").read_text()).get("eos_token_id")
    return set(eos) if isinstance(eos, list) else set() if eos is None else {eos}


def _streamer(clock: TokenClock) -> Any:
    """Return a streamer that tells a clock of tokens; its class needs the library that it is made for."""
    import openvino_genai as genai

    class Streamer(genai.StreamerBase):  # type: ignore[misc, unused-ignore]
        def write(self, token_ids: int | list[int]) -> Any:
            clock.note(1 if isinstance(token_ids, int) else len(token_ids))
            return genai.StreamingStatus.RUNNING

        def end(self) -> None:
            """Do nothing; the pipeline calls it after the last token."""

    return Streamer()


@click.command()
@click.option("--model", required=True, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--dtype", required=True, type=click.Choice(list(_PRECISIONS)), help="Type to compute in.")
@click.option("--threads", type=int, required=True, help="CPU threads.")
@click.option("--lookup-tokens", type=int, default=0, help="Draft tokens of a step; 0: no prompt lookup.")
@click.option("--passes", is_flag=True, help="Run passes over a cache instead of answering prompts.")
def main(model: Path, dtype: str, threads: int, lookup_tokens: int, passes: bool) -> None:
    """Serve an exported model with OpenVINO over stdin and stdout."""

    def load() -> Served:
        if passes:
            answer = answer_passes(OpenVinoPasses(model, dtype, threads))
        else:
            answer = OpenVinoAnswers(model, dtype, threads, lookup_tokens).generate
        return Served(describe(dtype, threads), answer)

    run(load)


if __name__ == "__main__":
    main()
