"""The newest tokens of every row, in a buffer of fixed size addressed by position.

A buffer is a tensor [B, n, ...]; the token at position p of a row lies in slot ``p mod n``. Two counters [B] go with
it: ``seen`` (real tokens so far) and ``folded`` (tokens that have left for the linear state, or are forgotten). A
buffer holds the positions ``folded .. seen - 1``; as slots follow from positions, taking tokens back lowers ``seen``.
"""

import torch
from torch import Tensor


def span(window: int | None, kind: str) -> int:
    """Most tokens inside the window of one query: W sliding, 2 W terraced, 0 without a window."""
    return 0 if window is None else window * (2 if kind == "terraced" else 1)


def final(seen: Tensor, window: int | None, kind: str, pending: int = 0) -> Tensor:
    """[B] tokens outside the window of the newest query (position ``seen - 1``), were ``pending`` of them taken back.

    Without a window every token is outside, the query's own included.
    """
    if window is None:
        return (seen - pending).clamp_min(0)
    if kind == "sliding":
        return (seen - pending - window).clamp_min(0)
    return window * ((seen - 1 - pending).div(window, rounding_mode="floor") - 1).clamp_min(0)


def slots(seen: Tensor, size: int) -> Tensor:
    """[B, size] position held by each slot once ``seen`` tokens are written; negative when empty."""
    slot = torch.arange(size, device=seen.device)
    last = seen[:, None] - 1
    return last - (last - slot).remainder(size)


def take(x: Tensor, index: Tensor) -> Tensor:
    """Rows ``index`` [B, m] of ``x`` [B, n, ...], for every batch entry its own: [B, m, ...]."""
    return x[torch.arange(len(x), device=x.device)[:, None], index]


def write(buffer: Tensor, new: Tensor, seen: Tensor, total: Tensor) -> Tensor:
    """The buffer after the tokens at positions ``seen .. total - 1`` (the first rows of ``new`` [B, T, ...])."""
    size = buffer.shape[1]
    if size == 0:
        return buffer
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
