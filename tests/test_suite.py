"""The suite measured: the same questions for all, generation and likelihood, gates, files that are gone on from."""

import json
from dataclasses import dataclass
from importlib import import_module

import pytest
import torch
from test_cli import call
from tiny import student, tiny
from transformers import AutoTokenizer

from linearize.convert import convert
from linearize.evaluate import Results, answers, cells, evaluate, suite
from linearize.evaluate.cells import Answer
from linearize.evaluate.suite import measure
from linearize.measures import Evaluate, Suite
from linearize.modeling.errors import EvaluationError, LinearizeError
from linearize.modeling.lolcats import LolcatsConfig
from linearize.modeling.window import WindowConfig
from linearize.recipe import Recipe
from linearize.report import markdown, tables
from linearize.tasks.budget import Haystack, Question
from linearize.tasks.suite import SUITE
from linearize.teacher import BUNDLED, load_teacher

BOOK = Haystack("a book", "The old man went down to the river with his dog and his long black boat. " * 60)
PROMPTS = [[5, 9, 3, 7], [8], [4, 4, 6, 11, 30, 2, 19], [60, 61] * 20]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(BUNDLED["books-5m"])


@pytest.fixture(scope="module")
def models():
    """The embedded teacher, which finds pass keys, and what a window of eight tokens leaves of it."""
    made = []
    for _ in range(2):
        model, _ = load_teacher(Recipe.resolve("books-5m").teacher)
        made.append(model)
    return {"teacher": made[0], "window": convert(made[1], WindowConfig(window=8))}


