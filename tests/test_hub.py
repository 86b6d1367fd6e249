"""Publishing: what would go, under which name, with which card."""

import pytest
from tiny import tiny

from linearize import checkpoint
from linearize.convert import convert
from linearize.hub import card, push
from linearize.methods import adjust
from linearize.modeling.lolcats import LolcatsConfig
from linearize.modeling.window import WindowConfig
from linearize.recipe import Recipe


@pytest.fixture
def student(tmp_path):
    model = convert(tiny("llama"), LolcatsConfig(window=4))
    extra = {"recipe.yaml": Recipe.resolve("owner/teacher").to_yaml()}
    return checkpoint.save(model, None, tmp_path / "run" / "student", extra=extra)


def test_a_dry_run_names_every_file_and_needs_no_network(student):
    made = push(student, "me/mine", dry_run=True)
    assert set(made.files) == {path.name for path in student.iterdir()} | {"README.md"}
    assert made.url == "https://huggingface.co/me/mine"


def test_the_card_tells_how_to_load_and_what_was_measured(student):
    (student.parent / "table.md").write_text("| measured |\n")
    made = card(student, "me/mine")
    # Without it the tokenizer asks on the terminal, too: it reads the configuration first.
    for kind in ("AutoModelForCausalLM", "AutoTokenizer"):
        assert f'{kind}.from_pretrained("me/mine", trust_remote_code=True)' in made.text
    assert "| measured |" in made.text
    assert made.data.base_model == "owner/teacher"
    assert "lolcats" in made.data.tags


def test_the_card_names_the_methods_of_the_folder_and_not_of_its_run(tmp_path):
    """A control is saved with the recipe of its run."""
    extra = {"recipe.yaml": Recipe.resolve("owner/teacher").to_yaml()}
    model = convert(tiny("llama"), WindowConfig(window=4), [0, 2])
    made = card(checkpoint.save(model, None, tmp_path / "control", extra=extra), "me/mine")
    assert "replaced by `window`" in made.text
    assert "window" in made.data.tags and "lolcats" not in made.data.tags


def test_the_card_says_when_the_student_is_not_as_it_was_measured(tmp_path):
    recipe = Recipe.resolve("owner/teacher", overrides=["method.window=4"])
    model, extra = convert(tiny("llama"), recipe.method, [0, 1]), {"recipe.yaml": recipe.to_yaml()}
    (tmp_path / "table.md").write_text("| measured |\n")
    before, after = (
        card(checkpoint.save(adjust(model, **fields), None, tmp_path / name, extra=extra), "me/mine").text
        for name, fields in {"student": {}, "sparse": {"sparse_cache": 6}}.items()
    )
    assert "| measured |" in before and "set anew" not in before
    assert "set anew" in after


def test_what_is_uploaded_is_the_folder_and_the_card(student, monkeypatch):
    calls = {}
    for verb in ("create_repo", "upload_file", "upload_folder"):
        monkeypatch.setattr(
            f"huggingface_hub.HfApi.{verb}", lambda _, *a, verb=verb, **k: calls.update({verb: k})
        )
    push(student, "me/mine", private=True)
    assert calls["create_repo"]["private"]
    assert calls["upload_folder"]["folder_path"] == student
    assert b"me/mine" in calls["upload_file"]["path_or_fileobj"]
