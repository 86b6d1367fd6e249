"""What every O(T) form shares: precision, windows, and tiles of queries that meet a few tiles of keys.

Letters as in ``reference.py``; C tile, N tiles. A query tile meets its own and the previous tile of keys, and a state
of everything older. Tiles are [B, G, N, r, C, D]: the r heads of a group stand together, so that one product serves
them all and k and v need no repeating. A few queries against slots in any order are one tile of their own.
"""

import functools
from collections.abc import Callable
from typing import Literal, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import pad

WindowKind = Literal["sliding", "terraced"]
State = tuple[Tensor, Tensor]
P = ParamSpec("P")
Y = TypeVar("Y")

MIN_TILE = 64  # shorter tiles store more states than they save in products
PURE_LINEAR_EPS = 1e-12  # without a window nothing bounds the denominator from below


def full_precision(function: Callable[P, Y]) -> Callable[P, Y]:
    """The function with autocast off: it would round sums that must stay fp32 to bf16."""

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> Y:
        first = next(arg for arg in args if isinstance(arg, Tensor))
        with torch.autocast(first.device.type, enabled=False):
            return function(*args, **kwargs)

    return wrapped


def accumulator(*tensors: Tensor) -> torch.dtype:
    """fp32, or fp64 where an input is."""
    return functools.reduce(torch.promote_types, (tensor.dtype for tensor in tensors), torch.float32)


def in_window(query: Tensor, key: Tensor, window: int, kind: WindowKind) -> Tensor:
    """Whether each key lies in each query's window, by positions (broadcast); later keys are not excluded."""
    if kind == "sliding":
        return key > query - window
    if kind == "terraced":
        return query.div(window, rounding_mode="floor") - key.div(window, rounding_mode="floor") <= 1
    raise ValueError(f"window_kind={kind!r}: choose sliding or terraced")


def window_mask(
    length: int, window: int | None, kind: WindowKind, device: torch.device | None = None
) -> tuple[Tensor, Tensor]:
    """(window, linear): two boolean masks [T, T], row = query, that part the causal keys."""
    position = torch.arange(length, device=device)
    causal = position <= position[:, None]
    if not window:
        return torch.zeros_like(causal), causal
    inside = in_window(position[:, None], position, window, kind)
    return causal & inside, causal & ~inside


def scores_of(q: Tensor, k: Tensor, scale: float, softcap: float | None) -> Tensor:
    """s [B, H, T, n] from q [B, T, H, K] and k [B, n, G, K], the teacher's soft-cap included."""
    scores = scale * torch.einsum("bihk,bjhk->bhij", q, per_head(k, q.shape[2]))
    return scores if softcap is None else softcap * torch.tanh(scores / softcap)


