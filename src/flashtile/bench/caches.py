"""Problems over a KV cache: their operands, everyone's attention to them, and the check of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from importlib import import_module
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from flashtile import flash_attn_with_kvcache, quantize_kv, reference
from flashtile.bench import providers
from flashtile.bench.features import DTYPE, Cell
from flashtile.bench.gate import assert_close
from flashtile.explain import explain
from flashtile.problem import E4M3
from flashtile.testing import assert_within_budget

LATENT, LATENT_V = 576, 512
"""Head dims of MLA's K, and of the part of it that is V."""

CHECKED_HEADS = 4
"""Of the first KV head at most: the reference copies K and V for each of them."""


@dataclass(frozen=True)
class CacheCell(Cell):
    """A problem over a cache whose longest row has `seqlen` tokens, with what is appended."""

    queries: int = 1
    page_size: int = 0  # 0: rows of a cache
    scales: str = ""  # whose an e4m3 cache has: each head's or each token's
    append: bool = False  # a token to each row, with rotary embedding
    lengths: tuple[int, ...] = ()  # of the rows; () is seqlen of each

    @property
    def rows(self) -> tuple[int, ...]:
        return self.lengths or (self.seqlen,) * self.batch

    @property
    def bytes(self) -> int:
        """Of K and V in use; latent V is a part of K."""
        dims = self.head_dim * (1 if self.head_dim == LATENT else 2)
        return sum(self.rows) * self.kv_heads * dims * (1 if self.scales else 2)

    def row(self) -> dict[str, Any]:
        found = asdict(self) | {"tokens": sum(self.rows), "bytes": self.bytes}
        del found["lengths"]
        return found


@dataclass(frozen=True)
class Turn:
    """A call on its row lengths, which it is told before it is timed."""

    call: Callable[[], Tensor]
    lengths: Tensor  # what the call reads
    wanted: Tensor

    def prepare(self) -> None:
        self.lengths.copy_(self.wanted)

    def __call__(self) -> Tensor:
        return self.call()


class _Expected(NamedTuple):
    """Of one row of the batch, on the heads that are checked."""

    golden: Tensor  # (queries, heads, head_dim_v)
    eager: Tensor
    newest: tuple[Tensor, Tensor]  # K and V of its last token


