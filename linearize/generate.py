"""Text from a model, converted or not: one call around `model.generate()` for people and for the CLI."""

from typing import Any

import torch

from .modeling.cache import CACHE
from .modeling.errors import EvaluationError
from .state import PromptState

COPIES = ("num_beams", "num_return_sequences")


@torch.no_grad()
def generate(
    model: Any,
    tokenizer: Any,
    prompt: str,
    max_new_tokens: int = 60,
    *,
    do_sample: bool = False,
    seed: int | None = None,
    static: bool = False,
    state: PromptState | None = None,
    **options: Any,
) -> str:
    """The text that `model` writes after `prompt`, without the prompt; greedy unless `do_sample`.

    `static` decodes with a static cache, on a GPU from a CUDA graph: the same text, sooner.
    `state` (:mod:`linearize.state`) stands for a text read before: the prompt goes on from there. `seed` makes
    sampling repeatable and leaves the global generators as they were; `options` (temperature, top_p, num_beams,
    ...) go to `model.generate()`.
    """
    if not isinstance(prompt, str):
        raise EvaluationError(f"prompt: {type(prompt).__name__} is not text; give a string")
    if tokenizer is None:
        raise EvaluationError("tokenizer: the model's folder has none; save its teacher's tokenizer there")
    if max_new_tokens < 1:
        raise EvaluationError(f"max_new_tokens: {max_new_tokens} is impossible; give at least 1")
    if do_sample and options.get("temperature", 1.0) <= 0:
        raise EvaluationError(
            f"temperature: {options['temperature']:g} is impossible; give more than 0, or do not sample"
        )
    if static and state is not None:
        raise EvaluationError("static: cannot go on from a saved state; leave out one of the two")
    if static:
        options["cache_implementation"] = "static"
    device = next(model.parameters()).device
    # What starts a text (a bos token) has been read already where there is a state.
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=state is None).input_ids.long().to(device)
    if ids.shape[1] == 0:
        raise EvaluationError(
            "prompt: it has no tokens, so there is nothing to continue; give at least one word"
        )
    if state is not None:
        ids, options[CACHE] = state.before(ids, max(options.get(k) or 1 for k in COPIES))
    # Without a pad token transformers warns and takes the end of sequence; one row needs no padding at all.
    options.setdefault("pad_token_id", _pad_token(model, tokenizer))
    was_training = model.training
    model.eval()
    try:
        with torch.random.fork_rng(_cuda(device), enabled=seed is not None):
            if seed is not None:
                torch.manual_seed(seed)
            written = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=max_new_tokens,
                do_sample=do_sample,
                **options,
            )
    except IndexError as error:
        limit = getattr(model.config, "max_position_embeddings", None)
        if limit is None or ids.shape[1] + max_new_tokens <= limit:
            raise
        raise EvaluationError(
            f"prompt: {ids.shape[1]} tokens and {max_new_tokens} new ones pass the model's table of {limit} "
            "positions; shorten the prompt or lower max_new_tokens"
        ) from error
    finally:
        model.train(was_training)
    # Decoded together and cut in text: some tokenizers drop the first space of what they decode.
    start = len(tokenizer.decode(ids[0], skip_special_tokens=True))
    return tokenizer.decode(written[0], skip_special_tokens=True)[start:]


def _pad_token(model: Any, tokenizer: Any) -> int | None:
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id, model.config.eos_token_id):
        if token is not None:
            return token[0] if isinstance(token, list) else token
    return None


def _cuda(device: torch.device) -> list[torch.device]:
    return [device] if device.type == "cuda" else []
