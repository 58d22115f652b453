"""Every number that a user can give has two bounds, and a message names the one that was passed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any

import click
import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor

from drafter_service.cli import main as drafter_main
from drafter_service.config import DrafterConfig
from gateway.cli import main as gateway_main
from gateway.config import MAX_STREAM_PADDING, GatewayConfig
from specdec.bench.terminal import CommaList
from specdec.cli.main import main
from specdec.cli.numbers import integers, numbers
from specdec.client import GenerateOptions
from specdec.client.wire import build_request, request_fields
from specdec.contract.bounds import MAX_NUMBER, MAX_UINT32
from specdec.contract.errors import InvalidArgumentError
from specdec.contract.sampling import SamplingParams
from specdec.service.config import MAX_THREADS
from specdec.v1 import gateway_pb2
from verifier_service.cli import main as verifier_main
from verifier_service.config import VerifierConfig

SAMPLING_BOUNDS: dict[str, tuple[float, float]] = {
    "temperature": (0, 1_000_000),
    "top_k": (0, MAX_UINT32),
    "top_p": (0, 1),
    "min_p": (0, 1),
    "repetition_penalty": (0, 1_000_000),
    "presence_penalty": (-2, 2),
    "frequency_penalty": (-2, 2),
    "seed": (0, 2**64),
}
OPTION_BOUNDS: dict[str, tuple[float, float]] = {
    "draft_depth": (0, MAX_UINT32),
    "draft_nodes": (0, MAX_UINT32),
    "max_new_tokens": (1, MAX_NUMBER),
    "num_top_logprobs": (0, 20),
}
OF_THE_GATEWAY = {"min_draft_confidence"}
"""What only the gateway checks."""


def beyond(low: float, high: float) -> Iterator[tuple[float, float]]:
    """Yield numbers out of a range, with the bound that each passes."""
    yield from ((low - 1, low), (low - 10**20, low), (high + 1, high), (high + 10**20, high))


def names_it(message: str, bound: float) -> bool:
    """Return whether a message names a bound, however it is written."""
    return any(
        text in message for text in (str(bound), f"{bound:g}", "2**64" if bound == 2**64 else str(bound))
    )


@pytest.mark.parametrize("name", SAMPLING_BOUNDS)
def test_the_client_names_the_bound_of_a_sampling_parameter(name: str) -> None:
    for value, bound in beyond(*SAMPLING_BOUNDS[name]):
        options = GenerateOptions(sampling=SamplingParams(**{name: value}))
        with pytest.raises(InvalidArgumentError) as raised:
            build_request("Hi", options)
        assert (raised.value.field, names_it(raised.value.message, bound)) == (name, True), raised.value


@pytest.mark.parametrize("name", OPTION_BOUNDS)
def test_the_client_names_the_bound_of_an_option(name: str) -> None:
    for value, bound in beyond(*OPTION_BOUNDS[name]):
        with pytest.raises(InvalidArgumentError) as raised:
            build_request("Hi", replace(GenerateOptions(), **{name: int(value)}))
        assert (raised.value.field, names_it(raised.value.message, bound)) == (name, True), raised.value


@pytest.mark.parametrize("token_id", [-1, 2**32, 10**30])
def test_the_client_names_the_bounds_of_token_ids(token_id: int) -> None:
    for prompt, options in (
        ([token_id], GenerateOptions()),
        ("Hi", GenerateOptions(stop_token_ids=(token_id,))),
        ("Hi", GenerateOptions(sampling=SamplingParams(allowed_token_ids=(token_id,)))),
        ("Hi", GenerateOptions(sampling=SamplingParams(logit_bias={token_id: 1.0}))),
    ):
        with pytest.raises(InvalidArgumentError, match=f"integers from 0 to {MAX_UINT32}"):
            build_request(prompt, options)


def number_fields(message: Descriptor) -> set[str]:
    """Return the single numbers of a message, by name."""
    others = (FieldDescriptor.CPPTYPE_STRING, FieldDescriptor.CPPTYPE_MESSAGE, FieldDescriptor.CPPTYPE_BOOL)
    return {field.name for field in message.fields if field.cpp_type not in others and not field.is_repeated}


def test_no_number_of_a_request_is_left_out_above() -> None:
    request = gateway_pb2.GenerateRequest.DESCRIPTOR
    assert number_fields(request.fields_by_name["sampling"].message_type) == set(SAMPLING_BOUNDS)
    assert number_fields(request) == set(OPTION_BOUNDS) | OF_THE_GATEWAY
    assert number_fields(request) <= {field for _, field in request_fields()}


OWN_BOUNDS = {"threads": MAX_THREADS, "stream_padding": MAX_STREAM_PADDING}
"""Most of options that have a bound of their own."""
CONFIGS = (GatewayConfig, VerifierConfig, DrafterConfig)
CONFIG_NUMBERS = [
    (config, field.name)
    for config in CONFIGS
    for field in fields(config)
    if type(field.default) in (int, float)
]


@pytest.mark.parametrize(
    ("config", "name"), CONFIG_NUMBERS, ids=lambda value: getattr(value, "__name__", value)
)
def test_a_service_names_the_bound_of_every_number(config: Any, name: str) -> None:
    option = f"--{name.replace('_', '-')}"
    most = str(OWN_BOUNDS.get(name, MAX_NUMBER))
    for value, bound in ((-1, "(more than|at least) [01]"), (2**31, most), (math.inf, most)):
        with pytest.raises(InvalidArgumentError, match=rf"{option} is {value}.* must be .*{bound}") as raised:
            config(**{name: value})
        assert raised.value.field == name
    with pytest.raises(InvalidArgumentError, match=f"{option} is nan"):
        config(**{name: math.nan})


def commands(command: click.Command, name: str) -> Iterator[tuple[str, click.Command]]:
    """Yield a program's commands by their names."""
    if not isinstance(command, click.Group):
        yield name, command
        return
    context = click.Context(command)
    for child in command.list_commands(context):
        found = command.get_command(context, child)
        assert found is not None
        yield from commands(found, f"{name} {child}")