CONFIG = Suite(
    tasks=["passkey", "niah_single_1", "copying_fresh_16", "qa1"], lengths=[300], samples=2, depths=[0.2, 0.8],
    fill="ruler",
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("suite")


@pytest.fixture(scope="module")
def seen():
    return []


@pytest.fixture(scope="module")
def results(models, tokenizer, folder, seen):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("linearize.tasks.ruler.importlib.util.find_spec", lambda name: None)
        return measure(
            models, tokenizer, CONFIG, BOOK, limit=4096, batch_size=3, folder=folder, progress=seen.append
        )


# Answers


@pytest.mark.parametrize("config", [LolcatsConfig(window=4), None], ids=["student", "teacher"])
def test_batches_answer_as_single_prompts_do(config):
    model = tiny(dtype=torch.float64) if config is None else student(config=config)
    model.generation_config.repetition_penalty = 9.0  # the model's own settings do not count
    how = dict(end=[], vocab_size=97)
    alone = [answers.generate(model, [prompt], 9, batch_size=1, **how)[0] for prompt in PROMPTS]
    assert answers.generate(model, PROMPTS, 9, batch_size=3, **how) == alone
    assert model.generation_config.repetition_penalty == 9.0
    for prompt, written in zip(PROMPTS, alone, strict=True):
        assert len(written) == 9
        ids = torch.tensor([prompt + written])
        with torch.no_grad():
            best = model(ids, use_cache=False).logits.argmax(-1)[0]
        assert best[len(prompt) - 1 : -1].tolist() == written
    stop = alone[0][3]
    cut = answers.generate(model, PROMPTS[:1], 9, batch_size=1, end=[96, stop], vocab_size=97)[0]
    assert cut == alone[0][: alone[0].index(stop)]
    few = answers.generate(model, PROMPTS, 9, batch_size=4, end=[], vocab_size=40)
    assert max(token for written in few for token in written) < 40
    assert few != alone


@pytest.mark.parametrize("batch_size", [1, 4])
def test_the_likeliest_choice_is_that_of_the_whole_distribution(batch_size):
    model = student()
    choices = [[(7,), (3, 4, 5), (9, 1)], [(3, 3), (4,)], [(8,), (9,), (10,)]]
    expected = []
    for prompt, many in zip(PROMPTS, choices, strict=False):
        sums = []
        for choice in many:
            with torch.no_grad():
                logits = model(torch.tensor([[*prompt, *choice]]), use_cache=False).logits[0, :, :90]
            log = logits.log_softmax(-1)
            sums.append(sum(log[len(prompt) - 1 + i, token].item() for i, token in enumerate(choice)))
        expected.append(max(range(len(many)), key=sums.__getitem__))
    assert answers.rank(model, PROMPTS[:3], choices, batch_size=batch_size, vocab_size=90) == expected


SERIES = (([], [1, 2, 3]), ([9], [1, 2, 4]), ([9, 9], [5]))


@pytest.mark.parametrize(
    ("best", "right"),
    [
        ([1, 2, 3, 0, 1, 2, 4, 0, 0, 5], [1, 1, 1]),  # what is said in the place of 9 does not count
        ([5, 2, 4, 0, 5, 2, 4, 0, 0, 5], [1, 1, 1]),  # in any order
        ([1, 2, 3, 0, 1, 2, 3, 0, 0, 5], [1, 0, 1]),  # but not again, and an error spoils nothing behind it
        ([1, 2, 3, 0, 1, 2, 4, 0, 0, 1], [1, 1, 0]),
        ([1, 5, 3, 0, 1, 2, 4, 0, 0, 5], [0, 1, 1]),  # nor half of one and half of another
        ([1, 2, 3, 0, 1, 2], [1, 0, 0]),  # no room for more
    ],
)
def test_of_several_answers_any_that_is_due_is_right(best, right):
    assert answers.found_of(SERIES, best) == [bool(x) for x in right]


class Chain(torch.nn.Module):
    """Says after each token what it was told, whatever stands before."""

    def __init__(self, after, size):
        super().__init__()
        self.table = torch.nn.Embedding.from_pretrained(torch.eye(size)[after])

    def forward(self, input_ids, use_cache):
        return type("Out", (), {"logits": self.table(input_ids)})


def test_likelihood_of_several_answers_is_measured_beside_what_is_written(tokenizer, monkeypatch):
    numbers = [tokenizer.encode(f" {text}", add_special_tokens=False) for text in ("alpha", "river", "stone")]
    first = [ids[0] for ids in numbers]
    assert len(set(first)) == 3
    numbers = [[token] for token in first]
    words = tuple(tokenizer.decode(ids).strip() for ids in numbers)
    asked = [Question([7], words, series=(([], numbers[0]), ([8], numbers[1]), ([8], numbers[2])))] * 2
    after = torch.zeros(len(tokenizer), dtype=torch.long)
    after[7], after[8] = first[1], first[2]  # a due one, a due one, and the last
    monkeypatch.setattr(answers, "generate", lambda *args, **kwargs: [numbers[0] + numbers[2], [3]])
    monkeypatch.setattr(answers, "ends", lambda *args: [])
    task = SUITE["vt"]
    rows = answers.answer(Chain(after, len(tokenizer)), tokenizer, task, asked, batch_size=2)
    assert [(row.likelihood, row.parts, row.contains) for row in rows] == [(True, 1, 2 / 3), (True, 1, 0)]
    after[8] = first[1]  # said twice, and the last never
    rows = answers.answer(Chain(after, len(tokenizer)), tokenizer, task, asked, batch_size=2)
    assert [(row.likelihood, row.parts) for row in rows] == [(False, 2 / 3)] * 2
    (line,) = suite._cells(task, 1024, [(None, question) for question in asked], {"teacher": rows})
    assert (line.likelihood, line.gap, line.parts) == (0, 0, pytest.approx(2 / 3))
    assert line.parts_gap == pytest.approx(100 * (2 / 3 - 1 / 3))
    told = suite.notes(Suite(tasks=["vt"]), BOOK, [task], 2)
    made = Results("a", ["teacher"], 0, {}, [], {}, suite=suite.SuiteResults([line], told, 42, {}))
    again = Results.from_dict(json.loads(json.dumps(made.to_dict())))
    assert "| 0 % (+0), each 67 % (+33) |" in markdown(again)
    assert "Likelihood of several answers (VT)" in markdown(again)


# The whole


def test_a_teacher_that_finds_is_told_from_a_student_that_does_not(results):
    teacher, window = (results.cell(name, "passkey", 300) for name in ("teacher", "window"))
    assert (teacher.correct, teacher.score, teacher.strict, teacher.likelihood) == (2, 1, 1, 1)
    assert (window.correct, window.likelihood) == (0, 0)
    assert (window.difference, window.gap) == (-1, 0)
    assert window.digest == teacher.digest
    assert teacher.gated  # two prompts are no evidence
    assert not teacher.reportable
    assert [results.cell("teacher", "passkey", 300, depth).samples for depth in (None,)] == [2]


def test_every_cell_is_there(results):
    lines = [(cell.task, cell.length, cell.model) for cell in results.lines()]
    expected = [
        ("passkey", 300),
        ("copying_fresh_16", 0),
        ("copying_fresh_16", 300),
        ("qa1", 0),
        ("qa1", 300),
    ]
    assert lines == [(*at, name) for at in expected for name in ("teacher", "window")]
    assert {cell.task for cell in results.baselines} == {"qa1"}
    assert {cell.model for cell in results.baselines} == {"last place", "most frequent place"}
    assert [(entry.task, entry.length) for entry in results.not_run] == [("niah_single_1", 300)]
    assert "lm-eval, which is not installed" in results.not_run[0].reason
    assert results.haystack == {"name": "a book", "sha256": BOOK.sha256}


def test_progress_counts_up_to_its_total(results, seen):
    done = [at.done for at in seen]
    assert done == sorted(done)
    assert {at.total for at in seen} == {done[-1]}
    assert {at.phase for at in seen} == {"suite"}


def test_every_question_has_a_line_in_a_file(results, folder):
    assert sorted(path.name for path in folder.iterdir()) == [
        "copying-16-tokens-random-words-0.jsonl",
        "copying-16-tokens-random-words-300.jsonl",
        "passkey-300.jsonl",
        "qa1-simulated-alternative-book-text-0.jsonl",
        "qa1-simulated-alternative-book-text-300.jsonl",
    ]
    lines = [json.loads(line) for line in (folder / "passkey-300.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == ["passkey-300-0", "passkey-300-1"]
    for line in lines:
        assert line["references"][0] in line["outputs"]["teacher"]
        assert line["scores"]["teacher"]["score"] == 1
        assert line["scores"]["window"]["likelihood"] is False
        assert 0 < line["depth"] < 1
        assert line["tokens"] <= 300


def test_what_was_answered_is_not_asked_again(results, models, tokenizer, folder, monkeypatch):
    only = CONFIG.model_copy(update={"tasks": ["passkey", "qa1"]})

    def asked_again(*args, **kwargs):
        raise AssertionError("asked again")

    monkeypatch.setattr(answers, "generate", asked_again)
    again = measure(models, tokenizer, only, BOOK, limit=4096, folder=folder)
    assert again.cells == [cell for cell in results.cells if cell.task in ("passkey", "qa1")]
    with pytest.raises(AssertionError, match="asked again"):
        measure(models, tokenizer, only.model_copy(update={"seed": 1}), BOOK, folder=folder)
    weight = models["window"].get_input_embeddings().weight
    with torch.no_grad():
        weight[17, 3] += 1e-3
    with pytest.raises(AssertionError, match="asked again"):
        measure(models, tokenizer, only, BOOK, folder=folder)
    with torch.no_grad():
        weight[17, 3] -= 1e-3
    whole = (folder / "passkey-300.jsonl").read_text()
    (folder / "passkey-300.jsonl").write_text(whole[:-30])
    with pytest.raises(AssertionError, match="asked again"):
        measure(models, tokenizer, only, BOOK, folder=folder)
    (folder / "passkey-300.jsonl").write_text(whole)


def test_results_survive_json_and_are_told(results):
    made = Results("a text", ["teacher", "window"], 0, {}, [], {}, suite=results)
    again = Results.from_dict(json.loads(json.dumps(made.to_dict(), allow_nan=False)))
    assert again.suite == results
    text = markdown(again)
    assert text == markdown(made)
    assert (
        "| passkey | 300 | 100 % [34, 100] | 0 % [0, 66] | -100 [-100, -100] | 100 % (+0) | 0 % (+0) | 2 |"
        in text
    )
    assert "teacher below gate; not reportable" in text
    assert "| S-NIAH-1 | 300 | not run: niah: RULER's template" in text
    assert "a book (sha256" in text
    for table in tables(again):
        assert {len(row) for row in table.rows} == {len(table.header)}


# Gates


def cell_of(task, hits, samples=50, depth=None):
    asked = [(depth, Question([1, 2, 3], ("x",)))] * samples
    row = lambda right: Answer("", float(right), float(right), right, right, None)  # noqa: E731
    rows = [row(index < hits) for index in range(samples)]
    return suite._cells(SUITE[task], 1024, asked, {"teacher": rows})


@pytest.mark.parametrize(
    ("task", "hits", "samples", "gated"),
    [
        ("passkey", 46, 50, False),
        ("passkey", 45, 50, True),
        ("passkey", 88, 100, False),
        ("passkey", 87, 100, True),
        ("qa1", 15, 50, False),
        ("qa1", 12, 50, True),
        ("vt", 45, 50, False),
        ("vt", 42, 50, True),
    ],
)
def test_a_teacher_that_fails_gates_the_cell(task, hits, samples, gated):
    (cell,) = cell_of(task, hits, samples)
    assert cell.gated is gated


def test_a_depth_with_few_prompts_takes_the_verdict_of_the_line():
    line, depth = cell_of("passkey", 48, depth=0.5)
    assert (line.gated, depth.gated, depth.depth) == (False, False, 0.5)
    many = suite._cells(
        SUITE["passkey"],
        1024,
        [(d, Question([1], ("x",))) for d in (0.0, 1.0) for _ in range(60)],
        {"teacher": [Answer("", 1.0 if i < 115 else 0.0, 0, True, None, None) for i in range(90)]
         + [Answer("", float(i > 20), 0, True, None, None) for i in range(30)]},
    )  # fmt: skip
    assert [(cell.depth, cell.gated) for cell in many] == [(None, True), (0.0, False), (1.0, True)]


# Lengths, haystacks, recipes


def test_lengths_go_up_to_the_context():
    assert suite.lengths_of(Suite(), 4096) == [1024, 2048, 4096]
    assert suite.lengths_of(Suite(), None)[-1] == 32768
    assert suite.lengths_of(Suite(), 512) == [512]
    assert suite.lengths_of(Suite(lengths=[700]), 4096) == [700]
    with pytest.raises(EvaluationError, match="lengths: 8192 is longer than the teacher's context of 4096"):
        suite.lengths_of(Suite(lengths=[8192]), 4096)


def test_a_haystack_is_named(tokenizer, tmp_path):
    path = tmp_path / "my.txt"
    path.write_text("One. Two.")
    empty = torch.tensor([], dtype=torch.long)
    assert suite.haystack_of(Suite(haystack=str(path)), tokenizer, empty, "x") == Haystack(
        "my.txt", "One. Two."
    )
    ids = torch.tensor(tokenizer.encode("One. Two."))
    assert suite.haystack_of(Suite(), tokenizer, ids, "samples") == Haystack("samples", "One. Two.")
    assert "repeated" in suite.haystack_of(Suite(haystack="noise"), tokenizer, empty, "x").name
    with pytest.raises(EvaluationError, match=r"no\.txt: No such file or directory; name a text file"):
        suite.haystack_of(Suite(haystack=str(tmp_path / "no.txt")), tokenizer, empty, "x")


def test_nothing_to_run_is_an_error(models, tokenizer):
    config = Suite(tasks=["kv_uuid"], lengths=[64], samples=1)
    with pytest.raises(
        EvaluationError, match=r"nothing could be run; kv_uuid: 64 tokens .* give \d+ or more"
    ):
        measure(models, tokenizer, config, BOOK)


def test_an_unknown_task_is_told_its_choices():
    with pytest.raises(LinearizeError, match=r"evaluate.suite.tasks.*: 'niah' is unknown; .*'niah_single_1'"):
        Recipe.resolve("quickstart", overrides=["evaluate.suite.tasks=[niah]"])
    assert not Recipe.resolve("quickstart").evaluate.suite.wanted


@dataclass
class Text:
    held_out_tokens: torch.Tensor
    label: str = "held-out text"

    def held_out(self, length, sequences):
        return self.held_out_tokens[: sequences * (length + 1)].view(sequences, length + 1)


def test_evaluation_runs_the_suite_that_its_recipe_asks_for(models, tokenizer, tmp_path):
    text = Text(torch.tensor(tokenizer.encode(BOOK.text)))
    wanted = Suite(tasks=["copying_natural_16"], lengths=[64], samples=1)
    config = Evaluate(seq_lens=[16], sequences=1, recall_tasks=[], suite=wanted)
    found = evaluate({}, models["teacher"], tokenizer, text, config, suite_folder=tmp_path)
    assert found.suite.haystack["name"] == "held-out text"
    assert [cell.length for cell in found.suite.cells] == [0, 64]
    assert len(list(tmp_path.iterdir())) == 2
    without = config.model_copy(update={"suite": Suite()})
    assert evaluate({}, models["teacher"], tokenizer, text, without).suite is None


def test_the_command_line_passes_the_preset_on(monkeypatch, tmp_path):
    heard = {}

    def evaluate_checkpoint(folder, words, **kwargs):
        heard.update(words=words, **kwargs)
        return Results("x", ["teacher"], 0, {}, [], {})

    monkeypatch.setattr(import_module("linearize.run"), "evaluate_checkpoint", evaluate_checkpoint)
    monkeypatch.setattr("linearize.cli.measure.must_be_student", lambda folder: None)
    words = [
        "eval",
        "x",
        "evaluate.suite.fill=ruler",
        "--suite",
        "smoke",
        "--suite-folder",
        str(tmp_path),
        "--json",
    ]
    made = call(*words)
    assert made.exit_code == 0, made.output
    assert heard["words"] == ["evaluate.suite.preset=smoke", "evaluate.suite.fill=ruler"]
    assert heard["suite_folder"] == tmp_path
    assert call("eval", "x", "--suite", "huge").exit_code == 2


def test_files_are_named_after_the_label():
    assert (
        cells.file_name("S-NIAH-2 (alternative haystack)", 4096) == "s-niah-2-alternative-haystack-4096.jsonl"
    )
