"""What every registered method must hold, on a whole tiny model in fp64; a new method inherits all of it."""

import pytest
import torch
from tiny import ids, variants
from tiny import student as student_of
from tolerances import assert_near
from transformers import DynamicCache

from linearize.modeling.attention import attention_mode
from linearize.modeling.registry import METHODS
from linearize.train.transfer import error_and_power

METHOD_VARIANTS = variants()
pytestmark = pytest.mark.parametrize("config", METHOD_VARIANTS.values(), ids=METHOD_VARIANTS.keys())
T = 43


def student(family, config, *, num_hidden_layers=2, **changes):
    """A layer under another: what the first does wrong reaches the second."""
    return student_of(family, config, num_hidden_layers=num_hidden_layers, **changes)


@torch.no_grad()
def logits(model, x, **kwargs):
    return model(x, **kwargs).logits


def in_pieces(model, x, pieces, mask=None):
    cache, outputs, start = DynamicCache(config=model.config), [], 0
    for piece in pieces:
        stop = start + piece
        kwargs = {} if mask is None else {"attention_mask": mask[:, :stop]}
        if mask is not None:
            kwargs["position_ids"] = (mask.cumsum(1) - 1).clamp_min(0)[:, start:stop]
        outputs.append(logits(model, x[:, start:stop], past_key_values=cache, use_cache=True, **kwargs))
        start = stop
    assert start == x.shape[1]
    return torch.cat(outputs, 1), cache


@pytest.mark.parametrize(
    "pieces",
    [[T], [1] * T, [32, 1, T - 33], [3, 7, 1, 1, 9, 22], [T - 1, 1]],
    ids=["prefill", "steps", "mixed", "ragged", "last"],
)
def test_any_split_gives_the_same_output(config, pieces):
    model, x = student("qwen3", config), ids(2, T)
    assert_near(in_pieces(model, x, pieces)[0], logits(model, x), "logits")


def test_lengths_around_the_window(config):
    model, x = student("llama", config), ids(2, 17)
    stepped = in_pieces(model, x, [1] * 17)[0]
    for length in (1, 2, 7, 8, 9, 17):
        assert_near(stepped[:, :length], logits(model, x[:, :length]), "logits")


def test_a_long_chunk_after_a_short_beginning(config):
    """Longer than any piece that a mixer takes a chunk in, behind less than a window."""
    model, x = student("llama", config, num_hidden_layers=1), ids(2, 300)
    assert_near(in_pieces(model, x, [2, 298])[0], logits(model, x), "logits")


def test_a_later_token_changes_no_earlier_output(config):
    model, x = student("llama", config), ids(1, T)
    other = x.clone()
    other[:, 29] = (other[:, 29] + 1) % 90 + 3
    before, after = logits(model, x), logits(model, other)
    assert torch.equal(before[:, :29], after[:, :29])
    assert not torch.equal(before[:, 29:], after[:, 29:])


def test_a_prefix_does_not_know_what_follows(config):
    model, x = student("llama", config), ids(2, T)
    assert_near(logits(model, x[:, :21]), logits(model, x)[:, :21], "logits")


@pytest.mark.parametrize("side", ["left", "right", "inside"])
def test_padding_changes_nothing(config, side):
    model, x = student("gpt_neox", config), ids(2, T)
    pads = 6
    mask = torch.ones(2, T + pads, dtype=torch.long)
    gap = {"left": slice(0, pads), "right": slice(T, T + pads), "inside": slice(17, 17 + pads)}[side]
    mask[1, gap] = 0
    mask[0, T:] = 0  # the first row is padded on the right by as much
    padded = torch.full((2, T + pads), 5)
    for row in range(2):
        padded[row, mask[row].bool()] = x[row]
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    full = logits(model, padded, attention_mask=mask, position_ids=positions)
    stepped, _ = in_pieces(model, padded, [20, 1, 1, T + pads - 22], mask)
    expected = logits(model, x)
    for row in range(2):
        real = mask[row].bool()
        assert_near(full[row, real], expected[row], "logits")
        assert_near(stepped[row, real], expected[row], "logits")


def test_rows_do_not_know_each_other(config):
    model, x = student("llama", config), ids(4, T)
    order = torch.tensor([2, 0, 3, 1])
    assert_near(logits(model, x[order]), logits(model, x)[order], "logits")
    assert_near(logits(model, x[1:2]), logits(model, x)[1:2], "logits")


