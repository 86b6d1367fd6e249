"""The teacher's own samples, as training text for a student that has no other."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from ..interrupt import Stopped, asked
from ..modeling.cache import CACHE
from ..modeling.errors import DataError
from ..progress import Progress, Watch
from .pool import Pool, write_arrays

# Rows sampled side by side, and what their keys and values may take. One thread of a busy two-core machine gave the
# bundled teacher 2,700 / 3,100 / 3,700 tokens/s with 32 / 64 / 128 rows of 256 tokens, 1,800 with 128 rows of 1,025.
CPU_ROWS, CPU_BYTES = 128, 2 * 2**30
GPU_ROWS, GPU_BYTES = 256, 16 * 2**30


class RoomyLayer(DynamicLayer):
    """A cache layer with its room set aside at the start: growing by `torch.cat` copies all keys at every token."""

    def __init__(self, length: int):
        super().__init__()
        self.length, self.used = length, 0

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any):
        """Keys and values [B, G, t, K] so far, the new ones written behind the old."""
        if not self.used:
            self.lazy_initialization(key_states, value_states)
            shape = (*key_states.shape[:2], self.length)
            self.all_keys = key_states.new_empty(*shape, key_states.shape[-1])
            self.all_values = value_states.new_empty(*shape, value_states.shape[-1])
        end = self.used + key_states.shape[2]
        self.all_keys[:, :, self.used : end] = key_states
        self.all_values[:, :, self.used : end] = value_states
        self.used = end
        self.keys, self.values = self.all_keys[:, :, :end], self.all_values[:, :, :end]
        return self.keys, self.values


def sample_pool(
    model: Any,
    tokenizer: Any,
    *,
    tokens: int,
    row_len: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    prompt_len: int = 1,
    seed: int = 0,
    part: Path | None = None,
    progress: Watch | None = None,
) -> Pool:
    """At least `tokens` tokens that `model` samples in rows of `row_len`, each a document of the pool.

    A row opens with the token that starts a document and goes on past end-of-sequence with the next document, as
    a packed training row does. The first `prompt_len` tokens are given, not learnt: the opening one, then
    uniformly drawn ones. The same seed, model, device and number of threads give the same text.
    Ctrl-C ends the rows that are being sampled together, keeps all so far in the file `part` and raises
    :class:`linearize.interrupt.Stopped`; the next call goes on from there.
    """
    longest = getattr(model.config, "max_position_embeddings", None) or row_len
    row_len = min(row_len, longest)
    if prompt_len >= row_len:
        raise DataError(
            f"data.sources: prompt_len={prompt_len} leaves nothing of a row of {row_len} tokens; shorten it"
        )
    device = model.get_input_embeddings().weight.device
    generator = torch.Generator(device).manual_seed(
        int.from_bytes(hashlib.sha256(f"samples|{seed}".encode()).digest()[:7])
    )
    rows = -(-tokens // row_len)
    side = _side_by_side(model, row_len, device)
    passes = -(-rows // side)
    blocks = _kept(part, row_len, generator)
    for i in range(len(blocks), passes):
        now = rows * (i + 1) // passes - rows * i // passes

        def watch(step: int, start: int = rows * i // passes, now: int = now) -> None:
            if progress is not None and (step % 32 == 0 or step == row_len):
                progress(Progress("sample the teacher", start * row_len + now * step, rows * row_len))

        first = _opening(tokenizer, now, prompt_len, generator)
        blocks.append(_sample(model, tokenizer, first, row_len, temperature, top_p, generator, watch))
        if part is not None and asked() and i + 1 < passes:
            _keep(part, blocks, generator)
            raise Stopped(f"sample the teacher: {i + 1} of {passes} parts are kept in {part.parent}")
    given = None if prompt_len == 1 else [[i >= prompt_len for i in range(row_len)]] * rows
    return Pool.join(torch.cat(blocks).tolist(), given)


def _keep(part: Path, blocks: list[torch.Tensor], generator: torch.Generator) -> None:
    arrays = {f"block-{i:06d}": block.cpu().numpy() for i, block in enumerate(blocks)}
    write_arrays(part, arrays | {"generator": generator.get_state().numpy()})


def _kept(part: Path | None, row_len: int, generator: torch.Generator) -> list[torch.Tensor]:
    """The blocks that a stopped call kept, on the generator's device; the generator then goes on behind them."""
    if part is None or not part.is_file():
        return []
    try:
        arrays = load_file(part)
        generator.set_state(torch.from_numpy(arrays.pop("generator")))
    except (SafetensorError, OSError, KeyError, RuntimeError, TypeError) as error:
        raise DataError(f"{part}: cannot be read ({error}); remove the file to sample anew") from None
    blocks = [torch.from_numpy(arrays[name]).to(generator.device) for name in sorted(arrays)]
    if any(block.ndim != 2 or block.shape[1] != row_len for block in blocks):
        raise DataError(f"{part}: holds other rows than are sampled now; remove the file to sample anew")
    return blocks


