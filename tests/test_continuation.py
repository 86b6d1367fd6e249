"""What models write on freely: where they part from the teacher, what the teacher thinks of it, how it repeats."""

import json
import math

import pytest
import torch
from tiny import student, tiny

from linearize.evaluate import Results, answers, beside, continuation
from linearize.evaluate.continuation import divergence, measure, repeated
from linearize.measures import Continuation, Evaluate
from linearize.modeling.errors import EvaluationError
from linearize.modeling.lolcats import LolcatsConfig
from linearize.report import markdown
from linearize.report.continuation import sentences

CONFIG = Continuation(prompts=6, prompt_tokens=9, tokens=40)
VOCAB = 90  # of 97 columns


class Words:
    """A tokenizer as far as one is needed."""

    eos_token_id = 5

    def __len__(self):
        return VOCAB

    def decode(self, ids, skip_special_tokens):
        return " ".join(map(str, ids))


def held_out(length, count):
    return torch.randint(6, VOCAB, (6, length + 1), generator=torch.Generator().manual_seed(length))[:count]


@pytest.fixture(scope="module")
def models():
    """A teacher, another as it is, and one that is converted."""
    made = {"teacher": tiny(), "same": tiny(), "student": student(config=LolcatsConfig(window=4))}
    for model in made.values():
        model.config.eos_token_id = None
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("written")


@pytest.fixture(scope="module")
def seen():
    return []


@pytest.fixture(scope="module")
def found(models, folder, seen):
    return measure(models, Words(), CONFIG, held_out, batch_size=4, folder=folder, progress=seen.append)


def test_texts_part_at_the_first_token_that_differs():
    assert divergence([1, 2, 3], [1, 2, 4], 8) == 2
    assert divergence([1, 2], [1, 2, 3], 8) == divergence([1, 2, 3], [1, 2], 8) == 2  # one ends
    assert divergence([], [1], 8) == 0
    assert divergence([1, 2], [1, 2], 8) == 8  # both end: never
    assert repeated([1, 2, 3, 4, 1, 2, 3, 4, 1]) == (2, 6)
    assert repeated([7] * 10) == (6, 7)
    assert repeated([1, 2, 3]) == (0, 0)


@pytest.mark.parametrize("values", [[3, 9, 9, 1, 30], [3, 9, 4, 1, 30, 2]])
def test_the_interval_of_a_median_is_that_of_medians_drawn(values):
    picks = torch.randint(
        len(values), (continuation.bootstrap.__kwdefaults__["draws"], len(values)),
        generator=torch.Generator().manual_seed(3),
    )  # fmt: skip
    medians = torch.quantile(torch.tensor(values, dtype=torch.double)[picks], 0.5, dim=1)
    ends = torch.quantile(medians, torch.tensor([0.025, 0.975], dtype=torch.double))
    assert continuation._of_median(values, seed=3) == tuple(ends.tolist())


def written_without_cache(model, prompts):
    """Greedily, each text up to its end-of-sequence."""
    ids = prompts
    for _ in range(40):
        with torch.no_grad():
            best = model(ids, use_cache=False).logits[:, -1, :VOCAB].argmax(-1)
        ids = torch.cat([ids, best[:, None]], 1)
    rows = ids[:, prompts.shape[1] :].tolist()
    return [row[: row.index(5)] if 5 in row else row for row in rows]