def per_head(x: Tensor, heads: int) -> Tensor:
    """x [B, T, G, D] as [B, T, H, D], kv heads repeated."""
    return x.repeat_interleave(heads // x.shape[2], dim=2)


def tile_length(length: int, window: int | None, kind: WindowKind) -> int:
    """C, such that no window reaches further back than the previous tile; one tile where all fits."""
    if not window:
        tile = MIN_TILE
    elif kind == "sliding":
        tile = max(window, MIN_TILE)
    else:  # blocks and tiles share their borders
        tile = -(-MIN_TILE // window) * window
    return min(tile, length)


def tiles_of(x: Tensor, tile: int, groups: int, dtype: torch.dtype) -> Tensor:
    """x [B, T, heads, D] as [B, G, N, r, C, D] with r = heads / G, zeros after the end."""
    batch, length, heads, dim = x.shape
    x = pad(x, (0, 0, 0, 0, 0, -length % tile)) if length % tile else x
    x = x.reshape(batch, -1, tile, groups, heads // groups, dim).permute(0, 3, 1, 4, 2, 5)
    return x.to(dtype, memory_format=torch.contiguous_format).contiguous()


def feature_tiles(phi_q: Tensor, tile: int, groups: int, shared: int, dtype: torch.dtype) -> Tensor:
    """phi_q [B, T, H, F] as [B, G, N, r, R/r*C, F]: the rows that meet one key map stand together."""
    return tiles_of(phi_q, tile, groups, dtype).unflatten(3, (shared, -1)).flatten(4, 5)


def grouped(phi: Tensor, groups: int) -> Tensor:
    """phi [B, n, Hs, F] as [B, n, G, r*F], the features of a group side by side."""
    return phi.unflatten(2, (groups, phi.shape[2] // groups)).flatten(3)


def untile(y: Tensor, length: int, dtype: torch.dtype) -> Tensor:
    """y [B, G, N, R, C, V] as [B, T, H, V]."""
    batch, groups, count, per_group, tile, dim = y.shape
    y = y.to(dtype).permute(0, 2, 4, 1, 3, 5).reshape(batch, count * tile, groups * per_group, dim)
    return y[:, :length]


def near_of(x: Tensor, stop: int | None = None) -> Tensor:
    """The previous tile (zeros before the first), then the own one, up to row ``stop``: [B, G, N, 2C, D]."""
    count, tile = x.shape[2], x.shape[3]
    if count == 1:
        return x[..., :stop, :]
    previous = pad(x[:, :, :-1], (0, 0, 0, 0, 1, 0))
    if stop is not None and stop <= tile:
        return previous[..., :stop, :]
    return torch.cat((previous, x[..., : None if stop is None else stop - tile, :]), dim=3)


def near_positions(count: int, tile: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Positions of queries [N, C, 1] and of their near keys [N, 1, 2C]; before index 0 they are negative."""
    start = tile * torch.arange(count, device=device)[:, None]
    query = start + torch.arange(tile, device=device)
    key = query if count == 1 else start + torch.arange(-tile, tile, device=device)
    return query[:, :, None], key[:, None, :]


def probabilities_of(q: Tensor, k: Tensor, visible: Tensor, scale: float, softcap: float | None) -> Tensor:
    """Softmax [B, G, N, R*C, n] over the visible near keys.

    q [B, G, N, R, C, K], k [B, G, N, n, K], visible [B|1, 1, N, C, n].
    """
    rows = (q * scale).flatten(3, 4)
    scores = rows @ k.transpose(-1, -2)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    hidden = (~visible).repeat(1, 1, 1, q.shape[3], 1)
    # The lowest finite score, not -inf: a row that sees nothing (an empty batch row) stays finite.
    return torch.softmax(scores.masked_fill_(hidden, torch.finfo(scores.dtype).min), dim=-1)


def with_ones(v: Tensor) -> Tensor:
    """v with a last column of ones, so that a weighted sum carries its denominator."""
    return pad(v, (0, 1), value=1.0)


def linear_part(phi_q: Tensor, phi_k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    """Numerator and denominator [B, G, N, R*C, V+1] of the kept near keys.

    phi_q [B, G, N, r, R/r*C, F], phi_k [B, G, N, n, r*F], v [B, G, N, n, V+1]; keep broadcasts to
    [B, 1, N, 1, R/r, C, n].
    """
    shared = phi_q.shape[3]
    keys = phi_k.unflatten(-1, (shared, -1)).permute(0, 1, 2, 4, 5, 3)  # [B, G, N, r, F, n]
    weights = (phi_q @ keys).unflatten(4, (-1, keep.shape[-2]))
    return weights.masked_fill(~keep, 0.0).flatten(3, 5) @ v


def from_state(phi_q: Tensor, state: Tensor) -> Tensor:
    """Sums [B, G, N, R*C, V+1] of phi_q [B, G, N, r, R/r*C, F] against states [B, G, N, r, F, V+1]."""
    return (phi_q @ state).flatten(3, 4)


def join_state(state: State, groups: int, dtype: torch.dtype) -> Tensor:
    """(S, z) as one tensor [B, G, 1, r, F, V+1]."""
    kv, z = state
    joined = torch.cat((kv.to(dtype), z.to(dtype)[..., None]), dim=-1)
    return joined.unflatten(1, (groups, -1))[:, :, None]


def join(
    probabilities: Tensor | None,
    v: Tensor,
    linear: Tensor | None,
    q: Tensor,
    window_factor: Tensor,
    linear_factor: Tensor | None,
) -> Tensor:
    """y [B, G, N, R, C, V] from the window's probabilities and the linear sums, over one denominator.

    The largest probability of a row is exp(c - LSE): numerator and denominator times it are g P v + b pmax
    linear, the formula of the module with nothing that can overflow and gradient through c as part of the
    softmax's own.
    """
    if probabilities is None:
        assert linear is not None
        num, den = linear.split((linear.shape[-1] - 1, 1), dim=-1)
        return (num / (den + PURE_LINEAR_EPS)).unflatten(3, q.shape[3:5])
    joint = (probabilities @ v).unflatten(3, q.shape[3:5])  # [B, G, N, R, C, V+1]
    if linear is None:
        return joint[..., :-1]
    shape = (q.shape[1], 1, q.shape[3], 1, 1)  # [G, 1, R, 1, 1]
    share = probabilities.max(dim=-1, keepdim=True).values.unflatten(3, q.shape[3:5])
    if linear_factor is not None:
        share = share * linear_factor.to(joint.dtype).view(shape)
    joint = window_factor.to(joint.dtype).view(shape) * joint + share * linear.unflatten(3, q.shape[3:5])
    num, den = joint.split((joint.shape[-1] - 1, 1), dim=-1)  # the gradient of slices would fill zeros
    return num / den


def slots_of(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x [B, n, G, D] as near keys of a single tile, [B, G, 1, n, D]."""
    return x.to(dtype).transpose(1, 2)[:, :, None]


def slot_masks(
    key_positions: Tensor, query_positions: Tensor, window: int | None, kind: WindowKind, sinks: int = 0
) -> tuple[Tensor, Tensor]:
    """(window, linear) masks [B, 1, 1, Tq, n] by positions; negative key positions are empty slots."""
    key, query = key_positions[:, None, None, None], query_positions[:, None, None, :, None]
    seen = (key >= 0) & (key <= query)
    if not window:
        return torch.zeros_like(seen), seen
    inside = in_window(query, key, window, kind) | (key < sinks)
    return seen & inside, seen & ~inside