def is_bounded(kind: click.ParamType[Any]) -> bool:
    return isinstance(kind, click.IntRange | click.FloatRange) and None not in (kind.min, kind.max)


def test_every_number_on_a_command_line_has_both_bounds() -> None:
    num_checked = 0
    for name, command in commands(main, "specdec"):
        for parameter in command.params:
            if parameter.name in SAMPLING_BOUNDS and not is_bounded(parameter.type):
                continue  # the client refuses it in the words of the request, before anything is sent
            is_number = isinstance(parameter.type, click.IntRange | click.FloatRange) or parameter.type in (
                click.INT,
                click.FLOAT,
            )
            assert not is_number or is_bounded(parameter.type), f"{name}: {parameter.name}"
            num_checked += is_number
    assert num_checked > 80


def test_options_of_services_are_those_of_their_configurations() -> None:
    for program, config in (
        (gateway_main, GatewayConfig),
        (verifier_main, VerifierConfig),
        (drafter_main, DrafterConfig),
    ):
        in_options = {each.name for each in program.params if each.type in (click.INT, click.FLOAT)}
        assert in_options == {name for owner, name in CONFIG_NUMBERS if owner is config}


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (integers(1), "0"),
        (integers(0), str(2**31)),
        (numbers(0, above=True), "0"),
        (numbers(0), "nan"),
        (numbers(0), "inf"),
        (CommaList(int, 1), "4,0"),
        (CommaList(int), f"4,{2**31}"),
    ],
)
def test_types_of_options_refuse_what_is_out_of_range(kind: click.ParamType[Any], text: str) -> None:
    with pytest.raises(click.BadParameter, match=r"in the range|must be at"):
        kind.convert(text, None, None)
