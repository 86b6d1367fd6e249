"""What a recipe will cost, before anything is loaded: parameters, tokens, memory, time; and what it saves.

Parameters, tokens and the bytes of states and KV caches are exact, from the shapes of the teacher's ``config.json``.
Memory of training is a sum of what is known to be held (weights, gradients, AdamW's two moments) and of activations,
for which a formula stands: a guide, within a factor of two. Time is that of a measured step, or of a declared speed.
"""

import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from .convert import LayerReport, convert, forecast
from .modeling.errors import RecipeError
from .probe import probe
from .recipe import Finetune, Recipe, Transfer
from .teacher import teacher_without_weights
from .train.finetune import FinetuneStage
from .train.transfer import TransferStage

LENGTHS = (8_192, 32_768, 131_072)
ADAMW = 16
"""Bytes of a parameter that trains: itself, its gradient and two moments, all fp32."""
MEASURED_BYTES = 4 * 2**30
"""Weights that a measured step may fill with random numbers."""


@dataclass(frozen=True)
class StageEstimate:
    """One stage; ``memory`` in bytes, ``seconds`` None where no speed is known."""

    name: str
    trained: int
    tokens: int
    memory: int
    tokens_per_second: float | None
    seconds: float | None


@dataclass(frozen=True)
class Estimate:
    """``cache`` maps a length to the bytes of one sequence: (teacher's KV cache, student's state and what it keeps)."""

    teacher: str
    parameters: int
    weights_bytes: int
    new_parameters: int
    converted: int
    layers: int
    stages: list[StageEstimate]
    cache: dict[int, tuple[int, int]]
    speed: str

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


def estimate(
    recipe: Recipe, *, device: str, tokens_per_second: float | None = None, measure: bool = False
) -> Estimate:
    """What the recipe's run costs and saves. No weights are read.

    ``tokens_per_second`` is the training speed to reckon with, for both stages; ``measure`` finds it with one batch of
    each stage on a model of the same shapes with random weights. Raises :class:`RecipeError` where those would not fit.
    """
    model = teacher_without_weights(recipe.teacher, device)
    reports = forecast(model, recipe.method, recipe.layers, convert_sliding=recipe.convert_sliding)
    speeds: dict[str, float | None] = dict.fromkeys(("transfer", "finetune"), tokens_per_second)
    if measure:
        speeds = measured(recipe, model, device)
    shape = _Shape(model, reports, recipe)
    stages = []
    for config, trained, memory in (
        (recipe.transfer, shape.new, shape.transfer()),
        (recipe.finetune, shape.lora(recipe.finetune), shape.finetune()),
    ):
        name = "transfer" if isinstance(config, Transfer) else "finetune"
        tokens = config.tokens if trained else 0
        speed = speeds[name]
        stages.append(
            StageEstimate(
                name, trained, tokens, memory if tokens else 0, speed, tokens / speed if speed else None
            )
        )
    return Estimate(
        teacher=recipe.teacher.name,
        parameters=sum(p.numel() for p in model.parameters()),
        weights_bytes=shape.weights,
        new_parameters=shape.new,
        converted=sum(report.kv_tokens == 0 for report in reports),
        layers=len(reports),
        stages=stages,
        cache={length: _cache(model, reports, length) for length in LENGTHS},
        speed="measured with random weights" if measure else "declared" if tokens_per_second else "not known",
    )


def _cache(model: Any, reports: list[LayerReport], length: int) -> tuple[int, int]:
    windows = {index: layer.sliding_window for index, layer in probe(model).items()}
    kept = [min(length, windows[report.index] or length) * report.kv_bytes_per_token for report in reports]
    return sum(kept), sum(report.cache_bytes(length) for report in reports)


