"""Publishing a saved student on the Hugging Face Hub, with its card, in one commit.

Large files go first, one by one; what has arrived is not sent again when the command is repeated, and nothing is
visible before all of it is there. The token is huggingface_hub's alone: it is neither read nor written here.
"""

import contextlib
import json
import logging
import re
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
from huggingface_hub.utils import (
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
    validate_repo_id,
)

from .adapter import ADAPTER_CONFIG, write_adapter
from .card import ASSETS, LICENCE_UNKNOWN, Source, card
from .certificate import CERTIFICATE, read
from .checkpoint import CONFIG, is_checkpoint
from .licence import licence_of
from .modeling.errors import CheckpointError, HubError
from .modeling.model import PREFIX
from .progress import Progress, Watch
from .report import Picture, available, pictures

logger = logging.getLogger(__name__)

OURS = re.compile(r"[^/]*\.safetensors(\.index\.json)?|" + ASSETS + r"/.*")
"""What a push takes away from the repository where this student does not have it: shards of an earlier one."""
BARE = {".gitattributes", "README.md"}  # what a repository may hold that holds no model


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
    adapter_only: bool = False,
    allow_licence: bool = False,
    allow_failed: bool = False,
    progress: Watch | None = None,
) -> Pushed:
    """Upload a student's folder, or the one of a run, with its card; ``dry_run`` only says what would go.

    ``revision`` is a branch, made where there is none. ``adapter_only`` sends the adapters of stage 2 and the mixers
    in place of the whole weights; ``allow_licence`` goes on where the teacher's licence forbids derivatives,
    ``allow_failed`` where integrity gates of the student failed. A dry run touches no network. Raises
    :class:`HubError`: a folder that is no student, a certificate that cannot be read, failed gates, a licence that
    forbids it, a repository of something else, and whatever the Hub refuses.
    """
    folder = student_of(folder)
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise HubError(f"{repo_id}: not a repository id ({_line(error)}); write owner/name") from None
    if "/" not in repo_id:
        raise HubError(f"{repo_id}: whose repository? write owner/{repo_id}")
    source = Source.of(folder)
    if source.certificate_file is not None:
        try:
            read(source.certificate_file.parent)
        except CheckpointError as error:
            raise HubError(f"{error}, or remove it: then the card says that nothing was checked") from None
    if source.failed_gates and not allow_failed:
        raise HubError(
            f"{folder}: integrity gates failed ({'; '.join(source.failed_gates)}), so it is not one function; "
            "see `linearize eval --gates`, or say --allow-failed, and its card says so first"
        )
    licence = LICENCE_UNKNOWN
    if source.recipe is not None:
        licence = licence_of(source.recipe.teacher, network=not dry_run)
    if licence.forbids and not allow_licence:
        raise HubError(
            f"{source.teacher}: its licence forbids derivatives ({licence.forbids}, by {licence.source}), and a "
            "student is one; do not publish it, or say --allow-licence where you have the permission"
        )
    api = HfApi()
    url = f"{api.endpoint}/{repo_id}"
    with _contents(source, adapter_only) as files:
        if "README.md" not in files:
            shown = _pictures(source)
            files |= {f"{ASSETS}/{picture.name}": picture.content for picture in shown}
            captions = {picture.name: picture.caption for picture in shown}
            made = card(
                folder, repo_id, licence=licence, revision=revision, adapter=adapter_only, pictures=captions
            )
            files["README.md"] = str(made).encode()
        names = sorted(files)
        if not dry_run:
            with _told(repo_id):
                api.create_repo(repo_id, private=private or None, exist_ok=True)
                if revision is not None:
                    api.create_branch(repo_id, branch=revision, exist_ok=True)
                there = api.list_repo_files(repo_id, revision=revision)
                _refuse_other_model(repo_id, revision, set(there))
                _upload(api, repo_id, revision, files, there, progress)
    return Pushed(url, names)


def student_of(folder: str | Path) -> Path:
    """The student's folder, where that or its run's is given."""
    for found in (Path(folder), Path(folder) / "student"):
        if is_checkpoint(found):
            return found
    raise HubError(f"{folder}: not a saved student; give a run's folder, or the `student` folder of one")


