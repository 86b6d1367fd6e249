"""Tiny random models of every family the suite tests, all weights randomised: fresh norms hide order errors."""

import copy
import dataclasses
import functools
from collections.abc import Iterable
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from linearize.convert import convert
from linearize.modeling.lolcats import LolcatsConfig
from linearize.modeling.mixer import MethodConfig
from linearize.modeling.registry import METHODS
from linearize.probe import probe

COMMON = dict(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
HEAD_DIM = dict(head_dim=16)
FAMILIES: dict[str, dict] = {
    "llama": COMMON | HEAD_DIM | dict(attention_bias=True),
    "mistral": COMMON | HEAD_DIM | dict(sliding_window=None),
    "qwen2": COMMON,
    "qwen3": COMMON | HEAD_DIM,
    "gemma2": COMMON
    | HEAD_DIM
    | dict(sliding_window=6, query_pre_attn_scalar=12, attn_logit_softcapping=5.0),
    "gemma3_text": COMMON
    | HEAD_DIM
    | dict(
        sliding_window=6,
        query_pre_attn_scalar=12,
        layer_types=["sliding_attention", "full_attention", "full_attention"],
    ),
    "phi3": COMMON,
    "olmo2": COMMON,
    "smollm3": COMMON | dict(no_rope_layers=[1, 0, 1]),
    "gpt_neox": COMMON | dict(rotary_pct=0.5, hidden_act="gelu"),
    "gpt2": dict(
        vocab_size=97,
        n_embd=32,
        n_layer=3,
        n_head=4,
        n_positions=512,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    ),
    "mixtral": COMMON | HEAD_DIM | dict(num_local_experts=4, num_experts_per_tok=2, sliding_window=None),
}
UNSUPPORTED: dict[str, dict] = {
    "bloom": dict(vocab_size=97, hidden_size=32, n_layer=2, n_head=4),
    "mpt": dict(vocab_size=97, d_model=32, n_layers=2, n_heads=4, max_seq_len=64),
}


def randomise(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Every parameter redrawn: matrices wide enough for peaked attention, norms near one, biases near zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter.dtype)
            if parameter.ndim == 1:
                parameter.copy_(0.2 * noise + (1.0 if parameter.mean().abs() > 0.5 else 0.0))
            else:
                parameter.copy_(noise * 1.5 / parameter.shape[-1] ** 0.5)
    return model


def tiny(
    family: str = "llama", *, dtype: torch.dtype = torch.float32, seed: int = 0, **overrides
) -> PreTrainedModel:
    """A random model of a few thousand parameters, in evaluation mode."""
    return _copied(_tiny, family, dtype, seed, _frozen(overrides))


def student(
    family: str = "llama", config: MethodConfig | None = None, *, layers="all", **kwargs
) -> PreTrainedModel:
    """A tiny model converted, its mixers randomised too; fp64 unless told otherwise, mixers never below fp32."""
    # Tests may register another mixer under a name.
    registered = tuple(method.mixer for method in METHODS.values())
    return _copied(_student, family, _frozen(config), _frozen(layers), _frozen(kwargs), registered)


def _tiny(family: str, dtype: torch.dtype, seed: int, overrides: Any) -> PreTrainedModel:
    fields = (FAMILIES | UNSUPPORTED)[family] | _thawed(overrides)
    config = AutoConfig.for_model(family, **fields)
    if family == "mixtral":
        config._experts_implementation = "eager"  # grouped products have no fp64
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return randomise(model, seed).eval()


def _student(family: str, config: Any, layers: Any, kwargs: Any, _registered: Any) -> PreTrainedModel:
    kwargs, config = _thawed(kwargs), _thawed(config)
    dtype = kwargs.setdefault("dtype", torch.float64)
    teacher = tiny(family, **kwargs)
    model = convert(teacher, _fitted(config or LolcatsConfig(window=8), teacher), layers=_thawed(layers))
    for mixer in model.mixers().values():
        randomise(mixer, seed=7).to(torch.promote_types(dtype, torch.float32))
    return model


def _fitted(config: Any, teacher: PreTrainedModel) -> Any:
    """Budgets by kv head, as many as the teacher has heads: neighbours share one where there are too few."""
    budgets = getattr(config, "budget", None)
    if not isinstance(budgets, tuple):
        return config
    heads = next(iter(probe(teacher).values())).geometry.kv_heads
    return dataclasses.replace(config, budget=tuple(budgets[i * len(budgets) // heads] for i in range(heads)))


def _copied(make: Any, *key: Any) -> PreTrainedModel:
    """A copy that nobody else has: building and probing a model takes ten times as long as copying it."""
    model, after = _made(make, *key)
    torch.set_rng_state(after)  # as building it leaves the generator
    return copy.deepcopy(model)


@functools.lru_cache(maxsize=256)
def _made(make: Any, *key: Any) -> tuple[PreTrainedModel, torch.Tensor]:
    return make(*key), torch.get_rng_state()


def _frozen(value: Any) -> Any:
    """Lists and dictionaries as tuples that can be a key."""
    if isinstance(value, dict):
        return dict, tuple((name, _frozen(inner)) for name, inner in value.items())
    return (list, tuple(map(_frozen, value))) if isinstance(value, list) else value


def _thawed(value: Any) -> Any:
    if isinstance(value, tuple) and value and value[0] is dict:
        return {name: _thawed(inner) for name, inner in value[1]}
    return list(map(_thawed, value[1])) if isinstance(value, tuple) and value and value[0] is list else value


def variants() -> dict[str, MethodConfig]:
    """One or more small configurations of every registered method that converts a layer, by a readable name."""
    small = {
        "lolcats": [
            dict(window=8, window_kind="sliding"),
            dict(window=4, window_kind="terraced", kv_tied_map=True),
            dict(window=8, window_kind="terraced", affine_factors=True, feature_map="t2r"),
            dict(window=None, feature_map="elu"),
            dict(window=4, window_kind="terraced", sparse_cache=5),
            dict(window=3, window_kind="terraced", sparse_cache=7, kv_tied_map=True, affine_factors=True),
        ],
        "salient": [
            dict(budget=3, chunk=4, score_dim=6),
            dict(budget=6, chunk=3, score_dim=6, score_context=5),
            dict(budget=0, chunk=8),
            dict(budget=4, chunk=4, score_dim=5, score_context=3, objective="locret"),
            dict(budget=(9, 2), chunk=4, score_dim=6),
        ],
        "liger": [
            dict(window=8),
            dict(variant="hgrn2", window=4, hgrn2_lower_bound=0.2, train_mix="head"),
            dict(variant="gsa", window=8, gsa_slots=4),
            dict(window=None, normalize=True, train_gate_bias=True, train_key_temperature=True),
        ],
        "lawcat": [
            {},
            dict(window=8, window_exclude=True),
            dict(window=4, kv_shared=True, conv_size=3, conv_on="k", clamp_log_decay=-0.1),
            dict(conv_size=None, gate_rank=None, tie_qk_map=False, feature_dim=6, feature_map="t2r"),
            dict(conv_on="qkv", normalize=False),
        ],
        "still": [
            dict(chunk=4, salient_per_chunk=1, budget=3),
            dict(chunk=3, salient_per_chunk=2, budget=None, gate="per_head", gate_bias=3.0),
            dict(chunk=5, salient_per_chunk=2, budget=4, share_selection=True, kv_tied_map=True, gate="none"),
            dict(chunk=8, budget=0, feature_map="hedgehog", feature_dim=8),
        ],
        "linear": [dict(feature_map="elu"), dict(kv_tied_map=True, feature_dim=6)],
        "window": [dict(window=8, sinks=3), dict(window=4, window_kind="terraced")],
    }
    found = {}
    for name, method in METHODS.items():
        if method.mixer is not None:
            for fields in small.get(name, [{}]):
                words = [name, *(f"{k}={v}" for k, v in fields.items())]
                found[" ".join(words)] = method.config(**fields)
    return found


def ids(batch: int = 2, length: int = 40, *, vocab: int = 97, seed: int = 1) -> torch.Tensor:
    """Random token ids [batch, length] without special tokens."""
    return torch.randint(3, vocab, (batch, length), generator=torch.Generator().manual_seed(seed))


def representatives() -> dict[str, MethodConfig]:
    """The first variant of every method, by the method's name."""
    found: dict[str, MethodConfig] = {}
    for config in variants().values():
        found.setdefault(config.name, config)
    return found


def pairs(families: Iterable[str], turn: int = 0) -> list[tuple[str, str]]:
    """(family, variant): every method on every family, its variants taking turns from the ``turn``-th on.

    Tests of another turn meet other pairs. A method with more variants than there are families has the rest on the
    first ones again: every variant is met in every test.
    """
    names: dict[str, list[str]] = {}
    for name, config in variants().items():
        names.setdefault(config.name, []).append(name)
    families = list(families)
    return [
        (families[i % len(families)], given[(i + turn) % len(given)])
        for given in names.values()
        for i in range(max(len(families), len(given)))
    ]