def _side_by_side(model: Any, row_len: int, device: torch.device) -> int:
    """How many rows at once; the config's word on heads is good enough for a bound on memory."""
    most, room = (CPU_ROWS, CPU_BYTES) if device.type == "cpu" else (GPU_ROWS, GPU_BYTES)
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    row = 2 * row_len * config.num_hidden_layers * heads * width * model.dtype.itemsize
    return max(1, min(most, room // row))


def _opening(tokenizer: Any, rows: int, prompt_len: int, generator: torch.Generator) -> torch.Tensor:
    """What each row begins with, [rows, prompt_len]."""
    first = torch.randint(len(tokenizer), (rows, prompt_len), generator=generator, device=generator.device)
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if start is not None:
        first[:, 0] = start
    return first


@torch.inference_mode()
def _sample(
    model: Any,
    tokenizer: Any,
    first: torch.Tensor,
    row_len: int,
    temperature: float,
    top_p: float,
    generator: torch.Generator,
    watch: Callable[[int], None],
) -> torch.Tensor:
    """Rows [B, row_len] that begin with `first` [B, t]. Ids beyond the tokenizer's are padding, never drawn."""
    vocab, end, start = len(tokenizer), tokenizer.eos_token_id, tokenizer.bos_token_id
    cache = DynamicCache(config=model.config)
    cache.layers = [RoomyLayer(row_len) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    out = first.new_empty(first.shape[0], row_len)
    out[:, : first.shape[1]] = first
    new = first
    for step in range(first.shape[1], row_len):
        made = model(input_ids=new, use_cache=True, logits_to_keep=1, **{CACHE: cache})
        logits = made.logits[:, -1, :vocab]
        probabilities = (logits.float() / temperature).softmax(-1)
        if top_p < 1:
            probabilities = _nucleus(probabilities, top_p)
        # The inverse of the cumulative distribution: four times quicker on a CPU than torch.multinomial.
        sums = probabilities.cumsum(-1)
        drawn = torch.rand(len(out), 1, generator=generator, device=out.device) * sums[:, -1:]
        new = torch.searchsorted(sums, drawn, right=True).clamp_(max=vocab - 1)
        if None not in (start, end) and start != end:  # such models have seen no document without its opening
            new = torch.where(out[:, step - 1 : step] == end, start, new)
        out[:, step : step + 1] = new
        watch(step + 1)
    return out


def _nucleus(probabilities: torch.Tensor, top_p: float) -> torch.Tensor:
    """The smallest set of likeliest tokens whose sum reaches `top_p`; the others get 0."""
    ordered, order = probabilities.sort(-1, descending=True)
    outside = ordered.cumsum(-1) - ordered >= top_p
    outside[:, 0] = False
    return torch.zeros_like(probabilities).scatter(-1, order, ordered.masked_fill(outside, 0))
