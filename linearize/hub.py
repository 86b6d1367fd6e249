"""Publishing a saved student on the Hugging Face Hub, with a card: what it is and what was measured."""

import json
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from .checkpoint import CONFIG, is_checkpoint
from .methods import build_method, method_names
from .modeling.errors import HubError, RecipeError
from .modeling.window import SoftmaxConfig
from .recipe import Recipe


@dataclass(frozen=True)
class Pushed:
    """Where the student is (or would be) and the files that went there."""

    url: str
    files: list[str]


def push(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    dry_run: bool = False,
) -> Pushed:
    """Upload a checkpoint folder and its card; ``dry_run`` says what would go and touches no network."""
    folder = Path(folder)
    if not is_checkpoint(folder):
        raise HubError(f"{folder}: not a saved student; give the `student` folder of a run")
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise HubError(f"{repo_id}: not a repository id ({_line(error)}); write owner/name") from None
    if "/" not in repo_id:
        raise HubError(f"{repo_id}: whose repository? write owner/{repo_id}")
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    made = Pushed(f"https://huggingface.co/{repo_id}", sorted({*files, "README.md"}))
    if dry_run:
        return made
    api, text = HfApi(), str(card(folder, repo_id)).encode()
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        if "README.md" not in files:
            api.upload_file(
                path_or_fileobj=text, path_in_repo="README.md", repo_id=repo_id, revision=revision
            )
        api.upload_folder(repo_id=repo_id, folder_path=folder, revision=revision)
    except Exception as error:  # the network fails in many ways (httpx, ssl, proxies), all with one remedy
        raise HubError(
            f"{repo_id}: the upload failed ({_line(error)}); check the network or `hf auth login`, then push again"
        ) from None
    return made


def card(folder: Path, repo_id: str) -> ModelCard:
    """The model card: teacher and method, how to load it, and its run's tables where there are any."""
    try:
        recipe = Recipe.from_file(folder / "recipe.yaml")
    except RecipeError:
        recipe = None
    table = folder.parent / "table.md"
    measured = table.read_text(encoding="utf-8") if table.is_file() else "Nothing was measured.\n"
    name = recipe.teacher.name if recipe else "its teacher"
    layers = json.loads((folder / CONFIG).read_text(encoding="utf-8"))["linearize"]["layers"].values()
    methods = [build_method(layer["method"]) for layer in layers]
    if table.is_file() and recipe and not {*methods} <= {SoftmaxConfig(), *recipe.methods.values()}:
        measured = f"Measured before fields of its methods were set anew.\n\n{measured}"
    method = method_names(method.name for method in methods)
    data = ModelCardData(
        base_model=name if recipe and "/" in name else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["linearize", "linear-attention", method],
    )
    text = f"""---
{data.to_yaml()}
---
# {name}, with linear attention

Attention layers of `{name}` replaced by `{method}` and taught to imitate the original.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{repo_id}", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("{repo_id}", trust_remote_code=True)
```

{measured}"""
    return ModelCard(text)


def _line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:120]
