"""Publishing: what would go, under which name, with which card."""

import pytest
from tiny import tiny

from linearize import checkpoint
from linearize.convert import convert
from linearize.hub import card, push
from linearize.modeling.lolcats import LolcatsConfig
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
    assert 'AutoModelForCausalLM.from_pretrained("me/mine", trust_remote_code=True)' in made.text
    assert "| measured |" in made.text
    assert made.data.base_model == "owner/teacher"
    assert "lolcats" in made.data.tags


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
