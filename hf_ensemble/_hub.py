"""Uploading a folder to the Hub as one commit."""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RevisionNotFoundError,
)
from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_exponential

from ._cards import CARD
from .errors import CardError, PushError
from .logging import get_logger

logger = get_logger(__name__)

_NUM_TRIES = 4
# The Hub's answers that may be others a moment later: busy, out of order, or another commit came between.
_PASSING = (408, 409, 412, 425, 429, 500, 502, 503, 504)
# Those of them that say that nothing was done.
_UNDONE = (409, 412, 425, 429)
# A file that the Hub has and that cannot be had is a dropped connection to huggingface_hub.
_DROPPED = (HTTPError, LocalEntryNotFoundError, ConnectionError, TimeoutError)
_REFUSALS = (HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled, *_DROPPED)


@dataclass(frozen=True)
class Repository:
    """Where to push to, and how.

    Args:
        repo_id (`str`): repository; created where it does not exist.
        token (`str`, *optional*): Hub token.
        private (`bool`, *optional*): of a new repository.
        commit_message (`str`, *optional*): of the commit.
        commit_description (`str`, *optional*): of the commit.
        revision (`str`, *optional*):
            Branch to commit to, created where it does not exist; or `refs/pr/N`, a pull request that is open.
        create_pr (`bool`, *optional*, defaults to `False`):
            Whether to open a pull request instead, against `revision` where that is given; a branch is not created.

    Raises:
        `PushError`: for a pull request against a pull request.
    """

    repo_id: str
    token: str | None = None
    private: bool | None = None
    commit_message: str | None = None
    commit_description: str | None = None
    revision: str | None = None
    create_pr: bool = False

    def __post_init__(self):
        if self.create_pr and self.is_pull_request:
            raise PushError(
                f"create_pr=True opens another pull request, found the revision {self.revision!r}, which is one. Leave "
                "one of the two out."
            )

    @property
    def is_pull_request(self) -> bool:
        """Whether the revision is a pull request, which commits are added to."""
        return (self.revision or "").startswith("refs/pr/")


def push_folder(
    repository: Repository,
    folder: Path,
    replaced: Collection[str] = (),
    card: Callable[[str | None], str | None] | None = None,
    again: str = "push again",
) -> CommitInfo:
    """Upload a folder, and delete what it replaces, in one commit.

    Connections that drop and errors of the Hub are tried again, but for a pull request that may have been opened. A
    push that was interrupted leaves the repository as it was; the next one uploads what is lacking.

    Args:
        repository (`Repository`): where to push to.
        folder (`Path`): its files.
        replaced (`Collection[str]`): patterns of files of the repository that are deleted unless the folder has them.
        card (`Callable`, *optional*):
            Makes the card from the repository's, `None` where it has none; a card that cannot be made stays as it is.
        again (`str`): how to push again, for messages.

    Raises:
        `PushError`: where the Hub refuses, or cannot be reached.
    """
    api = HfApi(token=repository.token)
    retrying = Retrying(
        retry=retry_if_exception(_may_pass),
        stop=stop_after_attempt(_NUM_TRIES),
        wait=wait_exponential(max=8),
        reraise=True,
    )
    try:
        repo_id = retrying(api.create_repo, repository.repo_id, private=repository.private, exist_ok=True).repo_id
        if repository.revision is not None and not (repository.create_pr or repository.is_pull_request):
            retrying(api.create_branch, repo_id, branch=repository.revision, exist_ok=True)
        return retrying(_commit, api, repo_id, repository, folder, replaced, card)
    except Exception as error:
        refusal = _refusal(error)
        if refusal is None:
            raise
        raise PushError(f"{repository.repo_id!r} was not updated: {_reason(refusal, again)}") from error