@contextlib.contextmanager
def _contents(source: Source, adapter_only: bool) -> Iterator[dict[str, Path | bytes]]:
    """Every file by its name in the repository."""
    with tempfile.TemporaryDirectory() as temporary:
        root = source.folder
        if adapter_only:
            root = Path(temporary)
            write_adapter(source.folder, root)
        files: dict[str, Path | bytes] = {
            path.relative_to(root).as_posix(): path for path in root.rglob("*") if path.is_file()
        }
        if source.certificate_file is not None:
            files.setdefault(CERTIFICATE, source.certificate_file)
        yield files


def _pictures(source: Source) -> list[Picture]:
    """The card's plots, of what was measured; none, and a word why, where they cannot be drawn."""
    if not source.results:
        return []
    if not available():
        logger.warning("the card goes without plots, which need matplotlib; pip install 'linearize[report]'")
        return []
    try:
        return pictures(source.results)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        what = f"{type(error).__name__}: {error}"
        logger.warning("the card goes without plots: the results are of another version (%s)", what)
        return []


def _upload(
    api: HfApi,
    repo_id: str,
    revision: str | None,
    files: Mapping[str, Path | bytes],
    there: list[str],
    progress: Watch | None,
) -> None:
    """All in one commit; weights before it, file by file, each of which stays on the Hub once it is there."""
    additions = [CommitOperationAdd(name, content) for name, content in sorted(files.items())]
    large = [a for a in additions if a.path_in_repo.endswith(".safetensors")]
    total, done = sum(a.upload_info.size for a in large), 0
    for addition in large:  # all others are small, and go with the commit
        api.preupload_lfs_files(repo_id, [addition], revision=revision)
        done += addition.upload_info.size
        if progress is not None:
            progress(Progress("upload", done, total, unit="bytes"))
    stale = [CommitOperationDelete(n) for n in there if n not in files and OURS.fullmatch(n)]
    api.create_commit(
        repo_id, [*additions, *stale], commit_message="Upload a linearized student", revision=revision
    )


def _refuse_other_model(repo_id: str, revision: str | None, there: set[str]) -> None:
    if there <= BARE or ADAPTER_CONFIG in there:
        return
    if CONFIG in there:
        path = hf_hub_download(repo_id, CONFIG, revision=revision)
        family = str(json.loads(Path(path).read_text(encoding="utf-8")).get("model_type", ""))
        if family.startswith(PREFIX):
            return
        held = f"a model of type {family!r}"
    else:
        held = f"other files ({min(there - BARE)}, for one)"
    raise HubError(f"{repo_id}: exists already and holds {held}; choose another name, or empty it first")


@contextlib.contextmanager
def _told(repo_id: str) -> Iterator[None]:
    """What the Hub and the network refuse, as one line of ours; the Hub's own bars stay away from ours."""
    bars = not are_progress_bars_disabled()
    try:
        if bars:
            disable_progress_bars()
        yield
    except HubError:
        raise
    except Exception as error:  # the network fails in many ways (httpx, ssl, proxies)
        raise HubError(f"{repo_id}: {_reason(error)}") from None
    finally:
        if bars:
            enable_progress_bars()


def _reason(error: BaseException) -> str:
    status, root = 0, error
    at: BaseException | None = error
    while at is not None and not status:  # a failed part of an upload is wrapped once more
        root = at
        if isinstance(at, LocalTokenNotFoundError):
            status = 401
        elif isinstance(at, HfHubHTTPError) and at.response is not None:
            status = at.response.status_code
        at = at.__cause__
    if status == 401:
        return "the Hub does not know you (401); `hf auth login` with a token that may write, then push again"
    if status == 403:
        return "your token may not write there (403); take one with write access, or a name of your own"
    if status in (409, 412):
        return f"somebody else is changing it ({status}); push again in a moment"
    if status == 404:
        return "the Hub has no such owner, repository or branch (404), or hides it; check the name and your token"
    return (
        f"the upload was interrupted ({_line(root)}); check the network and push again: "
        "files that have arrived are not sent twice"
    )


def _line(error: BaseException) -> str:
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    return re.sub(r"\?\S+", "", first)[
        :120
    ]  # what follows the question mark of an upload's address may be secret
