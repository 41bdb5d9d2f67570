"""attention(q, k, v)  ->  paged_attention(q, k, v, K pool, V pool, slots, block tables, …)

Attention within one packed sequence becomes attention of each token to the cached sequence that it belongs to.
The batch's tables and the pools are inputs of the network; `open_cache` adds them.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import takewhile
from typing import Any

import torch

from enginery import ops
from enginery.network import Dim, Layer, Network
from enginery.rewriting.rule import MatchFailure, PatternRewriter

TABLES = ("slot_mapping", "block_tables", "query_start", "seq_lens")


def open_cache(network: Network, block_size: int) -> None:
    """Adds the inputs that paged attention reads: the batch's tables, and per attention a pool of keys and of values.

    slot_mapping `[tokens]` int64; block_tables `[sequences, blocks]`, query_start `[sequences + 1]`, seq_lens
    `[sequences]` int32; key_cache.N and value_cache.N `[num_blocks, heads, block_size, head_dim]`, N counting
    attentions in order.
    """
    tokens, sequences, pool = (Dim.symbol(name) for name in ("tokens", "sequences", "num_blocks"))
    network.add_input("slot_mapping", (tokens,), torch.int64)
    network.add_input("block_tables", (sequences, Dim.symbol("blocks")), torch.int32)
    network.add_input("query_start", (Dim.symbol("sequences_plus_1"),), torch.int32)
    network.add_input("seq_lens", (sequences,), torch.int32)
    for number, layer in enumerate(attentions(network)):
        for name, tensor in (("key_cache", layer.arguments["key"]), ("value_cache", layer.arguments["value"])):
            _, heads, size = tensor.shape
            network.add_input(f"{name}.{number}", (pool, heads, block_size, size), tensor.dtype)


def attentions(network: Network) -> list[Layer]:
    return [layer for layer in network if layer.op is ops.attention]


class PageAttention(PatternRewriter):
    pure = True
    root_layer = (ops.attention,)

    def match_and_rewrite(self, layer: Layer) -> Any:
        query, key, value, scale, causal, *rest = layer.args
        if not causal:
            raise MatchFailure("it is not causal")
        network = layer.network
        number = sum(other.op in (ops.attention, ops.paged_attention) for other in before(layer))
        caches = (network.tensor(f"{name}.{number}") for name in ("key_cache", "value_cache"))
        tables = (network.tensor(name) for name in TABLES)
        return ops.paged_attention(query, key, value, *caches, *tables, scale, *rest)


def before(layer: Layer) -> Iterator[Layer]:
    """The layers that run before this one."""
    return takewhile(lambda other: other is not layer, layer.network)
