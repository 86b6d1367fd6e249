"""The kept set of every chunk, all chunks at once: ``selection.running_best`` without its loop over chunks.

Tokens are compared by one 64-bit number, the score's order above, the position's complement below, so that no two are
equal and the greater one is kept. Candidates come in chunks of m (Salient: the chunk's tokens; STILL: its picks), and
chunks in segments. What comes out of :func:`running_sets`:

    index [B, G, N, n]   positions kept by the queries of each chunk, best first, -1 in an empty slot
    leave [B, G, T]      the chunk whose set a token is no longer in; entering is known (two chunks after its own)
    lists [B, G, S, n]   the best n of segments 0..s, as numbers, best first
    left [B, G, N, m]    with picks: who was kept until this chunk, -1 in an empty slot

A token's place in a set is the count of better tokens handed over until then, and it leaves when that reaches n. So:

1. ranks    count, inside a segment, the better candidates of each: its place in the segment's own sorted list
2. merge    lists of s - d and s become one, d = 1, 2, 4, ..: an element's place is its own plus a binary search
3. replay   from the list of the segments before, add chunk after chunk to the counts of carried and own tokens

The work is T (n + segment) comparisons a head, no step of it in sequence but log2(segments) merges.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launches import Launch, cdiv, launch, power_of_two

EMPTY = tl.constexpr(-(2**63))
NEVER = tl.constexpr(2**31 - 1)
CANDIDATES_A_SEGMENT, CHUNKS_A_SEGMENT = 1024, 64


class Sets(NamedTuple):
    """The kept sets of a sequence; the module's docstring says of what shape."""

    index: Tensor
    leave: Tensor
    lists: Tensor
    segment: int
    """Chunks of candidates in a segment."""
    left: Tensor | None = None


@triton.jit
def order_key(score, position):
    """A number that is greater for the token that is kept sooner: int64 of a fp32 score and an int32 position."""
    bits = (score + 0.0).to(tl.int32, bitcast=True)  # -0.0 and 0.0 are one score
    ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return (ordered.to(tl.int64) << 32) | (0x7FFFFFFF - position).to(tl.int64)


@triton.jit
def key_position(key):
    return 0x7FFFFFFF - (key & 0x7FFFFFFF).to(tl.int32)


@triton.jit
def greater_in(sorted_ptr, key, n, equal: tl.constexpr, STEPS: tl.constexpr):
    """How many of n numbers, in falling order, exceed each key (``equal``: or equal it)."""
    found = tl.zeros(key.shape, tl.int32)
    for i in tl.static_range(STEPS):
        probe = found + ((1 << (STEPS - 1 - i)) - 1)
        other = tl.load(sorted_ptr + probe, mask=probe < n, other=EMPTY)
        more = (other >= key) if equal else (other > key)
        found = tl.where((probe < n) & more, probe + 1, found)
    return found


@triton.jit
def empty_slots(index, lists, row, c, segments, n):
    """What no candidate will be written to: chunk c's set and, of the first chunks, the list of segment c."""
    index += (row.to(tl.int64) * tl.num_programs(1) + c) * n
    lists += (row.to(tl.int64) * segments + c) * n
    for start in range(0, n, 256):
        i = start + tl.arange(0, 256)
        tl.store(index + i, tl.full([256], -1, tl.int32), mask=i < n)
        tl.store(lists + i, tl.full([256], EMPTY, tl.int64), mask=(i < n) & (c < segments))


