"""Recipes: what a word means, what is refused and how, what a method recommends."""

import dataclasses

import pytest
import yaml

from linearize.modeling.errors import LinearizeError, RecipeError
from linearize.modeling.registry import METHODS
from linearize.recipe import QUICKSTART, Recipe, build_method, shipped_recipes


@pytest.mark.parametrize("name", [None, "books-5m", "org/model", *shipped_recipes()])
def test_what_is_written_reads_back_equal(name, tmp_path):
    recipe = Recipe.resolve(name)
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe.to_yaml())
    assert Recipe.from_file(path) == recipe
    assert Recipe.from_file(path).differences(recipe) == []


def test_nothing_means_the_quickstart_and_a_model_means_the_defaults():
    assert Recipe.resolve() == Recipe.resolve(QUICKSTART)
    assert Recipe.resolve().teacher.name == "books-5m"
    assert Recipe.resolve().layers == "all"
    assert Recipe.resolve().plan.kv_share == 0.08
    assert Recipe.resolve("some/model") == Recipe.from_dict({"teacher": {"name": "some/model"}})
    assert Recipe.resolve("some/model").layers == "all"


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_defaults_that_resolve(name):
    recipe = Recipe.resolve("some/model", method=name)
    assert recipe.method == METHODS[name].config()
    assert Recipe.from_dict(recipe.to_dict()) == recipe


def test_the_method_option_replaces_the_method_of_the_file(tmp_path):
    path = tmp_path / "my.yaml"
    path.write_text("method: {name: lolcats, window_kind: sliding}\nseed: 3\n")
    recipe = Recipe.resolve(path, method="window")
    assert recipe.method == METHODS["window"].config()
    assert recipe.seed == 3


def test_numbers_may_be_written_as_people_write_them():
    words = [
        "transfer.learning_rate=1e-2",
        "transfer.tokens=5e6",
        "finetune.tokens=20_000",
        "teacher.revision=123",
    ]
    recipe = Recipe.resolve("some/model", overrides=words)
    assert recipe.transfer.learning_rate == 0.01
    assert recipe.transfer.tokens == 5_000_000
    assert recipe.finetune.tokens == 20_000
    assert recipe.teacher.revision == "123"


@pytest.mark.parametrize(
    "name", [name for name, method in METHODS.items() if hasattr(method.config, "window")]
)
def test_numbers_of_a_method_are_read_like_all_others(name):
    assert Recipe.resolve("some/model", name, ["method.window=1e2"]).method.window == 100
    assert Recipe.resolve("some/model", name, ["method.window='3_2'"]).method.window == 32


def test_overrides_are_yaml_and_the_last_one_wins():
    words = ["layers=[0,2]", "method.window=16", "method.window=32", "data.sources.0.weight=2", "output=null"]
    recipe = Recipe.resolve("books-5m/lolcats", overrides=words)
    assert recipe.layers == [0, 2]
    assert recipe.method.window == 32
    assert recipe.data.sources[0].weight == 2
    assert recipe.output is None
    assert recipe.override(["seed=7"]).seed == 7
    assert recipe.override(["seed=7"]).method.window == 32


def test_the_default_sources_can_be_overridden_one_by_one():
    recipe = Recipe.resolve("some/model", overrides=["data.sources.0.tokens=64"])
    assert recipe.data.sources[0].tokens == 64
    assert len(recipe.data.sources) == 2


@pytest.fixture
def recommending(monkeypatch):
    config = METHODS["lolcats"].config
    wishes = {"transfer.learning_rate": 0.5, "finetune.lora.rank": 4}
    monkeypatch.setattr(config, "recommended", wishes)


@pytest.mark.usefixtures("recommending")
def test_a_method_recommends_and_the_user_decides():
    free = Recipe.resolve("some/model", method="lolcats")
    assert (free.transfer.learning_rate, free.finetune.lora.rank) == (0.5, 4)
    mine = Recipe.resolve("some/model", method="lolcats", overrides=["transfer.learning_rate=0.1"])
    assert (mine.transfer.learning_rate, mine.finetune.lora.rank) == (0.1, 4)
    assert mine.override(["seed=1"]).transfer.learning_rate == 0.1
    whole = Recipe.from_dict({"finetune": {"lora": {"rank": 16}}, "transfer": {}})
    assert (whole.transfer.learning_rate, whole.finetune.lora.rank) == (0.5, 16)


def test_differences_name_keys_and_leave_the_output_out():
    one = Recipe.resolve("books-5m/lolcats")
    other = one.override(["method.window=16", "data.sources.1.weight=3", "output=elsewhere"])
    assert one.differences(other) == ["method.window", "data.sources.1.weight"]


def test_a_recipe_cannot_be_changed_in_place():
    recipe = Recipe.resolve("books-5m/lolcats")
    with pytest.raises(Exception, match="frozen"):
        recipe.seed = 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.method.window = 1


