"""The newest tokens of every row, in a buffer of fixed size addressed by position.

A buffer is a tensor [B, n, ...]; the token at position p of a row lies in slot ``p mod n``. Two counters [B] go with
it: ``seen`` (real tokens so far) and ``folded`` (tokens that have left for the linear state, or are forgotten). A
buffer holds the positions ``folded .. seen - 1``; as slots follow from positions, taking tokens back lowers ``seen``.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor


def span(window: int | None, kind: str) -> int:
    """Most tokens inside the window of one query: W sliding, 2 W terraced, 0 without a window."""
    return 0 if window is None else window * (2 if kind == "terraced" else 1)


Count = TypeVar("Count", Tensor, int)


def final(seen: Count, window: int | None, kind: str, pending: int = 0) -> Count:
    """Tokens outside the window of the newest query (position ``seen - 1``), were ``pending`` of them taken back: [B],
    or of all rows alike.

    Without a window every token is outside, the query's own included.
    """
    if window is None:
        return _positive(seen - pending)
    if kind == "sliding":
        return _positive(seen - pending - window)
    return window * _positive((seen - 1 - pending) // window - 1)


def _positive(x: Count) -> Count:
    return x.clamp_min(0) if isinstance(x, Tensor) else max(x, 0)


def counted(state: Any, x: Any, fresh: bool, limit: Callable[[Any], Any]) -> tuple[Tensor, Tensor]:
    """``seen`` and ``folded`` of a state after the tokens of a mixer's input x; ``limit`` gives the second of the
    first. The host does, on an integer, where rows that are ``fresh`` are all as long."""
    time = x.q.shape[1]
    if fresh and x.lengths is None:
        return torch.full_like(state.seen, time), torch.full_like(state.folded, limit(time))
    total = state.seen + (time if x.lengths is None else x.lengths)
    return total, limit(total).maximum(state.folded)


def slots(seen: Tensor, size: int) -> Tensor:
    """[B, size] position held by each slot once ``seen`` tokens are written; negative when empty."""
    slot = torch.arange(size, device=seen.device)
    last = seen[:, None] - 1
    return last - (last - slot).remainder(size)


def take(x: Tensor, index: Tensor) -> Tensor:
    """Rows ``index`` [B, m] of ``x`` [B, n, ...], for every batch entry its own: [B, m, ...]."""
    return x[torch.arange(len(x), device=x.device)[:, None], index]


def write(buffer: Tensor, new: Tensor, seen: Tensor, total: Tensor, whole: bool = False) -> Tensor:
    """The buffer after the tokens at positions ``seen .. total - 1`` (the first rows of ``new`` [B, T, ...]). ``whole``
    says that these are 0 to T - 1 in every row, so that their slots are known without the counters."""
    size, time = buffer.shape[1], new.shape[1]
    if size == 0:
        return buffer
    if whole and time < size:
        return torch.cat((new.to(buffer.dtype), buffer[:, time:]), 1)
    if whole:
        turned = time - time % size
        return torch.cat((new[:, turned:], new[:, time - size : turned]), 1).to(buffer.dtype)
    held = slots(total, size)
    fresh = held >= seen[:, None]
    source = (held - seen[:, None]).clamp(0, new.shape[1] - 1)
    fresh = fresh.view(*fresh.shape, *[1] * (buffer.ndim - 2))
    return torch.where(fresh, take(new, source).to(buffer.dtype), buffer)


def resize(buffer: Tensor, seen: Tensor, size: int) -> Tensor:
    """The same tokens in a larger buffer."""
    if buffer.shape[1] >= size:
        return buffer
    if buffer.shape[1] == 0:
        return buffer.new_zeros(len(buffer), size, *buffer.shape[2:])
    held = slots(seen, size)
    return take(buffer, held.remainder(buffer.shape[1]))


def unroll(buffer: Tensor, new: Tensor, seen: Tensor, folded: Tensor) -> Tensor:
    """[B, n + T, ...] tokens from position ``folded`` on, in order: those of the buffer, then ``new`` [B, T, ...].

    Column c is position ``folded + c``; columns past the last new token repeat it.
    """
    size, time = buffer.shape[1], new.shape[1]
    if size == 0:
        return new
    position = folded[:, None] + torch.arange(size + time, device=seen.device)
    old = take(buffer, position.remainder(size))
    fresh = take(new, (position - seen[:, None]).clamp(0, time - 1))
    is_old = (position < seen[:, None]).view(*position.shape, *[1] * (buffer.ndim - 2))
    return torch.where(is_old, old.to(new.dtype), fresh)


def attend_through(
    ring: tuple[Tensor, Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *along: Tensor,
    seen: Tensor,
    first: Tensor,
    attend: Callable[..., Tensor],
    decode: Callable[..., Tensor],
) -> Tensor:
    """y [B, T, H, V] of new queries on a sliding window whose older keys and values lie in two rings.

    The rings hold the positions ``first`` [B] to ``seen - 1``, and the window of the first query begins among them.
    ``attend`` takes a whole sequence, ``decode`` slots with ``key_positions`` and ``query_positions``; both take
    q, k, v, and the tensors ``along`` q [B, T, ...].
    """
    held = ring[0].shape[1]
    k, v = (
        unroll(old, new, seen, first)[:, : held + q.shape[1]] for old, new in zip(ring, (k, v), strict=True)
    )
    if q.shape[1] == 1:
        return decode(q, k, v, *along, **step_positions(k, seen, first))
    q, *along_columns = (at_columns(t, held, seen, first) for t in (q, *along))
    return new_columns(attend(q, k, v, *along_columns), q.shape[1] - held, seen, first)


def step_positions(columns: Tensor, seen: Tensor, first: Tensor) -> dict[str, Tensor]:
    """Positions, for a decode, of one new query a row and of the columns ``first, ...`` that :func:`unroll` gave; those
    that only repeat the new token count as empty."""
    position = first[:, None] + torch.arange(columns.shape[1], device=columns.device)
    position = position.masked_fill(position > seen[:, None], -1)
    return {"key_positions": position, "query_positions": seen[:, None]}


def at_columns(new: Tensor, held: int, seen: Tensor, first: Tensor) -> Tensor:
    """``new`` [B, T, ...] where :func:`unroll` puts new tokens, [B, held + T, ...]; zeros before them."""
    return unroll(new.new_zeros(len(new), held, *new.shape[2:]), new, seen, first)


def new_columns(y: Tensor, time: int, seen: Tensor, first: Tensor) -> Tensor:
    """The columns of the ``time`` new tokens in ``y`` [B, held + T, ...]."""
    if y.shape[1] == time:
        return y
    return take(y, (seen - first)[:, None] + torch.arange(time, device=y.device))