class _Shape:
    """Sizes that the formulas below are made of; ``item`` is the bytes of a number of the model."""

    def __init__(self, model: Any, reports: list[LayerReport], recipe: Recipe):
        self.model, self.reports, self.recipe = model, reports, recipe
        self.item = next(model.parameters()).element_size()
        self.weights = sum(p.numel() * p.element_size() for p in model.parameters())
        self.new = sum(report.parameters for report in reports)
        config = model.config.get_text_config()
        self.hidden, self.vocab = config.hidden_size, config.vocab_size
        self.inner = getattr(config, "intermediate_size", None) or 4 * self.hidden

    def _layer(self, tokens: int) -> int:
        """Activations that one layer's backward keeps: input and norms, q, k, v and output, the MLP's."""
        shape = self.reports[0].geometry
        heads = 2 * shape.heads * shape.key_dim + shape.kv_heads * (shape.key_dim + shape.value_dim)
        return tokens * (4 * self.hidden + heads + 3 * self.inner) * self.item

    def _mixer(self, tokens: int) -> int:
        """What a mixer's graph keeps in fp32: q, k, features of both, and what it makes of v."""
        shape = self.reports[0].geometry
        return tokens * 4 * (3 * shape.heads * shape.key_dim + 2 * shape.heads * shape.value_dim)

    def transfer(self) -> int:
        """One layer's mixer at a time has a graph, unless the backward is deferred; the trunk has none."""
        config = self.recipe.transfer
        tokens = config.batch_size * self.recipe.data.seq_len
        graphs = (
            1 if config.backward == "immediate" else sum(report.kv_tokens == 0 for report in self.reports)
        )
        return self.weights + ADAMW * self.new + self._layer(tokens) + graphs * self._mixer(tokens)

    def finetune(self) -> int:
        """Every layer's graph, and the logits of one chunk three times over: theirs, the teacher's, the slope."""
        config = self.recipe.finetune
        tokens = config.batch_size * self.recipe.data.seq_len
        layers = len(self.reports) * (self._layer(tokens) + self._mixer(tokens))
        mixers = (ADAMW if config.train_mixer else 4) * self.new
        logits = 3 * 4 * min(tokens, config.kl_chunk) * self.vocab
        return self.weights + mixers + ADAMW * self.lora(config) + layers + logits

    def lora(self, config: Finetune) -> int:
        """Parameters of the adapters, and of the mixers where those go on training."""
        wanted, count = config.lora.targets, 0
        attention = {layer.module for layer in probe(self.model).values()}
        for name, module in self.model.named_modules():
            shape = getattr(module, "weight", torch.empty(0)).shape
            mine = (
                any(name.startswith(f"{path}.") for path in attention)
                if wanted == "attention"
                else any(name == word or name.endswith(f".{word}") for word in wanted)
            )
            if mine and len(shape) == 2:
                count += config.lora.rank * sum(shape)
        return count + (self.new if config.train_mixer else 0)


def measured(recipe: Recipe, shapes: Any, device: str) -> dict[str, float | None]:
    """Tokens a second of each stage: the second of two batches, on random weights and random tokens."""
    size = sum(p.numel() * p.element_size() for p in shapes.parameters())
    if size > MEASURED_BYTES:
        raise RecipeError(
            f"--measure: {size / 2**30:.1f} GiB of weights are more than a short step should fill; "
            "give the speed with --tokens-per-second instead"
        )
    config = type(shapes.config).from_dict(shapes.config.to_dict())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        model: Any = AutoModelForCausalLM.from_config(config, dtype=next(shapes.parameters()).dtype).to(
            device
        )
        convert(model.eval(), recipe.method, recipe.layers, convert_sliding=recipe.convert_sliding)
        speeds: dict[str, float | None] = {"transfer": None, "finetune": None}
        for name, build in (("transfer", TransferStage), ("finetune", FinetuneStage)):
            settings: Any = getattr(recipe, name)
            tokens = torch.randint(
                config.get_text_config().vocab_size, (settings.batch_size, recipe.data.seq_len)
            )
            batch = {"input_ids": tokens.to(device), "labels": tokens.to(device)}
            stage: Any = build(model, settings)
            if not stage.named_parameters():
                continue  # nothing to train takes no time
            with stage.training():
                for _ in range(2):
                    started = time.perf_counter()
                    stage.backward(batch, 1.0)
                    if device == "cuda":
                        torch.cuda.synchronize()
                    spent = time.perf_counter() - started
            speeds[name] = tokens.numel() / spent
    return speeds
