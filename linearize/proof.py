"""What is shown of a saved student beside its quality: gates on its folder, its certificate, a second look at it."""

import contextlib
import logging
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from . import certificate, checkpoint
from .data import Corpus, build
from .evaluate import Gates, GatesFailed, Results, digest_of_windows
from .evaluate.gates import FAILED, integrity, not_run
from .evaluate.vocabulary import refuse_other_vocabulary
from .identity import data_hashes, file_hashes, trained_on
from .methods import adjust, method_words
from .modeling.errors import LinearizeError, RecipeError, TeacherError
from .progress import Watch
from .recipe import Recipe
from .teacher import load_teacher

logger = logging.getLogger(__name__)

TRUST, TASKS = "teacher.trust_remote_code=true", "evaluate.lm_eval.folder="


def device_of(recipe: Recipe) -> str:
    """``cuda`` where there is one, unless the recipe says otherwise."""
    found = "cuda" if torch.cuda.is_available() else "cpu"
    if recipe.device == "cuda" and found == "cpu":
        raise RecipeError(
            "device: 'cuda', but torch finds no GPU here; use device=cpu or a CUDA build of torch"
        )
    return found if recipe.device == "auto" else recipe.device


def refuse_its_code(given: str | Path, folder: Path, recipe: Recipe, overrides: Sequence[str] = ()) -> None:
    """Raise :class:`RecipeError` where a fetched recipe asks for code to be run that ``overrides`` do not ask for.

    ``given`` is what the student was called, ``folder`` where its files are: another place if they were fetched. Who
    names a folder of this machine has its recipe at hand.
    """
    if folder == Path(given):
        return
    if recipe.teacher.trust_remote_code and TRUST not in overrides:
        raise RecipeError(
            f"teacher.trust_remote_code: the recipe of {given} asks to run code of {recipe.teacher.name}; "
            f"read that code, then say {TRUST}"
        )
    tasks = recipe.evaluate.lm_eval.folder
    if tasks and not any(word.startswith(TASKS) for word in overrides):
        raise RecipeError(
            f"evaluate.lm_eval.folder: the recipe of {given} asks for the tasks in {tasks}, which may hold code; "
            f"read them, then say {TASKS}{tasks}, or {TASKS}null"
        )


def gates_of_checkpoint(
    folder: str | Path, overrides: Sequence[str] = (), *, progress: Watch | None = None
) -> Gates:
    """The integrity gates of a saved student, beside its teacher where that is at hand.

    A student on the Hub, named by its id, is fetched first. Raises :class:`EvaluationError` where the teacher's
    vocabulary is another, and :class:`RecipeError` where a fetched recipe asks for its teacher's code to be run.
    """
    given, folder = folder, checkpoint.fetch(folder)
    fields, overrides = method_words(overrides)
    student, own_tokenizer = checkpoint.load(folder)
    student = adjust(student, **fields)
    path = folder / "recipe.yaml"
    recipe = Recipe.from_file(path, overrides=overrides) if path.is_file() else None
    if recipe is None:
        return integrity(student, folder=None if fields else folder, progress=progress)
    refuse_its_code(given, folder, recipe, overrides)
    device, teacher, tokenizer = device_of(recipe), None, None
    with contextlib.suppress(TeacherError):
        teacher, tokenizer = load_teacher(recipe.teacher, device)
        refuse_other_vocabulary(own_tokenizer, tokenizer, str(given))
    at = folder if not fields else None
    found = gates_of(student.to(device), teacher, tokenizer, at, recipe, progress, asked=True)
    if at is not None:
        try:
            certificate.certify_gates(at, found, recipe)
        except OSError as error:
            logger.warning("%s: its certificate cannot be written (%s)", given, error.strerror or error)
    return found


def verify_checkpoint(folder: str | Path) -> certificate.Verified:
    """Every hash of a student's certificate made again: its files, and teacher and data where they are at hand."""
    given, folder = folder, checkpoint.fetch(folder)

    def data(tree: Mapping[str, Any], sound: bool) -> tuple[Mapping[str, str | None], str]:
        cache = data_folder(folder)
        if cache is None:
            return {}, "the run's data folder is not beside the student"
        found = file_hashes(cache)
        if found.get("data.files") != tree["identity"].get("data.files"):
            return found, "its files are others"
        if not sound:  # what they name might have to be sampled first
            return found, "teacher, recipe or certificate have changed"
        try:
            return {**found, **_data_again(given, folder, tree, cache)}, ""
        except (LinearizeError, OSError) as error:
            return found, str(error)

    return certificate.verify(folder, data=data)


