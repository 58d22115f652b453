"""What a session exports for several drafters."""

from __future__ import annotations

import pytest

from specdec.contract.target_state import ProjectionInfo, TargetStateSpec, TensorRef

PROJECTION = ProjectionInfo("ab" * 32, 64, 32, 1e-6, "float32")
MTP = TargetStateSpec(last_hidden_state=True, kv_last_of_each_attention_type=True)
DFLASH = TargetStateSpec(hidden_layer_ids=(0, 2), projection=PROJECTION)


def test_a_union_serves_both_and_adding_a_part_of_it_changes_nothing() -> None:
    both = TargetStateSpec((0, 2), True, (), True, PROJECTION)
    assert MTP.union(DFLASH) == DFLASH.union(MTP) == both
    assert both.union(MTP) == both.union(DFLASH) == both.union(both) == both


def test_kv_layers_are_joined() -> None:
    assert TargetStateSpec(kv_layer_ids=(3, 1)).union(
        TargetStateSpec(kv_layer_ids=(1, 2))
    ) == TargetStateSpec(kv_layer_ids=(3, 1, 2))


@pytest.mark.parametrize("layer_ids", [(0, 1), (0, 2), (2, 0)])
def test_a_projection_is_of_one_list_of_layers(layer_ids: tuple[int, ...]) -> None:
    """Where lists or projections differ, drafters get the states as they are."""
    other = TargetStateSpec(hidden_layer_ids=layer_ids)
    both = DFLASH.union(other)
    assert both == TargetStateSpec(hidden_layer_ids=tuple(dict.fromkeys((0, 2, *layer_ids))))
    assert both.union(DFLASH) == both
    assert all(both.serves(spec) for spec in (DFLASH, other, both))


def test_a_session_serves_what_it_has() -> None:
    both = MTP.union(DFLASH)
    assert all(both.serves(spec) for spec in (MTP, DFLASH, TargetStateSpec(hidden_layer_ids=(2,)), both))
    assert not MTP.serves(DFLASH)
    assert not DFLASH.serves(MTP)
    assert not DFLASH.serves(TargetStateSpec(hidden_layer_ids=(0, 1)))
    assert not TargetStateSpec(kv_layer_ids=(1,)).serves(TargetStateSpec(kv_layer_ids=(1, 2)))


def test_a_drafter_reads_its_own_part_of_what_a_session_exports() -> None:
    kv = [("kv.1", "sliding_attention"), ("kv.2", "full_attention"), ("kv.3", "sliding_attention")]
    tensors = [
        TensorRef("generations", "int64", (9,)),
        *(TensorRef(name, "float32", (64, 8)) for name in ("hidden.0", "hidden.2", "last_hidden")),
        *(
            TensorRef(f"{layer}.{part}", "float32", (64, 8), attention_type=attention_type)
            for layer, attention_type in kv
            for part in ("key", "value")
        ),
    ]
    assert DFLASH.read_of(tensors) == ("hidden.0", "hidden.2")
    last = ("kv.3.key", "kv.3.value", "kv.2.key", "kv.2.value")
    assert MTP.read_of(tensors) == ("last_hidden", *last)
    assert TargetStateSpec(kv_layer_ids=(1, 1)).read_of(tensors) == ("kv.1.key", "kv.1.value")
    assert set(MTP.union(DFLASH).read_of(tensors)) == {*MTP.read_of(tensors), *DFLASH.read_of(tensors)}