def test_the_teacher_reads_what_each_model_wrote(models, found):
    prompts = held_out(48, 6)[:, :9]
    texts = {name: written_without_cache(model, prompts) for name, model in models.items()}
    assert min(map(len, texts["teacher"])) < 40
    for name, own in texts.items():
        nll, tokens, again, grams = 0.0, sum(map(len, own)), 0, 0
        for prompt, text in zip(prompts.tolist(), own, strict=True):
            with torch.no_grad():
                logits = models["teacher"](torch.tensor([prompt + text]), use_cache=False).logits
            log = logits[0, :, :VOCAB].double().log_softmax(-1)
            nll -= sum(log[8 + i, token].item() for i, token in enumerate(text))
            again, grams = again + repeated(text)[0], grams + repeated(text)[1]
        steps = [divergence(a, b, 40) for a, b in zip(own, texts["teacher"], strict=True)]
        row = found.row(name)
        assert row.ppl == pytest.approx(math.exp(nll / tokens), rel=1e-4)
        assert row.repeated == pytest.approx(again / grams)
        assert (row.tokens, row.samples) == (pytest.approx(tokens / 6), 6)
        low, high = row.intervals["ppl"]
        assert low <= row.ppl <= high
        if name != "teacher":
            assert row.divergence[1] == torch.tensor(steps, dtype=torch.double).quantile(0.5)
            assert row.same == sum(step == 40 for step in steps)


def test_a_model_like_the_teacher_writes_what_it_writes(found):
    row = found.row("same")
    assert (row.divergence, row.same) == ((40, 40, 40), 6)
    assert row.intervals["ppl_difference"] == row.intervals["repeated_difference"] == (0, 0)
    assert found.row("student").same < 6
    assert found.row("teacher").divergence is None
    assert found.text.tokens == 40 and found.text.repeated < 0.05
    assert found.text.ppl > found.row("teacher").ppl  # what it would not have written itself


def test_what_is_written_is_not_written_again(models, folder, found, seen, monkeypatch):
    done = [at.done for at in seen]
    assert done == sorted(done) and {at.total for at in seen} == {done[-1]}
    asked = []
    monkeypatch.setattr(answers, "generate", lambda model, *args, **kwargs: asked.append(model) or [[6]] * 6)
    again = lambda config=CONFIG: measure(models, Words(), config, held_out, batch_size=4, folder=folder)  # noqa: E731
    assert again() == found and asked == []
    lines = (folder / "continuation-same-40.jsonl").read_text().splitlines()
    assert [len(json.loads(line)["ids"]) <= 40 for line in lines] == [True] * 6
    (folder / "continuation-same-40.jsonl").write_text("\n".join(lines[:-1]))  # cut
    with torch.no_grad():
        models["student"].get_input_embeddings().weight[17, 3] += 1e-3
    again()
    with torch.no_grad():
        models["student"].get_input_embeddings().weight[17, 3] -= 1e-3
    assert asked == [models["same"], models["student"]]
    again(CONFIG.model_copy(update={"prompt_tokens": 8}))
    assert len(asked) == 5


def test_it_is_told_and_read_back(found):
    made = Results("a text", ["teacher", "same", "student"], 0, {}, [], {}, continuation=found)
    again = Results.from_dict(json.loads(json.dumps(made.to_dict(), allow_nan=False)))
    assert again.continuation == found
    told = markdown(again)
    assert "| same | " in told and "40 / 40 / 40 [40, 40], 6 never | 27 | 6 |" in told
    assert "| the text itself | " in told
    (words,) = sentences(found, "same")
    assert "after 6 prompts, it writes the teacher's greedy text to the end of 40 tokens in 6. The" in words
    (words,) = sentences(found, "student")
    assert "leaves the teacher's greedy text after 0 of 40 tokens (median [0, 0])" in words
    assert list(sentences(found, "absent")) == list(sentences(None, "same")) == []
    parts = {name: Results("a text", ["teacher", "student"], 0, {}, [], {"teacher": 1, "student": 2},
             continuation=found) for name in ("a", "b")}  # fmt: skip
    joined = beside.beside(parts).continuation
    assert [row.model for row in joined.rows] == ["teacher", "a", "b"]


def test_it_is_asked_for_and_has_to_fit():
    assert not Evaluate().continuation.wanted
    assert measure({}, Words(), Continuation(), held_out) is None
    continuation.check(CONFIG, held_out, 49)
    with pytest.raises(
        EvaluationError, match=r"continuation.tokens: 9 tokens.* context of 48; give at most 39"
    ):
        continuation.check(CONFIG, held_out, 48)