@triton.jit(do_not_specialize=["time", "candidates", "segments", "n"])
def keys_kernel(
    score, keys, leave, index, lists, time, candidates, segments, n, stride_b, stride_t, stride_g,
    groups: tl.constexpr, chunk: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """Every token is a candidate: keys [BG, candidates] and leave [BG, T], as if nothing ever left; index and lists
    become empty. Grid (BG, N)."""
    row, c = tl.program_id(0), tl.program_id(1)
    empty_slots(index, lists, row, c, segments, n)
    i = tl.arange(0, block)
    t = c * chunk + i
    there = (i < chunk) & (t < time)
    start = score + (row // groups).to(tl.int64) * stride_b + (row % groups) * stride_g
    s = tl.load(start + t.to(tl.int64) * stride_t, mask=there, other=float("-inf")).to(tl.float32)
    barred = s == float("-inf")
    key = tl.where(barred, EMPTY, order_key(s, t))
    tl.store(keys + row.to(tl.int64) * candidates + t, key, mask=there & (t < candidates))
    stays = tl.where(barred | (t >= candidates), c + 2, NEVER)
    tl.store(leave + row.to(tl.int64) * time + t, stays, mask=there)


@triton.jit(do_not_specialize=["time", "candidates", "segments", "n"])
def picks_kernel(
    score, keys, leave, index, lists, left, time, candidates, segments, n, stride_b, stride_t, stride_g,
    groups: tl.constexpr, chunk: tl.constexpr, picks: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """The best ``picks`` of every chunk are candidates: keys [BG, candidates], best first in each chunk; leave
    [BG, T] is the chunk with which a token that is not picked turns linear, and NEVER for the others. index, lists and
    left become empty. Grid (BG, N)."""
    row, c = tl.program_id(0), tl.program_id(1)
    empty_slots(index, lists, row, c, segments, n)
    i = tl.arange(0, block)
    place = (row.to(tl.int64) * tl.num_programs(1) + c) * picks + i
    tl.store(left + place, tl.full([block], -1, tl.int32), mask=i < picks)
    t = c * chunk + i
    there = (i < chunk) & (t < time)
    start = score + (row // groups).to(tl.int64) * stride_b + (row % groups) * stride_g
    s = tl.load(start + t.to(tl.int64) * stride_t, mask=there, other=float("-inf")).to(tl.float32)
    key = tl.where(there, order_key(s, t), EMPTY)
    rank = tl.sum((key[None, :] > key[:, None]).to(tl.int32), 1)
    barred = s == float("-inf")
    place = c * picks + rank
    tl.store(
        keys + row.to(tl.int64) * candidates + place,
        tl.where(barred, EMPTY, key),
        mask=(rank < picks) & there & (place < candidates),
    )
    loose = barred | (rank >= picks) | (place >= candidates)
    tl.store(leave + row.to(tl.int64) * time + t, tl.where(loose, c + 2, NEVER), mask=there)


@triton.jit(do_not_specialize=["candidates", "count", "n"])
def ranks_kernel(
    keys, lists, candidates, count, n, length: tl.constexpr, rows: tl.constexpr, columns: tl.constexpr
):
    """lists [BG, S, n] of each segment alone; grid (row tiles, S, BG)."""
    segment, head = tl.program_id(1), tl.program_id(2)
    keys += head.to(tl.int64) * candidates + segment * length
    within = tl.minimum(candidates - segment * length, length)
    r = tl.program_id(0) * rows + tl.arange(0, rows)
    key = tl.load(keys + r, mask=r < within, other=EMPTY)
    rank = tl.zeros([rows], tl.int32)
    for start in range(0, within, columns):
        c = start + tl.arange(0, columns)
        other = tl.load(keys + c, mask=c < within, other=EMPTY)
        rank += tl.sum((other[None, :] > key[:, None]).to(tl.int32), 1)
    place = (head.to(tl.int64) * count + segment) * n + rank
    tl.store(lists + place, key, mask=(rank < n) & (key != EMPTY))


@triton.jit(do_not_specialize=["count", "distance", "n"])
def merge_kernel(lists, merged, count, distance, n, rows: tl.constexpr, STEPS: tl.constexpr):
    """merged[s] = the best n of lists[s - distance] and lists[s]; grid (row tiles, S, BG)."""
    segment, head = tl.program_id(1), tl.program_id(2)
    i = tl.program_id(0) * rows + tl.arange(0, rows)
    there = i < n
    later = (head.to(tl.int64) * count + segment) * n
    mine = tl.load(lists + later + i, mask=there, other=EMPTY)
    if segment < distance:
        tl.store(merged + later + i, mine, mask=there)
    else:
        earlier = later - distance.to(tl.int64) * n
        theirs = tl.load(lists + earlier + i, mask=there, other=EMPTY)
        # Empty elements of the earlier list stand after all that is real, those of the later one behind them: every
        # place below n is written once.
        place = i + greater_in(lists + later, theirs, n, False, STEPS)
        tl.store(merged + later + place, theirs, mask=there & (place < n))
        place = i + greater_in(lists + earlier, mine, n, True, STEPS)
        tl.store(merged + later + place, mine, mask=there & (place < n))


@triton.jit(do_not_specialize=["candidates", "routed", "count", "time", "n"])
def replay_kernel(
    keys, lists, index, leave, left, candidates, routed, count, time, n,
    per_chunk: tl.constexpr, padded: tl.constexpr, chunks: tl.constexpr, rows: tl.constexpr,
    STEPS: tl.constexpr, LEFT: tl.constexpr,
):  # fmt: skip
    """index [BG, routed + 2, n] and leave [BG, T]; grid (tiles of carried tokens, then of own ones; S; BG)."""
    tile, segment, head = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    carried_tiles = tl.cdiv(n, rows)
    keys += head.to(tl.int64) * candidates
    index += head.to(tl.int64) * (routed + 2) * n
    leave += head.to(tl.int64) * time
    left += head.to(tl.int64) * (routed + 2) * per_chunk
    before = lists + (head.to(tl.int64) * count + segment - 1) * n
    first = segment * chunks
    stop = tl.minimum(first + chunks, routed)
    if tile < carried_tiles:
        i = tile * rows + tl.arange(0, rows)
        key = tl.load(before + i, mask=(i < n) & (segment > 0), other=EMPTY)
        better = i
        since = tl.full([rows], first - 1, tl.int32)
    else:
        i = first * per_chunk + (tile - carried_tiles) * rows + tl.arange(0, rows)
        key = tl.load(keys + i, mask=i < stop * per_chunk, other=EMPTY)
        better = greater_in(before, key, tl.where(segment > 0, n, 0), False, STEPS)
        since = (i // per_chunk).to(tl.int32)
    position = key_position(key)
    real = key != EMPTY
    # Who has n better ones before its segment begins never enters, and most tokens of a long text have.
    tl.store(leave + position, since + 2, mask=real & (better >= n))
    alive = real & (better < n)
    if tl.max(alive.to(tl.int32), 0) > 0:
        j = tl.arange(0, padded)
        for x in range(first, stop):
            other = tl.load(keys + x * per_chunk + j, mask=j < per_chunk, other=EMPTY)
            better += tl.sum((other[None, :] > key[:, None]).to(tl.int32), 1)
            inside = alive & (since <= x)
            kept = inside & (better < n)
            tl.store(index + (x + 2) * n + better, position, mask=kept)
            gone = inside & (better >= n)
            tl.store(leave + position, x + 2, mask=gone)
            if LEFT:  # better ones than who was kept until now were too: its place past the n-th is its own
                at = left + (x + 2) * per_chunk + better - n
                tl.store(at, position, mask=gone & (since < x))
            alive = alive & (better < n) | (alive & (since > x))


def running_sets(
    score: Tensor,
    *,
    chunk: int,
    size: int,
    picks: int | None = None,
    segment: int | None = None,
    settings: dict[str, Launch] | None = None,
) -> Sets:
    """The kept sets of score [B, T, G]: of all tokens, or of the ``picks`` best of each chunk."""
    batch, time, groups = score.shape
    heads, count = batch * groups, -(-time // chunk)
    routed, per_chunk = max(0, count - 2), chunk if picks is None else picks
    candidates = routed * per_chunk
    n = min(size, candidates)
    device = score.device
    chunks = segment or max(1, min(CANDIDATES_A_SEGMENT // max(1, per_chunk), CHUNKS_A_SEGMENT))
    segments = -(-routed // chunks)
    whole: dict[str, Any] = dict(dtype=torch.int32, device=device)
    wide: dict[str, Any] = dict(dtype=torch.int64, device=device)
    leave = torch.empty(batch, groups, time, **whole)
    index = torch.empty(batch, groups, count, n, **whole)
    lists = torch.empty(batch, groups, segments, n, **wide)
    left = None if picks is None else torch.empty(batch, groups, count, picks, **whole)
    if n == 0:  # nothing is ever kept: a token is forgotten, or linear, as soon as it leaves the local span
        leave.copy_(torch.arange(time, device=device).div(chunk, rounding_mode="floor").add(2))
        return Sets(index, leave, lists, chunks, left if left is None else left.fill_(-1))
    keys = torch.empty(heads, candidates, **wide)
    block = power_of_two(chunk, 16)
    shape: dict[str, Any] = dict(groups=groups, chunk=chunk, block=block)
    given = (time, candidates, segments, n, *score.stride())
    if left is None:
        shape["num_warps"] = max(1, block // 32)
        keys_kernel[(heads, count)](score, keys, leave, index, lists, *given, **shape)
    else:
        shape |= dict(picks=picks, num_warps=max(1, block**2 // 2048))  # tokens are compared in registers
        picks_kernel[(heads, count)](score, keys, leave, index, lists, left, *given, **shape)
    options = ((settings or {}).get("selected_ranks") or launch("selected_ranks", device)).options
    length = chunks * per_chunk
    grid = (cdiv(length, options["rows"]), segments, heads)
    options["length"] = length
    ranks_kernel[grid](keys, lists, candidates, segments, n, **options)
    steps: dict[str, Any] = dict(STEPS=n.bit_length())
    distance, merged = 1, torch.empty_like(lists)
    while distance < segments:
        grid = (cdiv(n, 128), segments, heads)
        merge_kernel[grid](lists, merged, segments, distance, n, **steps, **dict[str, Any](rows=128))
        lists, merged = merged, lists
        distance *= 2
    options = ((settings or {}).get("selected_replay") or launch("selected_replay", device)).options
    options |= dict(per_chunk=per_chunk, padded=power_of_two(per_chunk, 2), chunks=chunks)
    options["LEFT"] = left is not None
    grid = (cdiv(n, options["rows"]) + cdiv(length, options["rows"]), segments, heads)
    replay_kernel[grid](
        keys,
        lists,
        index,
        leave,
        leave if left is None else left,
        candidates,
        routed,
        segments,
        time,
        n,
        **steps,
        **options,
    )
    return Sets(index, leave, lists, chunks, left)