def _data_again(
    given: str | Path, folder: Path, tree: Mapping[str, Any], cache: Path
) -> Mapping[str, str | None]:
    """Hashes of the training data and of the windows measured on, from kept tokens; nothing is written beside them."""
    trained, measured = Recipe.from_file(folder / "recipe.yaml"), Recipe.from_dict(tree["evaluation"])
    refuse_its_code(given, folder, measured)
    teacher, tokenizer = load_teacher(measured.teacher, device_of(measured))
    with tempfile.TemporaryDirectory() as temporary:
        for path in cache.resolve().iterdir():
            Path(temporary, path.name).symlink_to(path)
        at = {"cache_dir": Path(temporary), "seed": trained.seed, "device": device_of(measured)}
        full = build(trained.data, tokenizer, teacher=teacher, **at)
        text = build(_measured_data(measured), tokenizer, teacher=teacher, **at)
        lengths, count = measured.evaluate.seq_lens, measured.evaluate.sequences
        windows = {length: digest_of_windows(text.held_out(length, count)) for length in lengths}
    return data_hashes(full.fingerprint, windows)


def _measured_data(recipe: Recipe) -> Any:
    """The recipe's ``data`` without what only training needs."""
    data = recipe.data
    if data.held_out is None:
        return data
    # What the teacher samples and what is generated serve training alone.
    kept = [source for source in data.sources if source.kind not in ("self", "recall")]
    return data.model_copy(update={"sources": kept})


def text_of(
    folder: Path, recipe: Recipe, seed: int, teacher: Any, tokenizer: Any, progress: Watch | None
) -> Corpus:
    """The text that a saved student is measured on."""
    return build(
        _measured_data(recipe),
        tokenizer,
        teacher=teacher,
        cache_dir=data_folder(folder),
        seed=seed,
        device=device_of(recipe),
        progress=progress,
    )


def data_folder(student: Path) -> Path | None:
    """``data`` of the run that a student, or one of its controls, lies in."""
    parents = student.resolve().parents
    places = [parent / "data" for parent in (parents[0], *parents[2:3])]
    return next((place for place in places if place.is_dir()), None)


def controls_of(student: Path) -> dict[str, Path]:
    """The controls that were trained beside a student, by name."""
    found = sorted((student.resolve().parent / "control").glob("*/student"))
    return {f"{at.parent.name} control": at for at in found if checkpoint.is_checkpoint(at)}


def gates_of(
    student: Any,
    teacher: Any,
    tokenizer: Any,
    folder: Path | None,
    recipe: Recipe,
    progress: Watch | None,
    asked: bool = False,
) -> Gates:
    if not (recipe.evaluate.gates or asked):
        return not_run("evaluate.gates is false")
    vocab = None if tokenizer is None else len(tokenizer)
    found = integrity(
        student,
        teacher=teacher,
        folder=folder,
        train_len=recipe.data.seq_len,
        vocab_size=vocab,
        seed=recipe.seed,
        progress=progress,
    )
    return found


def stop_where_failed(
    gates: Gates,
    student: Path | None,
    name: Path,
    recipe: Recipe,
    corpus: Corpus,
    planned: Mapping[str, Any] | None = None,
) -> None:
    """Raise :class:`GatesFailed` where a gate failed; the certificate in ``student``, if that is given, says so then.

    Integrity comes before quality: nothing that such a student scores could be relied on.
    """
    if gates.status != FAILED:
        return
    kept = "its certificate.json says so"
    if student is None:
        kept = "as it is set here it is no checkpoint's, so no certificate says so"
    else:
        try:
            if certificate.certify_gates(student, gates, recipe) is None:
                count = recipe.evaluate.sequences
                windows = {n: digest_of_windows(corpus.held_out(n, count)) for n in recipe.evaluate.seq_lens}
                results = Results(corpus.label, [], recipe.seed, {}, [], {}, windows, gates=gates)
                certify(student, results, recipe, planned)
        except OSError as error:
            kept = f"no certificate says so, for it could not be written ({error.strerror or error})"
    raise GatesFailed(
        name,
        gates,
        f"nothing else is measured, and {kept}; `linearize eval {name} --gates` has all gates, "
        f"`linearize eval {name} evaluate.gates=false` measures it all the same",
    )


def certify(folder: Path, results: Results, recipe: Recipe, planned: Mapping[str, Any] | None = None) -> None:
    """Write the certificate of a checkpoint from what was measured, and from the run that it lies in.

    ``planned`` is the budget, the plan and the scan that chose its layers, if any did.
    """
    trained = trained_on(folder)
    data = data_hashes(trained, results.windows, data_folder(folder))
    made = certificate.certify(folder, results, recipe, data=data, device=device_of(recipe), planned=planned)
    logger.debug("%s: certificate %s", folder, made["status"])