class Cache:
    """A cell's operands and captured calls. rooms: the most tokens that each row will have."""

    def __init__(self, cell: CacheCell, rooms: tuple[int, ...], device: torch.device) -> None:
        generator = torch.Generator(device).manual_seed(0)
        normal = partial(torch.randn, dtype=DTYPE, device=device, generator=generator)
        self._cell = cell
        self._lengths = torch.zeros(cell.batch, dtype=torch.int32, device=device)
        self._keywords: dict[str, Any] = {"causal": cell.queries > 1}
        slots = cell.batch, cell.seqlen
        if cell.page_size:
            table, pages = _page_table(rooms, cell.page_size)
            self._keywords["block_table"] = table.to(device)
            slots = pages, cell.page_size
        self._q = normal(cell.batch, cell.queries, cell.heads, cell.head_dim)
        self._k = normal(*slots, cell.kv_heads, cell.head_dim)
        latent = cell.head_dim == LATENT
        self._v = self._k[..., :LATENT_V] if latent else normal(*self._k.shape)
        if cell.scales:
            self._quantise()
        self._new = self._new_tokens(normal) if cell.append else {}
        self._calls: dict[str, Callable[[], Tensor]] = {}
        self._expected: dict[tuple[int, int], _Expected] = {}

    def _quantise(self) -> None:
        shape = self._k.shape[2:3] if self._cell.scales == "head" else self._k.shape[:3]
        caches = [torch.empty_like(x, dtype=E4M3) for x in (self._k, self._v)]
        scales = [torch.empty(shape, device=x.device) for x in caches]
        quantize_kv(self._k, self._v, *caches, *scales)
        self._k, self._v = caches
        self._keywords |= {"k_descale": scales[0], "v_descale": scales[1]}

    def _new_tokens(self, normal: Callable[..., Tensor]) -> dict[str, Any]:
        cell = self._cell
        k, v = (normal(cell.batch, 1, cell.kv_heads, cell.head_dim) for _ in range(2))
        angles = torch.pi * normal(cell.seqlen, cell.head_dim // 2).float()
        turn = {"rotary_cos": angles.cos().to(DTYPE), "rotary_sin": angles.sin().to(DTYPE)}
        return {"k": k, "v": v, **turn, "rotary_interleaved": False}

    def backend(self) -> str:
        """Whose kernels flashtile's plan takes."""
        chosen = explain(self._q, self._k, self._v, seqused_k=self._lengths, **self._keywords).plan
        return chosen.backend if chosen.decode is None else "decode"

    def checked(self, name: str, rows: tuple[int, ...]) -> Turn:
        """A provider's call on rows of these lengths. Raises what its library raises, CannotError,
        or AssertionError where its result is wrong."""
        call = self._calls.get(name)
        if call is None:
            call = self._calls[name] = self._captured(name)
        wanted = torch.tensor(rows, dtype=torch.int32) - int(self._cell.append)
        turn = Turn(call, self._lengths, wanted.to(self._lengths.device))
        turn.prepare()
        self._check(name, turn(), rows)
        return turn

    def _captured(self, name: str) -> Callable[[], Tensor]:
        """A graph's replay where there are graphs; it is captured with all lengths 0."""
        attend = self._attend(name)

        def call() -> Tensor:
            with torch.no_grad(), providers.context(name):
                return attend()

        if self._q.device.type != "cuda":
            return call
        self._lengths.zero_()
        call()  # compiles, and takes what workspaces it keeps
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = call()

        def replay() -> Tensor:
            graph.replay()
            return out

        return replay

    def _attend(self, name: str) -> Callable[[], Tensor]:
        q, k, v = self._q, self._k, self._v
        if name in providers.SDPA:
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            return lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2)
        keywords = {"cache_seqlens": self._lengths, **self._keywords, **self._new}
        function: Any = flash_attn_with_kvcache
        if name in providers.PACKAGES:
            function = import_module(providers.PACKAGES[name][0]).flash_attn_with_kvcache
            if name == "fa3" and "block_table" in keywords:
                keywords["page_table"] = keywords.pop("block_table")
        elif not name.startswith("flashtile"):
            raise providers.CannotError(f"{name} is not measured over a cache")

        def attend() -> Tensor:
            found = function(q, k, v, **keywords)
            return found[0] if isinstance(found, tuple) else found

        return attend

    def _check(self, name: str, out: Tensor, rows: tuple[int, ...]) -> None:
        """Each row by itself: values of a long one are small beside those of a short one."""
        for b, length in enumerate(rows):
            if length == 0:
                continue
            if (b, length) not in self._expected:
                self._expected[b, length] = self._compute(b, length)
            golden, eager, newest = self._expected[b, length]
            found, label = out[b, :, : golden.shape[1]], f"out of row {b}"
            if not name.startswith("flashtile"):
                assert_close(label, found, golden)
                continue
            assert_within_budget(found, eager, golden, label)
            for cached, wanted in zip((self._k, self._v), newest, strict=True):
                if self._new and not torch.equal(self._tokens(cached, b, length)[-1, 0], wanted):
                    raise AssertionError(f"the token appended to row {b} is not the reference's")
        empty = torch.tensor(rows, device=out.device) == 0
        if bool(out[empty].any()):
            raise AssertionError("out of a row without tokens is not 0")

    def _compute(self, b: int, length: int) -> _Expected:
        cell, new = self._cell, self._new
        heads = slice(min(cell.heads // cell.kv_heads, CHECKED_HEADS))
        given: dict[str, Any] = {"causal": self._keywords["causal"]}
        for key in ("k_descale", "v_descale"):
            if (scale := self._keywords.get(key)) is not None:
                own = scale.dim() > 1
                given[key] = self._tokens(scale, b, length)[None, :, :1] if own else scale[:1]
        given |= {n: x[b : b + 1, :, :1] if n in ("k", "v") else x for n, x in new.items()}
        given["cache_seqlens"] = length - int(cell.append)
        q = self._q[b : b + 1, :, heads]
        k, v = (self._tokens(x, b, length)[None, :, :1] for x in (self._k, self._v))
        golden, *caches = reference.attention_with_kvcache(q, k, v, **given)
        eager, _, _ = reference.attention_with_kvcache(q, k, v, **given, dtype=None)
        newest = caches[0][0, -1, 0], caches[1][0, -1, 0]
        return _Expected(golden.out[0], eager.out[0], newest)

    def _tokens(self, x: Tensor, b: int, length: int) -> Tensor:
        """Of a row: (length, kv_heads, ...) of a cache or of its tokens' scales."""
        table = self._keywords.get("block_table")
        if table is None:
            return x[b, :length]
        slots = torch.arange(length, device=x.device)
        at = table[b, slots // self._cell.page_size].long(), slots % self._cell.page_size
        # torch gathers no e4m3 numbers.
        return x.view(torch.uint8)[at].view(E4M3) if x.dtype == E4M3 else x[at]


def _page_table(rooms: tuple[int, ...], page_size: int) -> tuple[Tensor, int]:
    """A pool's pages in random order, (batch, columns) with columns a multiple of 16 as serving
    engines align them, and their number."""
    used = [-(-room // page_size) for room in rooms]
    order = torch.randperm(sum(used), generator=torch.Generator().manual_seed(0)).to(torch.int32)
    table = torch.zeros(len(rooms), -(-max(used) // 16) * 16, dtype=torch.int32)
    for row, pages in zip(table, order.split(used), strict=True):
        row[: len(pages)] = pages
    return table, sum(used)
