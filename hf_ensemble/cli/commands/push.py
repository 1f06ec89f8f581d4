"""`hf-ensemble push`: what a run has made to the Hub."""

from collections.abc import Sequence
from typing import Any

from ...publish import push_run_to_hub
from ..arguments import needed
from ..parsing import parse
from ..saved_arguments import PushArguments
from ..tables import console


def main(argv: Sequence[str]) -> dict[str, Any]:
    """Upload the ensemble, or the selection's adapter, with its card.

    Returns:
        `dict`: the repository's and the commit's address.

    Raises:
        `HfEnsembleError`: for bad arguments, and a run without an ensemble.
    """
    (arguments,), _ = parse([PushArguments], argv, command="push")
    needed("push", run=arguments.run, repo_id=arguments.repo_id)
    commit = push_run_to_hub(
        arguments.run,
        arguments.repo_id,
        private=arguments.private,
        revision=arguments.revision,
        commit_message=arguments.commit_message,
    )
    console().print(f"Uploaded: {commit.repo_url}\nCommit: {commit.commit_url}", soft_wrap=True)
    return {"repository": str(commit.repo_url), "commit": str(commit.commit_url)}
