"""What the anchors of a packed batch see: keys and values of their own sequence, up to the anchor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from drafter_service.training.batch import Anchors, PackedBatch


@dataclass(frozen=True, slots=True, eq=False)
class AnchorKv:
    """Keys and values of the target for the sequences of a batch; an anchor sees those before it."""

    kv: Sequence[tuple[Tensor, Tensor]]  # per sequence [num_heads, num_tokens, head_dim]
    anchors: Anchors

    def attend(self, queries: Tensor, scaling: float, sliding_window: int | None) -> Tensor:
        """Attend from queries [num_heads, num_anchors, head_dim]."""
        counts = torch.bincount(self.anchors.sequence, minlength=len(self.kv)).tolist()
        outputs = []
        for (keys, values), own, positions in zip(
            self.kv, queries.split(counts, dim=1), self.anchors.position.split(counts), strict=True
        ):
            if not len(positions):
                continue
            before = torch.arange(keys.shape[1], device=keys.device)
            seen = before < positions[:, None]
            if sliding_window is not None:
                # As in serving: the window reaches back from the last committed key, that one included.
                seen &= before >= positions[:, None] - 1 - sliding_window
            repeats = queries.shape[0] // keys.shape[0]
            outputs.append(
                scaled_dot_product_attention(
                    own[None],
                    keys.repeat_interleave(repeats, 0)[None].to(own.dtype),
                    values.repeat_interleave(repeats, 0)[None].to(own.dtype),
                    attn_mask=seen,
                    scale=scaling,
                )[0]
            )
        return torch.cat(outputs, dim=1)


class BlockBatchKv:
    """Keys and values of the sequences and blocks of a batch: a block sees those before its anchor, and its
    own."""

    def __init__(self, batch: PackedBatch, anchors: Anchors, block_size: int) -> None:
        lengths = batch.lengths.tolist()
        counts = torch.bincount(anchors.sequence, minlength=len(lengths)).tolist()
        self._block_size, self._num_context = block_size, sum(lengths)
        self._lengths, self._num_rows = lengths, [count * block_size for count in counts]
        self._hidden = [
            (torch.arange(length, device=positions.device) >= positions[:, None]).repeat_interleave(
                block_size, 0
            )
            for positions, length in zip(anchors.position.split(counts), lengths, strict=True)
        ]
        """Which of the context its blocks do not see [num_blocks * block_size, length], for each sequence."""

    def attend(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor, scaling: float) -> Tensor:
        """Attend from the blocks, sequence by sequence."""
        rows = zip(
            self._hidden,
            (queries.to(values.dtype) * scaling).split(self._num_rows, 1),
            *(
                part.to(values.dtype)[:, : self._num_context].split(self._lengths, 1)
                for part in (keys, values)
            ),
            *(
                part.to(values.dtype)[:, self._num_context :].split(self._num_rows, 1)
                for part in (keys, values)
            ),
            strict=True,
        )
        return torch.cat([self._attend_sequence(*parts) for parts in rows if parts[1].shape[1]], dim=1)

    def _attend_sequence(
        self,
        hidden: Tensor,
        queries: Tensor,
        context_keys: Tensor,
        context_values: Tensor,
        block_keys: Tensor,
        block_values: Tensor,
    ) -> Tensor:
        """Take one softmax over context and own block, but two products: keys of other blocks cost nothing.

        Args:
            hidden: which of the context the rows do not see [num_rows, num_context].
            queries: [num_heads, num_rows, head_dim]; keys and values likewise, of their own heads and rows.
        """
        (num_heads, num_rows, _), num_kv_heads = queries.shape, len(block_keys)
        folded = queries.view(num_kv_heads, num_heads // num_kv_heads, num_rows, -1)
        # [num_kv_heads, num_heads a KV head, num_blocks, block_size, ...]
        in_blocks = folded.unflatten(2, (-1, self._block_size))
        own_keys, own_values = (
            part.view(num_kv_heads, 1, -1, self._block_size, part.shape[-1])
            for part in (block_keys, block_values)
        )
        to_context = (folded @ context_keys[:, None].mT).masked_fill(hidden, float("-inf"))
        to_block = (in_blocks @ own_keys.mT).flatten(2, 3)
        shares = torch.cat([to_context, to_block], dim=-1).softmax(-1, dtype=torch.float32)
        shares = shares.to(queries.dtype)
        of_context = shares[..., : hidden.shape[1]] @ context_values[:, None]
        of_block = shares[..., hidden.shape[1] :].unflatten(2, (-1, self._block_size)) @ own_values
        attended: Tensor = of_context + of_block.flatten(2, 3)
        return attended.reshape(queries.shape)
