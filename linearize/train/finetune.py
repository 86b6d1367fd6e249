"""Stage 2: low-rank adapters make the student a language model again, and are then merged into its weights.

The loss is a weighted sum of next-token cross-entropy and KL(teacher || student), the mean over tokens
that carry a label. The teacher is the same weights: softmax mode, adapters off. There is no second
model.

Full fp32 logits of student and teacher never exist (at 8 x 1,024 tokens and 128K entries one of them is
4.3 GB). The trunk gives hidden states; its head is applied to ``kl_chunk`` tokens at a time, each chunk
goes backward at once as far as its hidden states, and their gradient then goes through the trunk.
Against checkpointed chunks this saves computing the head a second time; the gradients are the same.

Departures from arXiv 2410.10254, where the loss is the next token's alone: KL; ``train_mixer``, which
keeps training the mixers; a linear decay instead of reduce-on-plateau, so that the learning rate is a
function of the step.
"""

import difflib
import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from linearize.adapter import merge_adapters
from linearize.convert import projections
from linearize.modeling.attention import attention_mode
from linearize.modeling.errors import TrainingError
from linearize.progress import Watch
from linearize.recipe import Finetune
from linearize.train.loop import Batch, Corpus, Fitted, fit
from linearize.train.processes import make_accelerator
from linearize.train.resume import own_randomness
from linearize.train.transfer import backward, exact, inputs_of, only_training, place

logger = logging.getLogger(__name__)


def finetune(
    model: Any,
    corpus: Corpus,
    config: Finetune,
    *,
    folder: Path,
    vocab_size: int | None = None,
    seed: int = 0,
    device: str | torch.device = "cpu",
    precision: str = "fp32",
    progress: Watch | None = None,
    resume: bool = True,
) -> tuple[Any, Fitted]:
    """Train adapters on a converted model and merge them in fp32; the same model, plain again, comes back.

    ``vocab_size`` is the tokenizer's: vocabulary rows beyond it are padding and take no part in the loss.
    """
    accelerator = make_accelerator(device, precision)
    place(model, accelerator.device)
    with own_randomness(seed, accelerator.device):
        stage = FinetuneStage(model, config, vocab_size=vocab_size)
    try:
        with stage.training():
            fitted = fit(
                stage,
                config,
                corpus,
                folder=folder,
                seed=seed,
                device=device,
                precision=precision,
                progress=progress,
                resume=resume,
            )
        stage.merge()
    finally:
        stage.remove()
    return model, fitted