MAP = "layers={0-1: window, 7: softmax, rest: {name: salient, budget: 128}}"


def test_layers_can_be_mapped_to_methods():
    recipe = Recipe.resolve("some/model", overrides=[MAP, "layers.rest.chunk=32"])
    window, salient = METHODS["window"].config(), METHODS["salient"].config(budget=128, chunk=32)
    assert recipe.layers == {"0-1": window, "7": METHODS["softmax"].config(), "rest": salient}
    assert recipe.method == salient  # nobody said another
    assert recipe.transfer.learning_rate == salient.recommended["transfer.learning_rate"]
    assert recipe.method_name == "window+salient"
    assert Recipe.from_dict(yaml.safe_load(recipe.to_yaml())) == recipe
    assert recipe.differences(recipe.override(["layers.rest.budget=3"])) == [
        "method.budget",
        "layers.rest.budget",
    ]


def test_an_entry_without_a_name_is_the_method_with_other_fields():
    words = ["layers={7: {budget: 1024}, rest: {budget: 32}}", "method.score_context=16"]
    recipe = Recipe.resolve("some/model", method="salient", overrides=words)
    config = METHODS["salient"].config
    assert recipe.layers == {
        "7": config(budget=1024, score_context=16),
        "rest": config(budget=32, score_context=16),
    }
    assert recipe.method == config(score_context=16)
    assert recipe.method_name == "salient"


REFUSED = {
    "layers={}": "layers: {} names no layer; write a number, a range such as 0-3, or rest",
    "layers={0-x: window}": "layers: '0-x' is no layer; write a number, a range such as 0-3, or rest",
    "layers={3-1: window}": "layers: '3-1' is empty; write 1-3",
    "layers={0-3: window, 2: softmax}": "layers: 2 is named by both '0-3' and '2'; drop it from one",
    "layers={0: windw}": "layers.0.name: 'windw' is unknown; did you mean 'window'?",
    "layers={rest: {name: window, windw: 3}}": "layers.rest.windw: unknown key; did you mean 'window'?",
    "layers={rest: {name: window, window: 0}}": "layers.rest.window: 0 is impossible",
    "layers={rest: {name: window, window: 4000}}": "layers.rest.window: 4000 covers all of data.seq_len=1024",
    "method={name: salient, chunk: 512}": "method.chunk: 512 covers all of data.seq_len=1024",
    "method.window=512": "method.window: 512 covers all of data.seq_len=1024",  # terraced: two blocks of it
    "method.widow=3": "method.widow: unknown key; did you mean 'window'?",
    "method=lolcat": "method.name: 'lolcat' is unknown; did you mean 'lolcats'?",
    "method=3": "method.name: 3 is unknown; choose from",
    "method=[lolcats]": "method.name: ['lolcats'] is unknown; did you mean 'lolcats'?",
    "method.window=0": "window: 0",
    "method.window=true": "method.window: True should be a whole number",
    "method.window=64.5": "method.window: 64.5 should be a whole number",
    "method.window_logit_init=true": "method.window_logit_init: True should be a number",
    "method.sinks=2": "method.sinks: belongs to window, not to lolcats; leave it out",
    "method.window=[1]": "method.window: [1] should be a whole number",
    "method.window=2000": "method.window: 2000 covers all of data.seq_len=1024, which leaves nothing to linearize; "
    "try method.window=128",
    "window=3": "window: unknown key; did you mean 'control.window'?",
    "transfer.tokens=many": "transfer.tokens: 'many' should be a whole number",
    "transfer.tokens=1.5": "transfer.tokens: 1.5 should be a whole number",
    "transfer.tokens=true": "transfer.tokens: True should be a whole number",
    "transfer.batch_size=0": "transfer.batch_size: 0 should be greater than or equal to 1",
    "transfer.clip=.inf": "transfer.clip: inf should be a finite number",
    "transfer.loss=relativ": "transfer.loss: 'relativ' is unknown; did you mean 'relative'?",
    "transfer=3": "transfer: 3 should hold keys and values",
    "finetune.kl=0": "finetune.next_token: 0, and so is kl",
    "finetune.lora.targets=[]": "finetune.lora.targets: [] should have at least one entry",
    "finetune.lora.dropout=1": "finetune.lora.dropout: 1 should be less than 1",
    "finetune.lora.targets=3": "finetune.lora.targets: 3 is unknown; choose from 'attention' or a list",
    "layers=some": "layers: 'some' is unknown; choose from 'all' or a list",
    "layers=[1,1]": "layers: [1, 1] is not a list of distinct layer numbers",
    "layers=[]": "layers: [] is not a list of distinct layer numbers",
    "layers=[0,a]": "layers.1: 'a' should be a whole number",
    "control={methods: [linear], sinks: 4}": "control.sinks: 4 is of the window control; add 'window' to methods",
    "data.sources=[]": "data.sources: [] should have at least one entry",
    "data.sources=[self]": "data.sources.0: 'self' should hold keys and values",
    "data.sources=[{kind: text, path: a.txt, tokens: 1}]": "data.sources.0.tokens: unknown key; choose from",
    "data.sources=[{weight: 1}]": "data.sources.0: 'kind' is missing; choose from 'self', 'recall'",
    "data.sources=[{kind: text}]": "data.sources.0.path: missing",
    "data.sources=[{kind: chat}]": "data.sources.0.path: give exactly one of path and dataset",
    "data.sources.0.tokns=3": "data.sources.0.tokns: unknown key; did you mean 'tokens'?",
    "data.sources.0.kind=foo": "data.sources.0: kind 'foo' is unknown; choose from 'self', 'recall'",
    "data.sources.7.weight=1": "data.sources.7: no such entry; data.sources has 2, counted from 0",
    "data.held_out=[]": "data.held_out: [] should have at least one entry",
    "data.held_out=[{kind: self}]": "data.held_out: a 'self' source is not text",
    "data.seq_len=1": "data.seq_len: 1 should be greater than or equal to 2",
    "evaluate.recall_tasks=[paskey]": "evaluate.recall_tasks.0: 'paskey' is unknown; did you mean 'passkey'?",
    "device=gpu": "device: 'gpu' is unknown; did you mean 'cpu'?",
    "seed=4294967296": "seed: 4294967296 should be less than 4294967296",
    "seed.x=1": "seed: {'x': 1} should be a whole number",
    "nonsense": "'nonsense': not an override; write key=value",
    "a..b=1": "'a..b=1': not an override",
    "seed=[": "seed: '[' is not a YAML value",
    "transfer={tokens: 1, tokens: 2}": "is not a YAML value",
    "transfer={[tokens]: 1}": "is not a YAML value",
    "transfer={on: 1}": "True is not a word; YAML reads on, yes, null and numbers as values",
}


