"""What the local Hub keeps: repositories, commits and file contents.

Storage is content-addressed and kept on disk, therefore every commit stays readable:

    <storage_dir>/objects/<sha256>                          the bytes of a file, regular or LFS
    <storage_dir>/repos/<namespace>/<name>/repo.json        {"private": ..., "heads": {<branch>: <commit sha>}}
    <storage_dir>/repos/<namespace>/<name>/<commit>.json    {"parent", "title", "description", "files": {path: entry}}
"""

import base64
import hashlib
import json
import re
import threading
from pathlib import Path
from typing import Any

LFS_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n"


class HubError(Exception):
    """An answer other than success; `code` is the `X-Error-Code` the client turns into an exception type."""

    def __init__(self, status: int, message: str, code: str | None = None, commit: str | None = None) -> None:
        super().__init__(message)
        headers = {"X-Error-Code": code, "X-Repo-Commit": commit}
        self.status, self.headers = status, {name: value for name, value in headers.items() if value}


class HubStore:
    """Repositories, commits and file contents under `storage_dir`; knows nothing of HTTP."""

    def __init__(self, storage_dir: Path) -> None:
        self.objects, self.repos = storage_dir / "objects", storage_dir / "repos"
        self.objects.mkdir(parents=True, exist_ok=True)
        self.lock = threading.Lock()  # the client uploads from several threads

    def add_object(self, content: bytes) -> str:
        """Store `content` under its sha256, and return that."""
        sha256 = hashlib.sha256(content).hexdigest()
        (self.objects / sha256).write_bytes(content)
        return sha256

    def has_object(self, sha256: str) -> bool:
        """Say whether the object is stored; the name comes from the client and must not leave the folder."""
        return re.fullmatch(r"[0-9a-f]{64}", sha256) is not None and (self.objects / sha256).is_file()

    def read_object(self, sha256: str) -> bytes:
        return (self.objects / sha256).read_bytes()

    def file_entry(self, sha256: str, lfs: bool) -> dict[str, Any]:
        """Describe a stored object the way git would: the `oid` of an LFS file is that of its pointer."""
        content = self.read_object(sha256)
        blob = LFS_POINTER.format(sha256=sha256, size=len(content)).encode() if lfs else content
        oid = hashlib.sha1(b"blob %d\0" % len(blob) + blob).hexdigest()
        # The client compares a file with `etag` to see whether it changed.
        entry = {"oid": oid, "sha256": sha256, "size": len(content), "etag": sha256 if lfs else oid}
        return {**entry, "lfs": {"oid": sha256, "size": len(content), "pointerSize": len(blob)} if lfs else None}

    def apply(self, files: dict[str, dict[str, Any]], operation: str, value: dict[str, Any]) -> None:
        """Apply one line of a commit to `files`, in place."""
        path = value.get("path", "")
        if operation == "file":
            files[path] = self.file_entry(self.add_object(base64.b64decode(value["content"])), lfs=False)
        elif operation == "lfsFile":
            if not self.has_object(value["oid"]):
                raise HubError(400, f"LFS object {value['oid']} of {path} was not uploaded")
            files[path] = self.file_entry(value["oid"], lfs=True)
        elif operation in ("deletedFile", "deletedFolder"):
            folder = path.rstrip("/") + "/"
            gone = [name for name in files if (name == path if operation == "deletedFile" else name.startswith(folder))]
            if not gone:
                raise HubError(404, f"{path}: A file with this name doesn't exist", "EntryNotFound")
            for name in gone:
                del files[name]
        elif operation != "header":
            raise HubError(501, f"The local Hub does not know the commit operation {operation}")

    def state(self, repo: str) -> dict[str, Any]:
        """Return `repo.json`; raises `HubError` where there is no such repository."""
        path = self.repos / repo / "repo.json"
        if not path.is_file():
            raise HubError(404, f"Repository {repo} not found", "RepoNotFound")
        return json.loads(path.read_text())

    def files(self, repo: str, revision: str) -> tuple[str, dict[str, dict[str, Any]]]:
        """Resolve `revision` (a branch, a pull request or a full commit sha) to its commit sha and its files."""
        commit = self.state(repo)["heads"].get(revision, revision)
        path = self.repos / repo / f"{commit}.json"
        if not re.fullmatch(r"[0-9a-f]{40}", commit) or not path.is_file():
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit, json.loads(path.read_text())["files"]

    def write_commit(self, repo: str, private: bool, commit: dict[str, Any], head: str = "main") -> str:
        """Save `commit` as the new head of a branch or pull request; its sha covers its parent, so no two collide."""
        folder = self.repos / repo
        folder.mkdir(parents=True, exist_ok=True)
        content = json.dumps(commit, sort_keys=True)
        sha = hashlib.sha1(content.encode()).hexdigest()
        (folder / f"{sha}.json").write_text(content)
        self.set_head(repo, head, sha, private)
        return sha

    def set_head(self, repo: str, head: str, sha: str, private: bool) -> None:
        """Have a branch or pull request stand at a commit."""
        path = self.repos / repo / "repo.json"
        heads = self.state(repo)["heads"] if path.is_file() else {}
        path.write_text(json.dumps({"private": private, "heads": {**heads, head: sha}}))
