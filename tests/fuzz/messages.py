"""Random protobuf messages of any type, and right ones with something wrong."""

from __future__ import annotations

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
    """A message with some of its fields set, of a oneof at most one."""
    message = GetMessageClass(descriptor)()
    fields = [field for field in descriptor.fields if not _is_choice(field) and draw(st.integers(0, 2)) == 0]
    for choice in descriptor.oneofs:
        if _is_choice(choice.fields[0]) and draw(st.integers(0, 5)):
            fields.append(draw(st.sampled_from(list(choice.fields))))
    for field in fields:
        _fill(draw, message, field, depth)
    return message


def _is_choice(field: FieldDescriptor) -> bool:
    """Whether the field is one of a real oneof; an optional field is the only one of a oneof of its own."""
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
def wrong(draw: st.DrawFn, right: Message) -> bytes:
    """Bytes to send in the place of a right message: something like it, or nothing like it."""
    how = draw(st.sampled_from(("right", "merged", "field", "random", "bent", "cut", "noise")))
    said = bytes(right.SerializeToString())
    descriptor: Descriptor = right.DESCRIPTOR
    match how:
        case "right":
            return said
        case "merged":
            return said + bytes(draw(messages(descriptor)).SerializeToString())
        case "field":
            return bytes(_with_one_wrong_field(draw, right).SerializeToString())
        case "random":
            return bytes(draw(messages(descriptor)).SerializeToString())
        case "bent" if said:
            index = draw(st.integers(0, len(said) - 1))
            return said[:index] + draw(st.binary(min_size=1, max_size=3)) + said[index + 1 :]
        case "cut":
            return said[: draw(st.integers(0, len(said)))]
    return draw(st.binary(max_size=60))


def _with_one_wrong_field(draw: st.DrawFn, right: Message) -> Message:
    """The message, but for one field of it or of a message in it."""
    message = type(right)()
    message.CopyFrom(right)
    inner = message
    while inner.DESCRIPTOR.fields:
        field = draw(st.sampled_from(list(inner.DESCRIPTOR.fields)))
        is_single = field.message_type and not field.is_repeated
        if not (is_single and inner.HasField(field.name)):
            inner.ClearField(field.name)
            _fill(draw, inner, field, 2)
            break
        inner = getattr(inner, field.name)
    return message