@pytest.mark.parametrize("word", REFUSED)
def test_a_wrong_word_is_refused_in_one_line(word):
    with pytest.raises(RecipeError) as error:
        Recipe.resolve("books-5m/lolcats", overrides=[word])
    line = str(error.value)
    assert REFUSED[word] in line
    assert "\n" not in line


BROKEN_FILES = {
    "method: {name: lolcats, widow: 3}": "my.yaml: method.widow: unknown key; did you mean 'window'?",
    "seed: 1\nseed: 2": "my.yaml: line 2: the key 'seed' is written twice",
    "seed: [": "my.yaml: line ",
    "? [seed]\n: 1": "my.yaml: line 1: a key is not a word",
    "1: 2": "my.yaml: 1: 1 is not a word",
    "- 1": "my.yaml: holds no keys and values",
    "teachr: {name: x}": "my.yaml: teachr: unknown key; did you mean 'teacher'?",
    "seed: !!python/object:os.system {}": "my.yaml: line 1:",
}


@pytest.mark.parametrize("text", BROKEN_FILES)
def test_a_wrong_file_is_named_in_the_line(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.yaml").write_text(text)
    with pytest.raises(RecipeError) as error:
        Recipe.resolve("my.yaml")
    assert str(error.value).startswith(BROKEN_FILES[text])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("layers", ["{0-1: lolcats, 3: softmax}", "{0-1: {name: lolcats}}"])
def test_a_layers_field_is_set_whether_or_not_its_method_stands_alone(layers):
    made = Recipe.resolve("x/y", overrides=[f"layers={layers}", "layers.0-1.window=16"]).methods
    assert made["layers.0-1"].name == "lolcats" and made["layers.0-1"].window == 16


def test_a_key_that_yaml_reads_as_a_number_is_the_layer_it_names(tmp_path):
    (tmp_path / "my.yaml").write_text("layers: {7: lolcats, rest: salient}\n")
    made = Recipe.resolve(
        tmp_path / "my.yaml", overrides=["layers.7.window=16", "layers.rest.budget=32"]
    ).methods
    assert set(made) == {"layers.7", "layers.rest"}
    assert made["layers.7"].window == 16 and made["layers.rest"].budget == 32


def test_an_override_is_not_blamed_on_the_file(tmp_path):
    (tmp_path / "my.yaml").write_text("seed: 1\n")
    with pytest.raises(RecipeError, match=r"^method\.widow: unknown key"):
        Recipe.resolve(tmp_path / "my.yaml", overrides=["method.widow=1"])


def test_a_recipe_file_that_is_not_there_gets_a_hint():
    with pytest.raises(
        RecipeError, match=r"quickstrt\.yaml: no such recipe file; did you mean 'quickstart'\?"
    ):
        Recipe.resolve("quickstrt.yaml")


@pytest.mark.parametrize("name", METHODS)
def test_unknown_fields_of_any_method_are_refused(name):
    with pytest.raises(LinearizeError, match=r"method\.nosuch: unknown key"):
        build_method({"name": name, "nosuch": 1})
