"""A student behind an OpenAI-compatible server: transformers' own, with two things more.

The model is loaded without running code of its folder, and every request may go on from one saved state, so that a
document read once costs no request anything.
"""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from .loading import load
from .modeling.cache import CACHE
from .modeling.errors import EvaluationError
from .state import PromptState
from .state import load as load_state

TRANSCRIPT = (
    "{% for message in messages %}{{ message['role'] | capitalize }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
"""The chat template of a model that has none: base models continue a transcript."""


def serve(
    checkpoint: str | Path,
    *,
    state: str | Path | None = None,
    host: str = "localhost",
    port: int = 8000,
    device: str = "cpu",
) -> None:
    """Serve until interrupted. ``state`` is a file of :func:`linearize.state.save` that every request goes on from.

    Raises :class:`EvaluationError` where the server's packages are missing, and what loading raises.
    """
    if missing := [package for package in ("fastapi", "uvicorn", "openai") if find_spec(package) is None]:
        raise EvaluationError(f"serve: {', '.join(missing)} not installed; pip install 'linearize[serve]'")
    from transformers.cli.serve import Serve
    from transformers.cli.serving.model_manager import TimedModel

    name = str(checkpoint)
    model, tokenizer = load(checkpoint, device=device)
    if tokenizer is None:
        raise EvaluationError(f"{name}: has no tokenizer; save its teacher's tokenizer there")
    if tokenizer.chat_template is None:
        tokenizer.chat_template = TRANSCRIPT
    if state is not None:
        go_on_from(load_state(state, model), model, tokenizer.bos_token_id)

    class Server(Serve):
        def start_server(self) -> None:
            manager = self._model_manager
            manager.loaded_models[manager.process_model_name(name)] = TimedModel(model, -1, tokenizer)
            manager.force_model, manager.model_timeout = name, -1
            self.server.run()

    Server(host=host, port=port, device=device, non_blocking=True)


def go_on_from(state: PromptState, model: Any, bos: int | None = None) -> None:
    """Have every ``model.generate()`` go on from what was read; what it returns begins with the given ids all the same.

    ``bos``, where a request's tokens begin with it, is left out: it stands before the text already.
    """
    generate = model.generate

    def going_on(input_ids: torch.Tensor, attention_mask: Any = None, **options: Any) -> torch.Tensor:
        skip = int(bos is not None and input_ids.shape[1] > 1 and bool((input_ids[:, 0] == bos).all()))
        whole, cache = state.before(input_ids[:, skip:])
        made = generate(whole, attention_mask=torch.ones_like(whole), **{CACHE: cache}, **options)
        return torch.cat([input_ids, made[:, whole.shape[1] :]], 1)

    model.generate = going_on
