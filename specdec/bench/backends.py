"""The engine of a run's own methods: a gateway."""

from __future__ import annotations

from dataclasses import replace

from specdec.bench.records import Answer
from specdec.bench.trace import accepted_by_round
from specdec.bench.workload import Prompt
from specdec.client import AsyncClient, GenerateOptions, Message


class GatewayBackend:
    """One method of a gateway.

    Args:
        client: client of the gateway.
        options: the method, its K, limits and sampling.
    """

    def __init__(self, client: AsyncClient, options: GenerateOptions) -> None:
        self._client = client
        self._options = options

    async def generate(self, prompt: Prompt) -> Answer:
        """Answer a prompt, see `Backend`. The gateway measures TTFT and TPOT."""
        conversation = [*prompt.history, Message("user", prompt.text)]
        options = replace(self._options, cache_salt=prompt.cache_salt)
        generation = await self._client.generate(prompt.token_ids or conversation, options)
        num_tokens = len(generation.token_ids)
        return Answer(
            token_ids=generation.token_ids,
            input_tokens=generation.usage.input_tokens,
            ttft_ms=generation.timing.ttft_ms,
            tpot_ms=generation.timing.tpot_ms if num_tokens > 1 else None,
            finish_reason=generation.finish_reason,
            speculation=generation.speculation,
            accepted=accepted_by_round(generation.tokens),
            text=generation.text,
        )