def _commit(
    api: HfApi,
    repo_id: str,
    repository: Repository,
    folder: Path,
    replaced: Collection[str],
    card: Callable[[str | None], str | None] | None,
) -> CommitInfo:
    """Commit against the repository as it is now."""
    revision = repository.revision
    head = api.repo_info(repo_id, revision=revision).sha
    found = api.list_repo_files(repo_id, revision=head)
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    content: dict[str, bytes | Path] = dict(sorted(files.items()))
    existing = Path(api.hf_hub_download(repo_id, CARD, revision=head)).read_bytes() if CARD in found else None
    text = None if card is None else _made_card(existing, repo_id, card)
    if text is not None:
        content[CARD] = text.encode()
    elif card is not None and existing is not None:
        content.pop(CARD, None)
    gone = [name for name in found if name not in content and any(fnmatch(name, pattern) for pattern in replaced)]
    operations = [
        *(CommitOperationDelete(name) for name in gone),
        *(CommitOperationAdd(name, own) for name, own in content.items()),
    ]
    options = {
        "commit_message": repository.commit_message or "Upload with hf_ensemble",
        "commit_description": repository.commit_description,
        "revision": revision,
        "create_pr": repository.create_pr,
        # A commit that came between is answered with 412, and this one is made anew.
        "parent_commit": head,
    }
    try:
        return api.create_commit(repo_id, operations, **options)
    except ValueError as error:
        if "Invalid metadata in README.md" not in str(error) or CARD not in content:
            raise
        logger.warning("The card was not uploaded, since the Hub refuses its metadata: %s", _one_line(error))
        kept = [own for own in operations if own.path_in_repo != CARD]
        return api.create_commit(repo_id, kept, **options)


def _made_card(existing: bytes | None, repo_id: str, card: Callable[[str | None], str | None]) -> str | None:
    try:
        return card(None if existing is None else existing.decode())
    except UnicodeDecodeError:
        logger.warning("The card of %r was left as it is: it is not UTF-8 text.", repo_id)
    except CardError as error:
        logger.warning("The card of %r was left as it is: %s", repo_id, error)
    return None


def _status(error: BaseException) -> int | None:
    return error.response.status_code if isinstance(error, HfHubHTTPError) and error.response is not None else None


def _refusal(error: BaseException | None) -> BaseException | None:
    """What the Hub or the connection has said, also where uploads of single files wrap it in errors of their own."""
    while error is not None and not isinstance(error, _REFUSALS):
        error = error.__cause__
    return error


def _may_pass(error: BaseException) -> bool:
    refusal = _refusal(error)
    if refusal is None or isinstance(refusal, OfflineModeIsEnabled):
        return False
    status = _status(refusal)
    passes = isinstance(refusal, _DROPPED) if status is None else status in _PASSING
    return passes and not _may_have_opened(refusal)


def _may_have_opened(error: BaseException) -> bool:
    """Whether a pull request may be open, whose answer was lost: another try would open a second one."""
    try:
        # An error with an answer forgets its own request (huggingface_hub 2.4).
        url = (getattr(error, "response", None) or error).request.url
    except (AttributeError, RuntimeError):  # an error without a request, or one that was never sent
        return False
    return "/commit/" in url.path and b"create_pr" in url.query and _status(error) not in _UNDONE


def _reason(error: BaseException, again: str) -> str:
    """Why the Hub was not updated, and how to go on, in one line."""
    status = _status(error)
    said = _one_line(getattr(error, "server_message", None) or error)
    if isinstance(error, HFValidationError):
        return f"{said} Choose another repo_id."
    if isinstance(error, OfflineModeIsEnabled):
        return f"HF_HUB_OFFLINE is set. Unset it, and call {again}."
    if status == 401 or isinstance(error, LocalTokenNotFoundError):
        return f"the Hub knows no such token (401). Log in with 'hf auth login' or pass token=, and call {again}."
    if status == 403:
        return (
            f"the token may not write there (403: {said}). Pass a token with write access or another repo_id, and "
            f"call {again}."
        )
    if isinstance(error, RevisionNotFoundError) or status == 404:
        return f"the Hub does not find it (404: {said}). Check repo_id and revision, and call {again}."
    if status in (409, 412):
        return f"others were committing to it at the same time ({status}: {said}). Call {again} when they are done."
    answered = "the connection dropped" if status is None else f"the Hub answered {status}"
    if _may_have_opened(error) and (status is None or status in _PASSING):
        return (
            f"{answered} when the pull request was to be opened ({said}). Look whether it is there before you call "
            f"{again}."
        )
    if _may_pass(error):
        return (
            f"{answered} in each of {_NUM_TRIES} tries ({said}). Uploaded files are kept; to go on from there, call "
            f"{again}."
        )
    return f"{said} Then call {again}."


def _one_line(value: object) -> str:
    line = " ".join(str(value).split())
    return line if len(line) <= 240 else f"{line[:239]}…"
