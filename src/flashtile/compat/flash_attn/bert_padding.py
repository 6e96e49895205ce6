"""`flash_attn.bert_padding`: between padded (batch, seqlen, ...) and packed (total, ...) tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def index_first_axis(input: Tensor, indices: Tensor) -> Tensor:
    """input[indices] along the first dimension. Differentiable."""
    return torch.index_select(input, 0, indices)


def index_put_first_axis(values: Tensor, indices: Tensor, first_axis_dim: int) -> Tensor:
    """Zeros (first_axis_dim, ...) with `values` at the distinct `indices`. Differentiable."""
    return values.new_zeros(first_axis_dim, *values.shape[1:]).index_put((indices,), values)


def index_first_axis_residual(input: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """(input[indices], input): the selection, and input itself for a residual connection."""
    return index_first_axis(input, indices), input


def unpad_input(
    hidden_states: Tensor, attention_mask: Tensor, unused_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """Pack the tokens that the masks allocate.

    hidden_states: (batch, seqlen, ...); attention_mask: (batch, seqlen), bool or integer, nonzero
    at tokens in use; unused_mask: likewise, tokens that get a place but are not in use. Returns

        the packed tokens (total, ...)
        indices (total,) int64 of them in the flattened batch
        cu_seqlens (batch + 1,) int32 of the places
        max_seqlen, int
        seqused (batch,) int32, the tokens in use
    """
    allocated = attention_mask if unused_mask is None else attention_mask + unused_mask
    seqused = attention_mask.sum(dim=-1, dtype=torch.int32)
    return *_pack(hidden_states, allocated, allocated.sum(dim=-1, dtype=torch.int32)), seqused


def unpad_input_for_concatenated_sequences(
    hidden_states: Tensor, attention_mask_in_length: Tensor
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Pack rows that each hold several short sequences one after the other.

    attention_mask_in_length: (batch, seqlen), integer. The nonzero numbers of a row are the lengths
    of its sequences in order: [2, 3, 0, 0, 0, 0] is a row of two tokens, three tokens, and one of
    padding. Returns the first four results of `unpad_input`, cu_seqlens over all sequences.
    """
    seqlen = attention_mask_in_length.shape[-1]
    positions = torch.arange(seqlen, device=attention_mask_in_length.device)
    tokens = positions < attention_mask_in_length.sum(dim=-1, keepdim=True)
    lengths = attention_mask_in_length[attention_mask_in_length != 0]
    return _pack(hidden_states, tokens, lengths)


def pad_input(hidden_states: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """The inverse of `unpad_input`: (total, ...) to (batch, seqlen, ...), zeros between."""
    return index_put_first_axis(hidden_states, indices, batch * seqlen).unflatten(
        0, (batch, seqlen)
    )


def _pack(
    hidden_states: Tensor, tokens: Tensor, lengths: Tensor
) -> tuple[Tensor, Tensor, Tensor, int]:
    """(packed, indices, cu_seqlens, max_seqlen) of the nonzero `tokens`: (batch, seqlen)."""
    indices = tokens.flatten().nonzero().flatten()
    cu_seqlens = F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    packed = index_first_axis(hidden_states.flatten(0, 1), indices)
    return packed, indices, cu_seqlens, int(lengths.max().item())
