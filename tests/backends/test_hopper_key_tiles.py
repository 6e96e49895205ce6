"""Which blocks of queries the tiles of the Hopper backward walk over, and in which order they add
to dQ: the kernel's own source, run on CPU tensors."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import triton
from torch import Tensor

from flashtile import MaskFunction
from flashtile.api import normalise
from flashtile.backends import hopper_backward
from flashtile.backends.launch import Launch
from flashtile.hopper_backward_tiles import HopperBackwardTile, backward_tile
from flashtile.kernels import masks, schedule
from flashtile.kernels.hopper import key_tiles, query_lists, scheduler, walk
from flashtile.kernels.numbers import opaque
from flashtile.problem import Call, describe


class Pointer(NamedTuple):
    """A tensor's address plus an offset."""

    memory: Tensor
    offset: Any = 0

    def __add__(self, offset: Any) -> Pointer:
        return Pointer(self.memory, self.offset + offset)


def _tensors(function: Any) -> Any:
    return lambda *values: function(*(torch.as_tensor(x) for x in values))


LANGUAGE = SimpleNamespace(
    where=_tensors(torch.where), maximum=_tensors(torch.maximum), minimum=_tensors(torch.minimum),
    load=lambda pointer, mask=True, other=0: pointer.memory[pointer.offset] if mask else other,
    int32=torch.int32, int64=torch.int64, static_range=range, cdiv=lambda a, b: -(-a // b),
    cast=lambda x, dtype: torch.as_tensor(x, dtype=dtype), constexpr=int, static_assert=bool,
)  # fmt: skip


@pytest.fixture(autouse=True)
def _on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    tiles = "find_keys _blocks_of start_walk go_on hidden_steps row_of block_of first_block"
    for module, names in (
        (key_tiles, [*tiles.split(), "tiles_before"]),
        (query_lists, ["open_list", "place_of", "row_there", "find_block"]),
    ):
        for name in names:
            monkeypatch.setattr(module, name, getattr(module, name).fn)
        monkeypatch.setattr(module, "gl", LANGUAGE)
        monkeypatch.setattr(module, "open_sequence", _open_sequence)
    monkeypatch.setattr(key_tiles, "narrow", torch.as_tensor)
    for name in ("query_range", "key_range"):
        monkeypatch.setattr(key_tiles, name, _plainly(getattr(masks, name).fn))
    for module, name in ((key_tiles, "schedule_list"), (query_lists, "schedule_list"),
                         (walk, "block_start")):  # fmt: skip
        monkeypatch.setattr(module, name, getattr(schedule, name).fn)
    monkeypatch.setattr(query_lists, "listed_place", walk.listed_place.fn)
    for name in ("block_of", "row_of", "tiles_before"):
        monkeypatch.setattr(query_lists, name, getattr(key_tiles, name))
    monkeypatch.setattr(query_lists, "pinned", lambda n: torch.tensor(_number(n)))
    for name in ("PARTIAL", "RUN", "SCATTERED"):
        monkeypatch.setattr(walk, name, getattr(schedule, name).value)
        monkeypatch.setattr(schedule, name, getattr(schedule, name).value)
    monkeypatch.setattr(schedule, "LIST_BLOCK", schedule.LIST_BLOCK.value)
    monkeypatch.setattr(schedule, "block_count", schedule.block_count.fn)
    monkeypatch.setattr(schedule, "tl", LANGUAGE)
    monkeypatch.setattr(schedule, "number", _number)
    monkeypatch.setattr(masks, "tl", LANGUAGE)
    monkeypatch.setattr(masks, "number", _number)
    monkeypatch.setattr(masks, "chunk_start", masks.chunk_start.fn)
    monkeypatch.setattr(key_tiles, "pinned", lambda n: torch.tensor(_number(n)))
    monkeypatch.setattr(key_tiles, "split_tile", scheduler.split_tile.fn)
    monkeypatch.setattr(scheduler, "gl", LANGUAGE)
    monkeypatch.setattr(scheduler, "quotient", lambda n, divisor: n // divisor)


def _plainly(fold: Any) -> Any:
    """A fold over masks that takes their ranges' own source."""

    def folded(given: Any, *where: Any) -> Any:
        return fold([m._replace(keys=m.keys.fn, queries=m.queries.fn) for m in given], *where)

    return folded


def _number(n: Any) -> Any:
    return (n - 3) // 2


def _open_sequence(seq: Any, batch: Any) -> Any:
    if seq.cu_seqlens is None:
        room = _number(seq.length)
        return SimpleNamespace(length=_used(seq, batch, room), room=room)
    ends = [*seq.cu_seqlens.memory.tolist(), _number(seq.length)]
    room = ends[int(batch) + 1] - ends[int(batch)]
    length = _used(seq, batch, room) if batch < _number(seq.batch) else 0
    return SimpleNamespace(length=length, room=room)


def _used(seq: Any, batch: Any, room: int) -> int:
    return room if seq.used is None else min(int(seq.used[int(batch)]), room)


def _order(work: Any, q_seq: Any, k_seq: Any, block: int) -> Tensor:
    """(sequence, its tile) of each slot: `prepare.order_tiles`."""
    batches = range(_number(k_seq.batch) + 1)
    longest = sorted(batches, key=lambda i: -_open_sequence(q_seq, i).length)
    found = [(i, n) for i in longest for n in range(-(-_open_sequence(k_seq, i).room // block))]
    left = range(_number(work.key_tiles) - len(found))
    return torch.tensor(found + [(batches[-1], 10**6 + n) for n in left], dtype=torch.int32)


@triton.jit
def _anything(at, args):
    return at.k_idx >= 0


@triton.jit
def _last_keys(first, last, q, k, args):
    return masks.Range(k.length - 70, k.length - 70, k.length, k.length)


FUNCTION = MaskFunction(_anything, keys=_last_keys)
"""With a range that the tiles of keys, which queries see by their own, know nothing of."""


class Step(NamedTuple):
    """A tile's share of dQ of a block."""

    tile: tuple[int, ...]  # batch, KV head, first key
    head: int
    row: int
    block: int
    before: int  # tiles that see it before this one does


def _call(heads: int, kv_heads: int, lengths: list[tuple[int, int]], **given: Any) -> Call:
    """Dense where all lengths are the same, else packed, with ten tokens of no sequence. Sequences
    take so much of their rooms, where these are given."""
    dim, rooms = given.pop("dim", 128), given.pop("rooms", lengths)
    if rooms != lengths:
        used = torch.tensor(lengths, dtype=torch.int32)
        given |= {"seqused_q": used[:, 0].contiguous(), "seqused_k": used[:, 1].contiguous()}
    shapes: list[tuple[int, ...]]
    lengths = rooms
    if len(set(lengths)) == 1:
        shapes = [(len(lengths), n, h) for n, h in zip(lengths[0], (heads, kv_heads), strict=True)]
    else:
        totals = [sum(x) + 10 for x in zip(*lengths, strict=True)]
        shapes = [(n, h) for n, h in zip(totals, (heads, kv_heads), strict=True)]
        cu_q, cu_k = (torch.tensor([0, *torch.tensor(x).cumsum(0)], dtype=torch.int32)
                      for x in zip(*lengths, strict=True))  # fmt: skip
        given |= {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k,
                  "max_seqlen_q": max(x for x, _ in lengths),
                  "max_seqlen_k": max(x for _, x in lengths)}  # fmt: skip
    q, k = (torch.zeros(*shape, dim, dtype=torch.bfloat16) for shape in shapes)
    return normalise(q, k, k, **given)


def _launch(call: Call, tile: HopperBackwardTile, parts: int) -> Launch:
    q, k, v = call.operands[:3]
    space = hopper_backward.workspace(call, tile, torch.zeros_like(q))
    dk, dv = (x.repeat_interleave(parts, -2) for x in (k, v))
    return hopper_backward.gradient_launch(call, tile, space, q, dk, dv)


def _device_arguments(call: Call, tile: HopperBackwardTile, parts: int) -> tuple[Any, Any, Any]:
    """(queries' sequences, keys', all tiles) of a launch, whose tensors are addresses."""
    sequences, _, _, work, _ = _launch(call, tile, parts).arguments[-5:]
    q_seq, k_seq = (
        x if x.cu_seqlens is None else x._replace(cu_seqlens=Pointer(x.cu_seqlens))
        for x in sequences
    )
    if work.order is not None:
        order = _order(work, q_seq, k_seq, tile.block_n)
        work = work._replace(order=Pointer(order.flatten()))
    return q_seq, k_seq, work


def _steps(call: Call, tile: HopperBackwardTile, parts: int = 1) -> list[list[Step]]:
    """What each tile adds, tile by tile as the launch counts them."""
    launch = _launch(call, tile, parts)
    seen = launch.arguments[-4].masks
    q_seq, k_seq, work = _device_arguments(call, tile, parts)
    found = []
    assert launch.grid in (1, _number(work.key_tiles) * _number(work.pairs))
    for number in range(_number(work.key_tiles) * _number(work.pairs)):
        keys = key_tiles.find_keys(work, torch.tensor(number), q_seq, k_seq, seen, None, tile)
        if keys.key < 0:  # nobody's slot
            found.append([])
            continue
        steps: list[Step] = []
        walk = key_tiles.start_walk(keys, work, tile)
        base = key_tiles.first_block(work, q_seq, keys.batch, tile)
        span = _open_sequence(q_seq, keys.batch)
        for _ in range(int(keys.blocks) * _number(work.heads.group)):
            block, before = query_lists.find_block(keys, walk, None, base, span, q_seq, k_seq, seen,
                                                  None, work, tile)  # fmt: skip
            row = int(query_lists.place_of(None, None, keys, walk, span, tile))
            where = (int(keys.batch), int(keys.kv_head) // parts, int(keys.key))
            steps.append(Step(where, int(walk.head), row, int(block), int(before)))
            walk = key_tiles.go_on(walk, keys, work, tile)
        found.append(steps)
    return found


CALLS: dict[str, tuple[Any, dict[str, Any]]] = {
    "full": ((4, 2, [(300, 400)] * 2), {}),
    "causal": ((4, 4, [(700, 700)]), {"causal": True}),
    "grouped": ((6, 2, [(500, 650)] * 2), {"causal": True}),
    "more queries": ((3, 1, [(600, 300)]), {"causal": True, "dim": 64}),
    "window": ((4, 2, [(900, 900)]), {"causal": True, "window_size": (200, 0)}),
    "band": ((2, 2, [(500, 800)]), {"window_size": (130, 60), "dim": 256}),
    "chunk": ((4, 2, [(900, 900)]), {"causal": True, "attention_chunk": 200}),
    "short chunk": ((2, 2, [(300, 420)] * 2), {"attention_chunk": 130, "dim": 64}),
    "chunk and band": ((2, 1, [(700, 500)]), {"attention_chunk": 190, "window_size": (100, 60)}),
    "shared": ((4, 1, [(600, 1300)]), {"causal": True}),
    "wide": ((2, 2, [(700, 700), (300, 500)]), {"causal": True, "dim": 256}),
    "wide groups": ((4, 2, [(500, 650)] * 2), {"causal": True, "dim": 256}),
    "used": ((4, 2, [(150, 120), (0, 300), (500, 660)]),
             {"causal": True, "rooms": [(500, 700)] * 3}),
    "packed": ((4, 2, [(300, 300), (0, 70), (129, 1), (64, 200)]), {"causal": True}),
    "packed wide": ((2, 2, [(300, 300), (0, 70), (129, 1), (64, 200)]),
                      {"causal": True, "dim": 256}),
    "packed chunk": ((4, 2, [(300, 300), (0, 70), (129, 1), (64, 200)]),
                     {"causal": True, "attention_chunk": 90}),
    "packed used": ((2, 2, [(290, 130), (3, 0), (100, 333)]),
                    {"causal": True, "rooms": [(300, 300), (10, 70), (129, 400)]}),
    "unlisted": ((4, 2, [(300, 300), (0, 70), (129, 1)]),
                 {"causal": True, "document_ids": tuple(torch.zeros(n).int() for n in (439, 381))}),
    "wide unlisted": ((2, 1, [(300, 300), (0, 70), (129, 1)]),
                        {"document_ids": tuple(torch.zeros(n).int() for n in (439, 381)),
                         "dim": 256}),
    "function": ((4, 2, [(500, 420)] * 2), {"mask_mod": FUNCTION, "dim": 64}),
    "causal function": ((4, 2, [(900, 900)]), {"causal": True, "mask_mod": FUNCTION}),
    "wide function": ((2, 2, [(500, 420)]), {"causal": True, "mask_mod": FUNCTION, "dim": 256}),
    "packed function": ((4, 2, [(300, 300), (0, 70), (129, 1)]), {"mask_mod": FUNCTION}),
}  # fmt: skip
PARTS = {"grouped": 3, "more queries": 3, "shared": 2, "packed": 2}
WHOLE_AND_PARTS = [*((name, 1) for name in CALLS), *PARTS.items()]
_all_calls = pytest.mark.parametrize(("name", "parts"), WHOLE_AND_PARTS)


@_all_calls
@pytest.mark.parametrize("adds", ["in any order", "after the first"])
def test_tiles_add_to_every_block_that_sees_them_once(name: str, parts: int, adds: str) -> None:
    arguments, keywords = CALLS[name]
    call = _call(*arguments, **keywords)
    tile = replace(backward_tile(describe(call)), adds=adds)
    steps = [x for tile in _steps(call, tile, parts) for x in tile]
    found = {(*x.tile, x.head, x.row) for x in steps}
    assert len(found) == len(steps)
    heads, kv_heads, lengths = arguments
    window = keywords.get("window_size", (None, 0 if keywords.get("causal") else None))
    for batch, (queries, keys) in enumerate(lengths):
        distance = torch.arange(keys) - torch.arange(queries)[:, None] - (keys - queries)
        seen = torch.ones_like(distance, dtype=torch.bool)
        seen &= distance <= window[1] if window[1] is not None else seen
        seen &= distance >= -window[0] if window[0] is not None else seen
        if chunk := keywords.get("attention_chunk", 0):
            seen &= torch.arange(keys) // chunk == (torch.arange(keys) - distance) // chunk
        for key in range(0, keys, tile.block_n):
            for row in range(0, queries, tile.block_m):
                if seen[row : row + tile.block_m, key : key + tile.block_n].any():
                    for head in range(heads):
                        assert (batch, head * kv_heads // heads, key, head, row) in found


def _work_through(tiles: list[list[Step]], ctas: int) -> None:
    """By CTAs that take the next number at a tile's last blocks, until none of them can go on."""
    chance, numbers = random.Random(ctas), iter(range(len(tiles)))
    locks, left = Counter[int](), [len(steps) for steps in tiles]
    taken: list[list[int]] = [[] for _ in range(ctas)]
    idle = 0
    while idle < 100 * ctas:
        own, idle = taken[chance.randrange(ctas)], idle + 1
        if sum(left[n] for n in own) <= 2 and (number := next(numbers, None)) is not None:
            own.append(number)
            idle = 0
        while own and not left[own[0]]:
            own.pop(0)
        step = tiles[own[0]][-left[own[0]]] if own else None
        if step and locks[step.block] >= min(step.before, 1):
            if step.before == 0:
                assert locks[step.block] == 0
                locks[step.block] = 1
            left[own[0]] -= 1
            idle = 0
    assert not any(left)


@pytest.mark.parametrize(
    ("name", "parts"), [x for x in WHOLE_AND_PARTS if "mask_mod" not in CALLS[x[0]][1]]
)
def test_tiles_wait_for_those_with_lower_numbers(name: str, parts: int) -> None:
    """For the first one that adds to a block; never for one that no CTA has taken, however few
    there are at a time."""
    arguments, keywords = CALLS[name]
    call = _call(*arguments, **keywords)
    tiles = _steps(call, replace(backward_tile(describe(call)), adds="after the first"), parts)
    for ctas in (1, 2, 5, len(tiles)):
        _work_through(tiles, ctas)


@_all_calls
def test_a_walk_ends_with_the_steps_that_a_warpgroup_passes_over(name: str, parts: int) -> None:
    """All but one of those whose queries come before all that see its keys."""
    arguments, keywords = CALLS[name]
    call = _call(*arguments, **keywords)
    tile = replace(backward_tile(describe(call)), adds="after the first", skips_last=True)
    launch = _launch(call, tile, parts)
    work = launch.arguments[-2]
    for steps in _steps(call, tile, parts):
        if steps:
            rows = [x.row for x in steps]
            first = SimpleNamespace(row=torch.tensor(min(rows)))
            for lo in range(0, max(rows) + 200, 32):
                seen = [row + tile.block_m > lo for row in rows]
                hidden = int(key_tiles.hidden_steps(first, torch.tensor(lo), len(rows), work, tile))
                assert hidden == min(seen.count(False), len(rows) - 1)
                assert all(seen[: len(rows) - hidden]) or hidden == len(rows) - 1


def test_ranges_are_asked_for_keys_that_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's function reads what it has for a sequence, and there is one less than are opened."""
    blocks_of = key_tiles._blocks_of

    def asked(masks: Any, key: Any, q_span: Any, k_span: Any, tile: Any) -> Any:
        assert key < k_span.length
        return blocks_of(masks, key, q_span, k_span, tile)

    monkeypatch.setattr(key_tiles, "_blocks_of", asked)
    arguments, keywords = CALLS["packed"]
    call = _call(*arguments, **keywords)
    assert any(_steps(call, backward_tile(describe(call)), 1))


def _list(codes: Tensor) -> schedule.BlockList:
    """Lists of codes (batches, heads, tiles of queries, tiles of keys), as `list_blocks` leaves
    them for tiles of keys."""
    by_keys = codes.transpose(-1, -2)
    entries = torch.full(by_keys.shape, 10**6, dtype=torch.int32)
    counts = torch.zeros(*by_keys.shape[:-1], 4, dtype=torch.int32)
    for where in itertools.product(*map(range, by_keys.shape[:-1])):
        partial, full = ((by_keys[where] == n).nonzero().flatten().int() for n in (1, 2))
        entries[where][: len(partial)] = partial
        entries[where][by_keys.shape[-1] - len(full) :] = full.flip(0)
        run = len(full) if len(full) and full[-1] - full[0] + 1 == len(full) else 0
        first = int(full[0]) if len(full) else 0
        counts[where] = torch.tensor([len(partial), len(full) - run, run, first])
    batches, heads, tiles, blocks = entries.shape
    return schedule.BlockList(
        Pointer(entries.flatten()), Pointer(counts.flatten()),
        opaque(heads * tiles if batches > 1 else 0), opaque(tiles if heads > 1 else 0),
        opaque(blocks),
    )  # fmt: skip


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize(("dim", "queries"), [(64, 700), (128, 700), (128, 760), (256, 330)])
def test_listed_blocks_are_walked_once(dim: int, queries: int, per_head: bool) -> None:
    """With masks where a block needs them or begins past the end, and never on to another head's
    sums of dQ."""
    call = _call(4, 2, [(queries, 400)] * 2, dim=dim, document_ids=None)
    tile = replace(backward_tile(describe(call)), skips=False, adds="in any order")
    generator = torch.Generator().manual_seed(dim)
    shape = (2, 4 if per_head else 1, -(-queries // 128), 4)
    codes = torch.randint(0, 3, shape, generator=generator)
    lists, parts = _list(codes), 2 if per_head else 1
    *_, work, _ = _launch(call, tile, parts).arguments
    q_seq, k_seq = _launch(call, tile, parts).arguments[8]
    found, seqs = [], (q_seq, k_seq)
    for number in range(_number(work.key_tiles) * _number(work.pairs)):
        keys = key_tiles.find_keys(work, torch.tensor(number), *seqs, (), lists, tile)
        way = query_lists.open_list(lists, keys, work, k_seq, tile)
        at, base = key_tiles.start_walk(keys, work, tile), int(keys.batch) * 4
        for _ in range(int(keys.blocks) * _number(work.heads.group)):
            span = _open_sequence(q_seq, keys.batch)
            place = int(query_lists.place_of(lists, way, keys, at, span, tile))
            row = int(query_lists.row_there(lists, torch.tensor(place), span, tile))
            per_sequence = -(-queries // tile.block_m)
            block = key_tiles.block_of(row, at, base * per_sequence, work, tile)
            assert int(block) // per_sequence == base + int(at.head)
            found.append((int(keys.batch), int(at.head), int(keys.key), place))
            at = key_tiles.go_on(at, keys, work, tile)
    wanted = []
    for batch, head, key, row in itertools.product(
        range(2), range(4), range(0, 400, tile.block_n),
        range(0, 128 * shape[2], tile.block_m),
    ):  # fmt: skip
        code = int(codes[batch, head % shape[1], row // 128, key // 128])
        if code:
            wanted.append((batch, head, key, row + int(code == 1 or row >= queries)))
    assert sorted(found) == sorted(wanted)
