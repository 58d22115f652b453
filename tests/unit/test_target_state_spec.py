"""What a session exports for several drafters."""

from __future__ import annotations

from specdec.contract.target_state import ProjectionInfo, TargetStateSpec

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


def test_hidden_states_that_differ_cannot_be_had_together() -> None:
    assert DFLASH.union(TargetStateSpec(hidden_layer_ids=(0, 1))) is None
    assert DFLASH.union(TargetStateSpec(hidden_layer_ids=(0, 2))) is None