class FinetuneStage:
    """Adapters on a model's projections, and the loss of that student; :meth:`remove` takes them off."""

    name = "finetune"

    def __init__(self, model: Any, config: Finetune, *, vocab_size: int | None = None) -> None:
        self.model, self.config = model, config
        rows = model.get_output_embeddings().weight.shape[0]
        self.vocab = min(vocab_size or rows, rows)
        self._asked = [(p, p.requires_grad) for p in model.parameters()]
        self.targets = lora_targets(model, config)
        self._mixers = [
            (n, p) for n, p in model.named_parameters() if id(p) in _ids(model.mixers()) and p.requires_grad
        ]
        self._start = _digest(model.mixers())
        self.peft = _attach(model, config, self.targets)
        own = [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]
        self._named = own + (self._mixers if config.train_mixer else [])
        for _, parameter in self._named:
            parameter.data = exact(parameter.data)
        self.features, self.head = _split(model, self.vocab)

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        return self._named

    def groups(self) -> list[list[nn.Parameter]]:
        return [[p for _, p in self._named]]

    def settings(self) -> Mapping[str, Any]:
        layers = self.model.config.linearize["layers"]
        return {
            "layers": layers,
            "mixers": self._start,
            "vocab_size": self.vocab,
            "lora_targets": self.targets,
        }

    def weight(self, batch: Batch) -> int:
        return int((batch["labels"] != -100).sum())

    @contextmanager
    def training(self) -> Iterator[None]:
        """Only what trains asks for gradients, and only the adapters' own dropout falls."""
        with only_training(self.model, [p for _, p in self._named]):
            for module in self.model.modules():
                if isinstance(module, LoraLayer):
                    module.lora_dropout.train()
            yield

    def backward(self, batch: Batch, scale: float) -> dict[str, Tensor]:
        """Gradients of the batch; readings are ``loss`` and, where they have a weight, ``next_token`` and ``kl``."""
        config, labels = self.config, batch["labels"].flatten()
        taught = (labels != -100).nonzero()[:, 0]
        count = max(1, len(taught))  # a batch without a label adds nothing
        teacher = None
        if config.kl:
            with torch.no_grad(), self.peft.disable_adapter(), attention_mode("softmax"):
                teacher = self.features(batch).flatten(0, 1)
        student = self.features(batch).flatten(0, 1)
        gradient = torch.zeros_like(student)
        sums = torch.zeros(2, dtype=torch.promote_types(student.dtype, torch.float32), device=student.device)
        for rows in taught.split(config.kl_chunk):
            leaf = student.detach()[rows].requires_grad_(True)
            logits = self.head(leaf)
            with torch.no_grad():
                target = None if teacher is None else self.head(teacher[rows])
                terms, slope = self._losses(logits, target, labels[rows])
                sums += terms
            backward(logits, slope.mul_(scale / count).to(logits.dtype))
            assert leaf.grad is not None
            gradient[rows] = leaf.grad
        backward(student, gradient)
        means = sums / count
        readings = {
            name: m for name, m in zip(("next_token", "kl"), means, strict=True) if getattr(config, name)
        }
        return {"loss": config.next_token * means[0] + config.kl * means[1], **readings}

    def _losses(self, logits: Tensor, teacher: Tensor | None, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Sums over tokens of cross-entropy and KL [2], and the slope of their weighted sum in the logits [n, vocab].

        By hand, because autograd would keep twice the memory and go over it twice as often: with p the student and t
        the teacher, the slopes are p - onehot(label) and p - t.
        """
        config = self.config
        log_p = exact(logits).log_softmax(-1)
        next_token = -log_p.gather(1, labels[:, None]).sum()
        if teacher is None:
            kl, slope = torch.zeros_like(next_token), log_p.exp_().mul_(config.next_token)
        else:
            log_t = exact(teacher).log_softmax(-1)
            t = log_t.exp()
            kl = log_t.sub_(log_p).mul_(t).sum()
            slope = log_p.exp_().mul_(config.next_token + config.kl).sub_(t, alpha=config.kl)
        slope[torch.arange(len(labels), device=labels.device), labels] -= config.next_token
        return torch.stack([next_token, kl]), slope

    def merge(self) -> None:
        """Add the adapters to the weights, in fp32, and round once to the weights' own type."""
        merge_adapters(self.model)

    def remove(self) -> None:
        """Take the adapters off: the model is plain again, and asks for the gradients it asked for."""
        self.peft.unload()
        for parameter, asked in self._asked:
            parameter.requires_grad_(asked)


def lora_targets(model: Any, config: Finetune) -> list[str]:
    """Full paths of the modules to adapt: the projections that the attention probe found, or the user's own names,
    a mixer's linear modules among them."""
    wanted = config.lora.targets
    if wanted == "attention":
        targets = [path for paths in projections(model).values() for path in paths]
    else:
        head = model.get_output_embeddings()  # the KL's teacher has it too, and it may be the embeddings
        linear = [n for n, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D)) and m is not head]
        targets = []
        for name in wanted:
            found = [path for path in linear if path == name or path.endswith("." + name)]
            if not found:
                near = difflib.get_close_matches(name, {path.rpartition(".")[2] for path in linear}, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"there is {linear[0]!r}, for one"
                raise TrainingError(f"finetune.lora.targets: {name!r} is no projection of this model; {hint}")
            targets += [path for path in found if path not in targets]
    if not targets:
        raise TrainingError("finetune.lora.targets: this model has no projections; name some, e.g. [q_proj]")
    logger.info("finetune: LoRA of rank %d on %s", config.lora.rank, ", ".join(targets))
    return targets


def _attach(model: Any, config: Finetune, targets: list[str]) -> PeftModel:
    lora = LoraConfig(
        r=config.lora.rank,
        lora_alpha=config.lora.alpha,  # type: ignore[arg-type]  (a float is as good)
        lora_dropout=config.lora.dropout,
        target_modules=targets,
        # gpt2's projections store their weights transposed.
        fan_in_fan_out=all(isinstance(model.get_submodule(t), Conv1D) for t in targets),
    )
    return get_peft_model(model, lora)


def _split(model: Any, vocab: int) -> tuple[Callable[[Batch], Tensor], Callable[[Tensor], Tensor]]:
    """``features(batch) [B, T, M]`` and ``head(features) -> logits [..., vocab]``, which together are the model.

    The head is the vocabulary projection with the soft-cap of the configuration, if any. A family that does more
    to its logits is found out by comparing, and then its features are the whole logits.
    """
    projection = model.get_output_embeddings()
    cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)

    def trunk(batch: Batch) -> Tensor:
        return model.base_model(**inputs_of(batch), use_cache=False).last_hidden_state

    def head(hidden: Tensor) -> Tensor:
        logits = projection(hidden)
        return (torch.tanh(logits / cap) * cap if cap else logits)[..., :vocab]

    def whole(batch: Batch) -> Tensor:
        return model(**inputs_of(batch), use_cache=False).logits[..., :vocab]

    with only_training(model, []), torch.no_grad(), attention_mode("softmax"):
        tokens = torch.arange(8, device=projection.weight.device)[None] % vocab
        probe = {"input_ids": tokens}
        if torch.allclose(head(trunk(probe)), whole(probe), rtol=1e-3, atol=1e-4):
            return trunk, head
    logger.warning(
        "finetune: %s changes its logits in a way of its own; finetune.kl_chunk cannot save memory here",
        model.config.model_type,
    )
    return whole, lambda logits: logits


def _ids(mixers: Mapping[int, nn.Module]) -> set[int]:
    return {id(p) for mixer in mixers.values() for p in mixer.parameters()}


def _digest(mixers: Mapping[int, nn.Module]) -> str:
    """What the mixers hold at the start: adapters made for others would be resumed onto the wrong student."""
    digest = hashlib.sha256()
    for mixer in mixers.values():
        for parameter in mixer.parameters():
            digest.update(parameter.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
