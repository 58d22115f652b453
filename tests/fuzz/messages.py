"""Random protobuf messages of any type, and right ones with something wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from hypothesis import strategies as st

from tests.tiny_models import VOCAB_SIZE

_DEPTH = 4
"""Messages in messages; the deepest of ours has five levels, of which the last hold numbers only."""
_EDGES = (0, 1, 2, 5, 8, 64, 65, VOCAB_SIZE - 1, VOCAB_SIZE, 511, 512, 2**16, 2**31 - 1, 2**31, 2**32 - 1)
_RANGES = {
    FieldDescriptor.CPPTYPE_INT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.CPPTYPE_INT64: (-(2**63), 2**63 - 1),
    FieldDescriptor.CPPTYPE_UINT32: (0, 2**32 - 1),
    FieldDescriptor.CPPTYPE_UINT64: (0, 2**64 - 1),
}
_WORDS = ("", "ngram", "model", "probe", "none", "auto", "ngram+model", "user", "\0", "\x1b[2J", "x" * 300)


def _numbers(kind: int) -> st.SearchStrategy[int]:
    low, high = _RANGES[kind]
    edges = [edge for edge in (*_EDGES, -1, low, high) if low <= edge <= high]
    return st.sampled_from(edges) | st.integers(0, 300) | st.integers(low, high)


def _floats(width: int) -> st.SearchStrategy[float]:
    return st.sampled_from((0.0, 0.5, 1.0, -1.0, 1e-30, 1e30)) | st.floats(width=width)  # type: ignore[arg-type]


def _scalars(field: FieldDescriptor) -> st.SearchStrategy[Any]:
    match field.cpp_type:
        case FieldDescriptor.CPPTYPE_BOOL:
            return st.booleans()
        case FieldDescriptor.CPPTYPE_FLOAT:
            return _floats(32)
        case FieldDescriptor.CPPTYPE_DOUBLE:
            return _floats(64)
        case FieldDescriptor.CPPTYPE_ENUM:
            return st.integers(-1, 9)
        case FieldDescriptor.CPPTYPE_STRING if field.type == FieldDescriptor.TYPE_BYTES:
            return st.binary(max_size=40)
        case FieldDescriptor.CPPTYPE_STRING:
            return st.sampled_from(_WORDS) | st.text(max_size=12)
    return _numbers(field.cpp_type)


@st.composite
def messages(draw: st.DrawFn, descriptor: Descriptor, depth: int = _DEPTH) -> Message:
    """Draw a message with some of its fields set, of a oneof at most one field."""
    message = GetMessageClass(descriptor)()
    fields = [field for field in descriptor.fields if not _is_choice(field) and draw(st.integers(0, 2)) == 0]
    for choice in descriptor.oneofs:
        if _is_choice(choice.fields[0]) and draw(st.integers(0, 5)):
            fields.append(draw(st.sampled_from(list(choice.fields))))
    for field in fields:
        _fill(draw, message, field, depth)
    return message


def _is_choice(field: FieldDescriptor) -> bool:
    """Return whether the field belongs to a real oneof; an optional field is the only field of a oneof of its
    own.
    """
    return field.containing_oneof is not None and len(field.containing_oneof.fields) > 1


def _fill(draw: st.DrawFn, message: Message, field: FieldDescriptor, depth: int) -> None:
    kind = field.message_type
    if kind and kind.GetOptions().map_entry:
        keys, values = (_scalars(kind.fields_by_name[name]) for name in ("key", "value"))
        getattr(message, field.name).update(draw(st.dictionaries(keys, values, max_size=3)))
    elif kind and depth:
        inner = messages(kind, depth - 1)
        if field.is_repeated:
            getattr(message, field.name).extend(draw(st.lists(inner, max_size=3)))
        else:
            getattr(message, field.name).CopyFrom(draw(inner))
    elif not kind and field.is_repeated:
        getattr(message, field.name).extend(draw(st.lists(_scalars(field), max_size=70)))
    elif not kind:
        setattr(message, field.name, draw(_scalars(field)))


@st.composite
def _one_field(draw: st.DrawFn, descriptor: Descriptor) -> Message:
    """Draw a message with one field set, or with one field set of a message in it."""
    outer = message = GetMessageClass(descriptor)()
    while descriptor.fields:
        field = draw(st.sampled_from(list(descriptor.fields)))
        if field.message_type is None or field.is_repeated:
            _fill(draw, message, field, 2)
            break
        message, descriptor = getattr(message, field.name), field.message_type
        message.SetInParent()
    return outer


Mistake = Callable[[bytes], bytes]
"""What is sent in the place of a right message."""


@st.composite
def mistakes(draw: st.DrawFn, descriptor: Descriptor) -> Mistake:
    """Draw a way to get a message wrong, slightly or wholly. What is drawn does not depend on the message."""
    how = draw(st.sampled_from(("right", "field", "fields", "random", "bent", "cut", "noise")))
    place, noise = draw(st.integers(0, 300)), draw(st.binary(max_size=60))
    other = b""
    if how == "field":
        other = bytes(draw(_one_field(descriptor)).SerializeToString())
    if how in ("fields", "random"):
        other = bytes(draw(messages(descriptor)).SerializeToString())

    def apply(right: bytes) -> bytes:
        match how:
            case "right":
                return right
            case "field" | "fields":  # one message after another is both of them merged
                return right + other
            case "random":
                return other
            case "bent":
                index = place % (len(right) + 1)
                return right[:index] + noise[:3] + right[index + 1 :]
            case "cut":
                return right[: place % (len(right) + 1)]
        return noise

    return apply


@st.composite
def wrong(draw: st.DrawFn, right: Message) -> bytes:
    """Return bytes to send in place of a right message."""
    mistake: Mistake = draw(mistakes(right.DESCRIPTOR))
    return mistake(right.SerializeToString())
