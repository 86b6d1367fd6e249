"""Generation: greedy text is what full forwards would choose, and mistakes are named."""

import pytest
import torch
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from linearize.convert import convert
from linearize.generate import generate
from linearize.modeling.attention import attention_mode
from linearize.modeling.errors import EvaluationError
from linearize.modeling.registry import METHODS
from linearize.teacher import BUNDLED

PROMPT = "The old house stood at the end of the"


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(BUNDLED["books-5m"])


def llama(tokenizer):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, initializer_range=0.3, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def model(tokenizer):
    return llama(tokenizer)


def by_full_forwards(model, tokenizer, prompt, count):
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    start = ids.shape[1]
    with torch.no_grad():
        for _ in range(count):
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    return tokenizer.decode(ids[0, start:], skip_special_tokens=True)


def test_greedy_is_what_full_forwards_choose(model, tokenizer):
    assert generate(model, tokenizer, PROMPT, 12) == by_full_forwards(model, tokenizer, PROMPT, 12)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("mode", ["linear", "softmax"])
def test_greedy_of_a_converted_model_is_what_full_forwards_choose(model, tokenizer, name, mode):
    config = METHODS[name].config
    small = {"window": 4} if "window" in config.__dataclass_fields__ else {}
    student = convert(llama(tokenizer), config(**small))
    with attention_mode(mode):
        text = generate(student, tokenizer, PROMPT, 12)
        assert text == by_full_forwards(student, tokenizer, PROMPT, 12)
    if mode == "softmax":
        assert text == generate(model, tokenizer, PROMPT, 12)


def test_sampling_repeats_with_its_seed_and_leaves_the_global_generator(model, tokenizer):
    before = torch.get_rng_state()
    once, again, other = (
        generate(model, tokenizer, PROMPT, 12, do_sample=True, seed=seed, temperature=1.5)
        for seed in (1, 1, 2)
    )
    assert once == again != other
    assert torch.equal(before, torch.get_rng_state())


def test_the_training_flag_is_left_as_it_was(model, tokenizer):
    model.train()
    try:
        generate(model, tokenizer, PROMPT, 2)
        assert model.training
    finally:
        model.eval()


@pytest.mark.parametrize(
    ("prompt", "count", "text"),
    [("", 5, "no tokens"), (None, 5, "NoneType is not text"), ("a", 0, "max_new_tokens: 0 is impossible")],
)
def test_mistakes_are_named(model, tokenizer, prompt, count, text):
    with pytest.raises(EvaluationError, match=text):
        generate(model, tokenizer, prompt, count)


def test_a_table_of_positions_that_ends_is_named(tokenizer):
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=16,
        n_embd=16,
        n_layer=1,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
    )
    with pytest.raises(EvaluationError, match="table of 16 positions"):
        generate(GPT2LMHeadModel(config).eval(), tokenizer, PROMPT, 30, min_new_tokens=30)
