"""The paths of OpenAI's HTTP interface."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route, Router
from starlette.types import Receive, Scope, Send

from gateway.config import GatewayConfig
from gateway.generations import Generations
from gateway.http.answers import Answers, ChatAnswers, CompletionAnswers
from gateway.http.bodies import Bodies
from gateway.http.choices import Choice, Finish, Take, run_choices
from gateway.http.edge import HEALTH
from gateway.http.errors import told
from gateway.http.events import EventStream, to_json
from gateway.http.fields import StructuredOutputs
from gateway.http.formats import refusing_as_asked
from gateway.http.requests import ChatRequest, CompletionRequest, GenerationRequest
from specdec.client.generation import Generation, Token
from specdec.contract.errors import NotFoundError, SpecdecError
from specdec.models.embedded import DEFAULT_MODEL
from specdec.v1 import gateway_pb2

RequestT = TypeVar("RequestT", bound=GenerationRequest)


class App:
    """Answers requests over the generations of a gateway.

    Args:
        is_serving: whether the gateway is ready.
    """

    def __init__(
        self, config: GatewayConfig, generations: Generations, is_serving: Callable[[], bool]
    ) -> None:
        self._config, self._generations, self._is_serving = config, generations, is_serving
        self.bodies = Bodies(config)
        self._created = int(time.time())
        self._router = Router(
            [
                Route("/v1/chat/completions", self._chat, methods=["POST"]),
                Route("/v1/completions", self._complete, methods=["POST"]),
                Route("/v1/models", self._models),
                Route("/v1/models/{model:path}", self._model),
                Route(HEALTH, self._health),
            ],
            redirect_slashes=False,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request.

        Raises:
            HTTPException: there is no such path, or not with this method.
        """
        # A router that is a part of an application raises what it would otherwise answer in words of its own.
        await self._router({**scope, "app": self}, receive, send)

    async def _chat(self, request: Request) -> Response:
        return await self._answer(request, ChatRequest, ChatAnswers)

    async def _complete(self, request: Request) -> Response:
        return await self._answer(request, CompletionRequest, CompletionAnswers)

    async def _answer(self, request: Request, kind: type[RequestT], answers: type[Answers]) -> Response:
        asked, messages = await self.bodies.read(request, kind)
        backends = self._generations.loaded()
        self._require_model(asked.model)
        written = answers(
            backends.codec,
            per_prompt=asked.num_choices,
            has_logprobs=asked.num_top_logprobs is not None,
            has_usage=asked.wants_usage,
        )
        run = _Run(self._generations, messages, asked.structured_outputs, _traceparent(request))
        if asked.stream:
            return _Stream(run, written, self._config.stream_padding)
        return await self._whole(request, run, written)

    async def _whole(self, request: Request, run: _Run, answers: Answers) -> Response:
        async def ignore(*_: object) -> None:
            pass

        generations = await run(ignore, request.receive, finish=ignore)
        body = to_json(answers.whole(generations))
        if self._config.stream_padding:
            body += b" " * (-len(body) % self._config.stream_padding)
        return Response(body, media_type="application/json")

    async def _models(self, request: Request) -> Response:
        info = await self._generations.info()
        data = [self._describe(info)] if info.HasField("model") else []
        return JSONResponse({"object": "list", "data": data})

    async def _model(self, request: Request) -> Response:
        model = request.path_params["model"]
        info = await self._generations.info()
        if not info.HasField("model") or model not in (info.model.model_id, DEFAULT_MODEL):
            raise _no_model(model, info.model.model_id)
        return JSONResponse(self._describe(info))

    def _describe(self, info: gateway_pb2.GatewayServiceGetInfoResponse) -> dict[str, Any]:
        return {
            "id": info.model.model_id,
            "object": "model",
            "created": self._created,
            "owned_by": "specdec",
            "max_model_len": info.model.max_length or None,
            "specdec": {"methods": [*info.methods], "default_method": info.default_method},
        }

    def _require_model(self, model: str | None) -> None:
        """Refuse a model that no verifier runs; before any was reached, every name will do."""
        known = self._generations.loaded().verifiers.known_infos
        ids = {info.model.model_id for info in known}
        if model and ids and model not in {*ids, DEFAULT_MODEL}:
            raise _no_model(model, min(ids))

    async def _health(self, request: Request) -> Response:
        if not self._is_serving():
            raise HTTPException(503, "The gateway is not ready.")
        return JSONResponse({"status": "ok"})


@dataclass(frozen=True)
class _Run:
    """The generations that answer a request, to be run."""

    generations: Generations
    messages: Sequence[gateway_pb2.GenerateRequest]
    structured: StructuredOutputs | None
    traceparent: str

    async def __call__(self, take: Take, receive: Receive, *, finish: Finish) -> list[Generation]:
        """Run them; see `run_choices`."""
        with refusing_as_asked(self.structured):
            return await run_choices(
                self.generations,
                self.messages,
                take,
                receive,
                traceparent=self.traceparent,
                finish=finish,
            )


class _Stream(Response):
    """An answer that is told as it comes."""

    def __init__(self, run: _Run, answers: Answers, padding: int) -> None:
        super().__init__()
        self._run, self._answers, self._padding = run, answers, padding
        self._begun: set[int] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the chunks of all choices as they come, then the end."""
        stream = EventStream(send, self._padding)

        async def take(choice: Choice, tokens: Sequence[Token]) -> None:
            chunk = self._answers.chunk(choice.index, choice.started.model_id, tokens, choice.num_characters)
            await stream.events([self._first(choice), chunk])

        async def finish(choice: Choice) -> None:
            await stream.events([self._first(choice), self._answers.last(choice.index, choice.result())])

        try:
            done = await self._run(take, receive, finish=finish)
            await stream.end([self._answers.usage(done)])
        except (ClientDisconnect, BrokenPipeError):
            raise
        except (Exception, asyncio.CancelledError) as failure:
            if not stream.is_begun or (isinstance(failure, SpecdecError) and failure.reason == "NOT_READ"):
                raise
            await stream.fail(told(failure))

    def _first(self, choice: Choice) -> dict[str, Any] | None:
        if choice.index in self._begun:
            return None
        self._begun.add(choice.index)
        return self._answers.first(choice.index, choice.started.model_id)


def _traceparent(request: Request) -> str:
    return request.headers.get("traceparent", "")


def _no_model(model: str, served: str) -> NotFoundError:
    return NotFoundError(
        f"There is no model {model[:80]!r} here; this gateway has {served!r}. Leave the model out to get it.",
        field="model",
        reason="MODEL_NOT_FOUND",
    )