@pytest.mark.parametrize("how", ["position_ids", "cu_seq_lens"])
def test_packed_documents_equal_separate_ones(config, how):
    model = student("llama", config)
    documents = [ids(1, n, seed=n) for n in (5, 23, 15)]
    packed = torch.cat(documents, 1)
    positions = torch.cat([torch.arange(d.shape[1]) for d in documents])[None]
    kwargs = {"position_ids": positions}
    if how == "cu_seq_lens":
        ends = torch.tensor([0, 5, 28, 43], dtype=torch.int32)
        kwargs |= {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": 23, "max_length_k": 23}
    together = logits(model, packed, use_cache=False, **kwargs)
    assert_near(together, torch.cat([logits(model, d) for d in documents], 1), "logits")


def test_packed_batches_of_short_documents(config):
    """Rows with borders in the same places, one shared row of positions, documents of a single token among them."""
    model, lengths = student("llama", config), (1, 9, 1, 1, 20, 1)
    documents = [ids(3, n, seed=n + i) for i, n in enumerate(lengths)]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    together = logits(model, torch.cat(documents, 1), position_ids=positions, use_cache=False)
    assert_near(together, torch.cat([logits(model, d) for d in documents], 1), "logits")


def test_padded_chunks_crops_and_reorders_in_any_order(config):
    """A long life of one cache: ragged and empty rows in every chunk, rejections, recording on and off, beams."""
    model, generator = student("llama", config, num_hidden_layers=1), torch.Generator().manual_seed(0)
    cache, x = DynamicCache(config=model.config), torch.zeros(3, 0, dtype=torch.long)
    mask = x.clone()
    for step, length in enumerate((3, 1, 17, 1, 40, 5, 1, 9, 1, 1, 30, 2)):
        new = torch.randint(3, 97, (3, length), generator=generator)
        valid = torch.rand(3, length, generator=generator) < 0.7
        valid[step % 3] = step % 2 == 1  # a row without any token, or without padding
        x, mask = torch.cat([x, new], 1), torch.cat([mask, valid.long()], 1)
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        output = logits(
            model, new, attention_mask=mask, position_ids=positions[:, -length:], past_key_values=cache
        )
        expected = logits(model, x, attention_mask=mask, position_ids=positions, use_cache=False)
        assert_near(output[valid], expected[:, -length:][valid], "logits")
        if step == 1:
            cache.activate_past_recording()
        if step in (4, 7):
            cache.crop(-length)
            x, mask = x[:, :-length], mask[:, :-length]
        if step == 5:
            beams = torch.tensor([2, 0, 2])
            cache.reorder_cache(beams)
            x, mask = x[beams], mask[beams]
        if step == 8:  # as generate does when it hands a cache back
            for layer in cache.layers:
                layer.record_past = False


def test_the_state_grows_by_what_its_mixer_declares(config):
    """Nothing, but for the few methods whose pages say otherwise."""
    model, x = student("llama", config), ids(2, 300)
    growth = [2 * mixer.growth(8) for mixer in model.mixers().values()]  # two rows in fp64
    lengths = (1, 30, 60, 120, 300)
    sizes = []
    for length in lengths:
        cache = in_pieces(model, x[:, :length], [length])[1]
        sizes.append([layer.state_bytes for layer in cache.layers])
    for start, *later, rate in zip(*sizes, growth, strict=True):
        assert start > 0
        for length, size in zip(lengths[1:], later, strict=True):
            assert size == start if rate == 0 else size <= start + rate * length


def test_sums_are_kept_in_fp32(config):
    model = student("llama", config, dtype=torch.bfloat16)
    cache = in_pieces(model, ids(2, 30), [30])[1]
    for tensor, name in zip(cache.layers[0].state, cache.layers[0].state._fields, strict=True):
        raw = name.rpartition("_")[2] in ("q", "k", "v")  # tokens as the model made them: k, sink_v, tail_q
        if tensor.is_floating_point():
            assert tensor.dtype == (torch.bfloat16 if raw else torch.float32), name


def test_tokens_taken_back_leave_no_trace(config):
    model, x = student("llama", config), ids(2, T)
    cache = DynamicCache(config=model.config)
    logits(model, x[:, :3], past_key_values=cache)  # without recording
    for layer in cache.layers:
        layer.activate_past_recording()
    logits(model, x[:, 3:20], past_key_values=cache)
    for wrong in (1, 9, 15):
        logits(model, ids(2, wrong, seed=wrong), past_key_values=cache)
        cache.crop(torch.tensor(-wrong))
    assert cache.get_seq_length() == 20 and isinstance(cache.get_seq_length(), int)
    rest = logits(model, x[:, 20:], past_key_values=cache)
    assert_near(rest, logits(model, x)[:, 20:], "logits")


def test_only_the_mixers_parameters_get_gradient_in_transfer(config):
    model, x = student("llama", config), ids(2, T)
    with torch.no_grad(), attention_mode("softmax"):
        expected = model(x).logits
    losses = []

    def record(layer, student_y, teacher_y, valid):
        losses.append(error_and_power(student_y, teacher_y, valid)[0])

    with attention_mode("transfer", record=record):
        output = model(x).logits
    assert torch.equal(output, expected)
    assert len(losses) == 2
    parameters = [p for mixer in model.mixers().values() for p in mixer.parameters() if p.requires_grad]
    if not parameters:
        assert not any(loss.requires_grad for loss in losses)
        return
    sum(losses).backward()
    inside = {id(p) for p in parameters}
    for name, parameter in model.named_parameters():
        if id(parameter) in inside:
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
        else:
            assert parameter.grad is None, name


def test_checkpointed_training_recomputes_the_same_branch(config):
    model, x = student("llama", config), ids(2, T)

    def gradients():
        model.zero_grad()
        with attention_mode("linear"):
            loss = model(x, use_cache=False).logits.logsumexp(-1).mean()
        with attention_mode("softmax"):  # what is active at the backward pass must not matter
            loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    plain = gradients()
    model.train()
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    again = gradients()
    assert plain.keys() == again.keys() and len(plain) > 5
    for name, gradient in plain.items():
        assert_near(again[name], gradient, "logits")


def test_a_configuration_survives_its_own_description(config):
    model = student("llama", config)
    for layer in model.config.linearize["layers"].values():
        fields = dict(layer["method"])
        assert METHODS[fields.pop("name")].config(**fields) == config


def test_an_empty_row_is_harmless(config):
    model, x = student("llama", config), ids(2, 12)
    mask = torch.ones_like(x)
    mask[1] = 0
    output = logits(model, x, attention_mask=mask)
    assert output.isfinite().all()
    assert_near(output[0], logits(model, x[:1])[0], "logits")
