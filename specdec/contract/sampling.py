"""Sampling parameters: how a request can influence the target's picks, and which values are valid."""

from __future__ import annotations

import math
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from numbers import Integral, Real

from specdec.contract.bounds import MAX_UINT32
from specdec.contract.errors import InvalidArgumentError
from specdec.contract.request_limits import validate_length
from specdec.v1 import common_pb2

MAX_TOP_LOGPROBS = 20
MAX_FACTOR = 1e6
"""Largest temperature and repetition penalty."""
MAX_LOGIT_BIAS = 100.0
MAX_LOGIT_BIASES = 4096
MAX_ALLOWED_TOKEN_IDS = 16_384
_SEED_BITS = 32
"""Number of bits of a drawn seed; few enough that a person can type the seed again."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the target turns logits into the one token that it picks; see specdec.v1.SamplingParams."""

    temperature: float = 0.0
    """Softmax temperature, in [0, 1000000]; 0 is greedy."""
    top_k: int = 0
    """Keep the k most probable tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the most probable tokens, as few as reach the total probability top_p, in (0, 1]."""
    min_p: float = 0.0
    """Drop tokens that are less probable than min_p times the most probable token, in [0, 1]."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens in prompt and output, in (0, 1000000]; 1 is
    off."""
    presence_penalty: float = 0.0
    """Subtracted from the logits of tokens that are in the output, in [-2, 2]; 0 is off."""
    frequency_penalty: float = 0.0
    """Subtracted from a token's logit once per occurrence in the output, in [-2, 2]; 0 is off."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Value added to the logit of each named token id, in [-100, 100]."""
    allowed_token_ids: tuple[int, ...] = ()
    """The only token ids that can be picked. Empty: every token can be picked."""
    seed: int | None = None
    """Seed of the Gumbel noise, 0 to 2**64 - 1. None: the gateway draws one; a model service takes 0."""

    @property
    def noise_seed(self) -> int:
        """The seed that picks are made with."""
        return self.seed or 0

    @property
    def is_greedy(self) -> bool:
        """Whether the pick is the arg max of the processed logits, without noise."""
        return self.temperature == 0.0

    @property
    def has_penalties(self) -> bool:
        """Whether penalties make a pick depend on earlier tokens."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0

    @property
    def changes_logits(self) -> bool:
        """Whether penalties, biases or allowed tokens change the logits."""
        return bool(self.has_penalties or self.logit_bias or self.allowed_token_ids)

    @property
    def is_plain(self) -> bool:
        """Whether the pick is the arg max of the raw logits."""
        return self.is_greedy and not self.changes_logits

    def validate(self, vocab_size: int = 0) -> None:
        """Refuse parameters that are out of range. With `vocab_size` 0, token ids are not checked.

        Raises:
            InvalidArgumentError: a parameter is out of range; the error names it and its range.
        """
        _require("temperature", self.temperature, 0.0, MAX_FACTOR, f"in [0, {MAX_FACTOR:.0f}]; 0 is greedy")
        top_k_range = f"an integer from 0 (off) to {vocab_size or MAX_UINT32}"
        _require_integer("top_k", self.top_k, top_k_range)
        if not 0 <= self.top_k <= (vocab_size or MAX_UINT32):
            _refuse("top_k", self.top_k, top_k_range)
        _require_number("top_p", self.top_p, "in (0, 1]; 1 keeps every token")
        if not 0.0 < self.top_p <= 1.0:
            _refuse("top_p", self.top_p, "in (0, 1]; 1 keeps every token")
        _require("min_p", self.min_p, 0.0, 1.0, "in [0, 1]; 0 keeps every token")
        penalty_range = f"in (0, {MAX_FACTOR:.0f}]; 1 is off"
        _require_number("repetition_penalty", self.repetition_penalty, penalty_range)
        if not 0.0 < self.repetition_penalty <= MAX_FACTOR:
            _refuse("repetition_penalty", self.repetition_penalty, penalty_range)
        _require("presence_penalty", self.presence_penalty, -2.0, 2.0, "in [-2, 2]; 0 is off")
        _require("frequency_penalty", self.frequency_penalty, -2.0, 2.0, "in [-2, 2]; 0 is off")
        _require_integer("seed", self.noise_seed, "an integer in [0, 2**64)")
        if not 0 <= self.noise_seed < 2**64:
            _refuse("seed", self.noise_seed, "an integer in [0, 2**64)")
        if not isinstance(self.logit_bias, Mapping):
            _refuse("logit_bias", repr(self.logit_bias)[:80], "a dict of token ids and numbers")
        if not isinstance(self.allowed_token_ids, Sequence):
            _refuse("allowed_token_ids", repr(self.allowed_token_ids)[:80], "a sequence of token ids")
        validate_length("logit_bias", len(self.logit_bias), MAX_LOGIT_BIASES)
        most = min(MAX_ALLOWED_TOKEN_IDS, vocab_size or MAX_ALLOWED_TOKEN_IDS)
        validate_length("allowed_token_ids", len(self.allowed_token_ids), most)
        for token_id, bias in self.logit_bias.items():
            _require("logit_bias", bias, -MAX_LOGIT_BIAS, MAX_LOGIT_BIAS, "in [-100, 100]")
            validate_token_ids("logit_bias", [token_id], vocab_size)
        validate_token_ids("allowed_token_ids", self.allowed_token_ids, vocab_size)

    def within(self, vocab_size: int) -> SamplingParams:
        """Return the same parameters without the token ids that a smaller vocabulary lacks: it cannot pick
        them. With `vocab_size` 0 nothing is left out."""
        if not vocab_size:
            return self
        return replace(
            self,
            top_k=min(self.top_k, vocab_size),
            logit_bias={
                token_id: bias for token_id, bias in self.logit_bias.items() if token_id < vocab_size
            },
            allowed_token_ids=tuple(token_id for token_id in self.allowed_token_ids if token_id < vocab_size),
        )

    def to_proto(self) -> common_pb2.SamplingParams:
        """Return the message that carries the parameters.

        Raises:
            InvalidArgumentError: a value does not fit the type of its field.
        """
        message = common_pb2.SamplingParams()
        for parameter in fields(self):
            value = getattr(self, parameter.name)
            if value is None:
                continue
            try:
                message.MergeFrom(common_pb2.SamplingParams(**{parameter.name: value}))
            except (ValueError, TypeError) as error:
                raise InvalidArgumentError(
                    f"{parameter.name} cannot be {repr(value)[:80]}: {with_range(error)}",
                    field=parameter.name,
                ) from error
        return message

    @classmethod
    def from_proto(cls, message: common_pb2.SamplingParams) -> SamplingParams:
        """Read parameters from a message without validating more than how many there are. Unset fields get
        their defaults.

        Raises:
            InvalidArgumentError: a list is too long for anything to be made of it.
        """
        validate_length("logit_bias", len(message.logit_bias), MAX_LOGIT_BIASES)
        validate_length("allowed_token_ids", len(message.allowed_token_ids), MAX_ALLOWED_TOKEN_IDS)
        values = {field.name: value for field, value in message.ListFields()}
        values["logit_bias"] = dict(message.logit_bias)
        values["allowed_token_ids"] = tuple(message.allowed_token_ids)
        return cls(**values)


def with_seed(sampling: SamplingParams) -> SamplingParams:
    """Return the same parameters with a seed. A seed is drawn now if picks are random and none is set."""
    if sampling.is_greedy or sampling.seed is not None:
        return sampling
    return replace(sampling, seed=secrets.randbits(_SEED_BITS))


def validate_probability(name: str, value: float) -> None:
    """Check a field that is 0 (off) or a probability.

    Raises:
        InvalidArgumentError: it is not.
    """
    if not 0.0 <= value <= 1.0:
        raise InvalidArgumentError(f"{name} is {value:g}; it must be from 0 (off) to 1.", field=name)


def validate_token_ids(field_name: str, token_ids: list[int] | tuple[int, ...], vocab_size: int) -> None:
    """Refuse token ids that the vocabulary does not have. With `vocab_size` 0, every id passes.

    Raises:
        InvalidArgumentError: an id is too large; the error names the first such id.
    """
    if vocab_size and token_ids and max(token_ids) >= vocab_size:
        index, wrong_id = next((i, t) for i, t in enumerate(token_ids) if t >= vocab_size)
        raise InvalidArgumentError(
            f"{field_name}[{index}] is {wrong_id}, but the vocabulary has {vocab_size} tokens; "
            "send smaller token ids. Was the text tokenised with another model's tokenizer?",
            field=field_name,
            reason="TOKEN_ID_OUT_OF_RANGE",
        )


def validate_num_top_logprobs(num_top_logprobs: int | None) -> None:
    """Refuse a number of alternatives per token that the service does not report.

    Raises:
        InvalidArgumentError: the number is not in [0, MAX_TOP_LOGPROBS].
    """
    if num_top_logprobs is not None:
        _require_integer("num_top_logprobs", num_top_logprobs, f"in [0, {MAX_TOP_LOGPROBS}]")
    if num_top_logprobs is not None and not 0 <= num_top_logprobs <= MAX_TOP_LOGPROBS:
        _refuse("num_top_logprobs", num_top_logprobs, f"in [0, {MAX_TOP_LOGPROBS}]")


def with_range(error: Exception) -> str:
    """Return protobuf's words about a value that a field cannot hold, with what a number may be."""
    is_number = isinstance(error, ValueError) and "out of range" in str(error)
    return f"{error}; token ids are integers from 0 to {MAX_UINT32}" if is_number else str(error)


def _require_number(name: str, value: object, expected: str) -> None:
    if not isinstance(value, Real):
        _refuse(name, repr(value)[:80], expected)


def _require_integer(name: str, value: object, expected: str) -> None:
    if not isinstance(value, Integral):
        _refuse(name, repr(value)[:80], expected)


def _require(name: str, value: float, low: float, high: float, expected: str) -> None:
    _require_number(name, value, expected)
    # NaN compares false with everything, so this form of the condition refuses it.
    if not (low <= value <= high and math.isfinite(value)):
        _refuse(name, value, expected)


def _refuse(name: str, value: object, expected: str) -> None:
    raise InvalidArgumentError(f"{name} is {value}; it must be {expected}.", field=name)
