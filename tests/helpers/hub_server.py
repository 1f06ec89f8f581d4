"""A Hugging Face Hub on the loopback interface, small enough to read, for tests that push and pull for real.

It answers the requests that `huggingface_hub` and `datasets` make to create a repository of a model or a dataset, to
upload to it (regular files and LFS files) and to download from it. Anything else gets a 501 that names the request, so
that a test never passes on an answer nobody wrote.
"""

import base64
import hashlib
import json
import os
import re
import socket
import textwrap
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from subprocess import CompletedProcess, TimeoutExpired
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

from helpers.hub_store import HubError, HubStore
from helpers.processes import run_python

HUB_USER = "hub-user"
LARGE_FILE_BYTES = 10 * 1024 * 1024
SUBPROCESS_TIMEOUT_SECONDS = 300
GITATTRIBUTES = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"

NAME = r"[\w-][\w.-]*"
REPO = rf"(?P<repo>(?:{NAME}/)?{NAME})"
KIND = "(?:models|datasets)"  # one store holds both, so no two may have the same id
REVISION = r"(?P<revision>[^/]+)"  # the client quotes the slashes of a revision
ROUTES: list[tuple[str, str, str]] = [
    ("GET", r"/api/whoami-v2", "whoami"),
    ("POST", r"/api/repos/create", "create_repo"),
    ("POST", r"/api/validate-yaml", "validate_yaml"),
    ("POST", rf"/api/{KIND}/{REPO}/preupload/{REVISION}", "preupload"),
    ("POST", rf"/(?:datasets/)?{REPO}\.git/info/lfs/objects/batch", "lfs_batch"),
    ("PUT", r"/lfs/(?P<sha256>[0-9a-f]{64})", "lfs_upload"),
    ("POST", r"/lfs/(?P<sha256>[0-9a-f]{64})/verify", "lfs_verify"),
    ("POST", rf"/api/{KIND}/{REPO}/commit/{REVISION}", "commit"),
    ("POST", rf"/api/{KIND}/{REPO}/branch/{REVISION}", "create_branch"),
    ("GET", rf"/api/{KIND}/{REPO}(?:/revision/{REVISION})?", "model_info"),
    ("POST", rf"/api/{KIND}/{REPO}/paths-info/{REVISION}", "paths_info"),
    ("GET", rf"/api/{KIND}/{REPO}/tree/{REVISION}(?:/(?P<path>.+))?", "tree"),
    ("GET", rf"/(?:datasets/)?{REPO}/resolve/{REVISION}/(?P<path>.+)", "resolve"),
]


@dataclass
class Fault:
    """What the Hub does in place of answering a request: drop the connection, answer with an error, or stall.

    Args:
        request (`str`): regular expression of method and path, such as `"POST .*/commit/"`.
        status (`int`, *optional*): status of the answer; `None` drops the connection.
        times (`int`): so many requests; later ones are answered.
        is_late (`bool`): whether the request is carried out before.
        stalled (`threading.Event`, *optional*): set when a request comes, which is then never answered.
    """

    request: str
    status: int | None = None
    times: int = 10**6
    is_late: bool = False
    stalled: threading.Event | None = None


class HubHandler(BaseHTTPRequestHandler):
    """One method per row of `ROUTES`; each takes the groups of its pattern and returns a JSON answer or bytes."""

    protocol_version = "HTTP/1.1"  # the client keeps its connections open
    store: HubStore
    endpoint: str
    faults: list[Fault]
    requests: list[str]

    def handle_request(self) -> None:
        """Route a request, and answer every error with a JSON message the client puts into its exception."""
        # Always read: what is left of a body would be taken for the next request on this connection.
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.status, self.answer_headers = 200, {"Content-Type": "application/json"}
        request = f"{self.command} {self.path}"
        self.requests.append(request)
        fault = next((own for own in self.faults if own.times > 0 and re.match(own.request, request)), None)
        if fault is not None:
            fault.times -= 1
            if fault.is_late:
                self.route(self.command)
            if fault.stalled is not None:
                fault.stalled.set()
                threading.Event().wait(SUBPROCESS_TIMEOUT_SECONDS)
            if fault.status is None:
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)
                return
        try:
            if fault is not None:
                raise HubError(fault.status, f"fault {fault.status}")
            answer = self.route("GET" if self.command == "HEAD" else self.command)
        except HubError as error:
            self.status, answer = error.status, {"error": str(error)}
            self.answer_headers.update(error.headers)
        except (KeyError, TypeError, ValueError) as error:
            self.status, answer = 400, {"error": f"Malformed {self.command} {self.path}: {error!r}"}
        content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(self.status)
        for name, value in {**self.answer_headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_request

    def route(self, method: str) -> Any:
        """Call the method of the one matching row of `ROUTES`."""
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        # A chunked body was not read, and may not pass for an empty one.
        if "Transfer-Encoding" not in self.headers:
            for route_method, pattern, name in ROUTES:
                match = re.fullmatch(pattern, url.path)
                if match and route_method == method:
                    groups = {key: unquote(value) for key, value in match.groupdict().items() if value is not None}
                    return getattr(self, name)(**groups)
        self.close_connection = True
        raise HubError(501, f"The local Hub does not answer {self.command} {self.path}")

    def json_body(self) -> dict[str, Any]:
        return json.loads(self.body)

    def require_token(self) -> None:
        """Any token will do, but the real Hub takes no write without one."""
        if not self.headers.get("Authorization", "").startswith("Bearer "):
            raise HubError(401, "Invalid username or password.")

    def whoami(self) -> dict[str, Any]:
        self.require_token()
        token = {"displayName": "local", "role": "write"}
        user = {"type": "user", "id": HUB_USER, "name": HUB_USER, "fullname": HUB_USER, "orgs": []}
        return {**user, "auth": {"type": "access_token", "accessToken": token}}

    def create_repo(self) -> dict[str, Any]:
        self.require_token()
        request = self.json_body()
        repo = f"{request.get('organization') or HUB_USER}/{request['name']}"
        if request.get("type") not in (None, "model", "dataset") or not re.fullmatch(f"{NAME}/{NAME}", repo):
            raise HubError(501, f"The local Hub cannot create {request.get('type')} {repo}: it holds none")
        answer = {"url": f"{self.endpoint}/{repo}", "name": repo, "id": repo}
        with self.store.lock:
            if (self.store.repos / repo).exists():
                self.status = 409
                return {**answer, "error": "You already created this model repo"}
            # The real Hub starts every repository with this file, so tests of what a repository holds must expect it.
            files = {".gitattributes": self.store.file_entry(self.store.add_object(GITATTRIBUTES), lfs=False)}
            first = {"parent": None, "title": "initial commit", "description": "", "files": files}
            self.store.write_commit(repo, request.get("visibility") == "private", first)
        return answer

    def validate_yaml(self) -> dict[str, Any]:
        """Check that a card starts with a YAML mapping; the real Hub also checks its fields."""
        match = re.match(r"---\s*?\n(.*?)\n---\s*?(\n|$)", self.json_body()["content"], re.DOTALL)
        if match is None:
            return {"errors": [], "warnings": [{"message": "empty or missing yaml metadata in repo card"}]}
        try:
            valid, message = isinstance(yaml.safe_load(match[1]), dict), "the metadata must be a mapping"
        except yaml.YAMLError as error:
            valid, message = False, str(error)
        self.status = 200 if valid else 400
        return {"errors": [] if valid else [{"message": message}], "warnings": []}

    def preupload(self, repo: str, revision: str) -> dict[str, Any]:
        """Binary or large files go to LFS; the `oid` of a file already there lets the client skip it if unchanged."""
        self.require_token()
        known = self.store.files(repo, revision)[1]
        answers = []
        for file in self.json_body()["files"]:
            lfs = b"\0" in base64.b64decode(file["sample"]) or file["size"] > LARGE_FILE_BYTES
            answer = {"path": file["path"], "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False}
            if entry := known.get(file["path"]):
                answer["oid"] = entry["etag"]
            answers.append(answer)
        return {"files": answers}

    def lfs_batch(self, repo: str) -> dict[str, Any]:
        self.require_token()
        self.store.state(repo)
        objects = []
        for wanted in self.json_body()["objects"]:
            answer = {"oid": wanted["oid"], "size": wanted["size"]}
            if not self.store.has_object(wanted["oid"]):
                href = f"{self.endpoint}/lfs/{wanted['oid']}"
                answer["actions"] = {"upload": {"href": href}, "verify": {"href": f"{href}/verify"}}
            objects.append(answer)
        return {"transfer": "basic", "objects": objects}

    def lfs_upload(self, sha256: str) -> dict[str, Any]:
        """Take the bytes of an LFS file; without a token, as the real Hub hands out signed addresses for this."""
        with self.store.lock:
            if self.store.add_object(self.body) != sha256:
                raise HubError(400, f"The uploaded bytes do not have the sha256 {sha256}")
        return {}

    def lfs_verify(self, sha256: str) -> dict[str, Any]:
        if not self.store.has_object(sha256):
            raise HubError(404, f"LFS object {sha256} was not uploaded")
        return {}

    def commit(self, repo: str, revision: str) -> dict[str, Any]:
        self.require_token()
        lines = [json.loads(line) for line in self.body.splitlines()]
        header = next(line["value"] for line in lines if line["key"] == "header")
        with self.store.lock:
            parent, files = self.store.files(repo, revision)
            heads = self.store.state(repo)["heads"]
            if revision not in heads:
                raise HubError(404, f"Expected a commit to a branch, got {revision}", "RevisionNotFound")
            head = f"refs/pr/{len(heads)}" if "create_pr" in self.query else revision
            if header.get("parentCommit", parent) != parent:
                raise HubError(412, "A commit has happened since. Please refresh and try again.")
            for line in lines:
                self.store.apply(files, line["key"], line["value"])
            commit = {"parent": parent, "title": header["summary"], "description": header["description"]}
            private = self.store.state(repo)["private"]
            sha = self.store.write_commit(repo, private, {**commit, "files": files}, head)
        answer = {"success": True, "commitOid": sha, "commitUrl": f"{self.endpoint}/{repo}/commit/{sha}"}
        number = head.removeprefix("refs/pr/")
        return answer | {"pullRequestUrl": f"{self.endpoint}/{repo}/discussions/{number}"} if number != head else answer

    def create_branch(self, repo: str, revision: str) -> dict[str, Any]:
        """A branch at the head of main; the real Hub keeps references such as `refs/pr/1` to itself, too."""
        self.require_token()
        with self.store.lock:
            state = self.store.state(repo)
            if revision.startswith("refs/"):
                raise HubError(400, f"Invalid reference for a branch: {revision}")
            if revision in state["heads"]:
                raise HubError(409, f"Reference already exists: {revision}")
            self.store.set_head(repo, revision, state["heads"]["main"], state["private"])
        return {}

    def model_info(self, repo: str, revision: str = "main") -> dict[str, Any]:
        sha, files = self.store.files(repo, revision)
        info = {"id": repo, "modelId": repo, "sha": sha, "private": self.store.state(repo)["private"], "tags": []}
        return {**info, "gated": False, "disabled": False, "siblings": [{"rfilename": path} for path in sorted(files)]}

    def tree(self, repo: str, revision: str, path: str = "") -> list[dict[str, Any]]:
        """List files and folders below `path`, or only its direct children unless `recursive=true`."""
        commit, files = self.store.files(repo, revision)
        prefix = f"{path}/" if path else ""
        entries: dict[str, dict[str, Any]] = {}
        for name, entry in sorted(files.items()):
            if name.startswith(prefix):
                for cut in [match.start() for match in re.finditer("/", name) if match.start() > len(prefix)]:
                    # Any stable 40 digits: nothing reads the oid of a folder.
                    oid = hashlib.sha1(name[:cut].encode()).hexdigest()
                    entries[name[:cut]] = {"type": "directory", "oid": oid, "size": 0, "path": name[:cut]}
                entries[name] = {"type": "file", "oid": entry["oid"], "size": entry["size"], "path": name}
                entries[name] |= {"lfs": entry["lfs"]} if entry["lfs"] else {}
        if path and not entries:
            raise HubError(404, f"{path} does not exist on {revision}", "EntryNotFound", commit)
        recursive = self.query.get("recursive", [""])[0].lower() == "true"
        return [entry for name, entry in entries.items() if recursive or "/" not in name.removeprefix(prefix)]

    def paths_info(self, repo: str, revision: str) -> list[dict[str, Any]]:
        """The entries of the paths that are asked for, and that there are."""
        wanted = self.json_body()["paths"] if self.body[:1] == b"{" else parse_qs(self.body.decode())["paths"]
        self.query = {"recursive": ["true"]}
        return [entry for entry in self.tree(repo, revision) if entry["path"] in wanted]

    def resolve(self, repo: str, revision: str, path: str) -> bytes:
        """Return the bytes of a file; LFS files come from here too, as the client refuses a redirect to this host."""
        commit, files = self.store.files(repo, revision)
        if path not in files:
            raise HubError(404, f"{path} does not exist on {revision}", "EntryNotFound", commit)
        entry = files[path]
        headers = {"X-Repo-Commit": commit, "ETag": f'"{entry["etag"]}"'}
        if entry["lfs"]:
            headers |= {"X-Linked-ETag": headers["ETag"], "X-Linked-Size": str(entry["size"])}
        self.answer_headers = {"Content-Type": "application/octet-stream", **headers}
        return self.store.read_object(entry["sha256"])

    def log_message(self, format: str, *args: Any) -> None:
        """Keep the test output free of one line per request."""


@contextmanager
def local_hub(storage_dir: Path, faults: list[Fault] | None = None, requests: list[str] | None = None) -> Iterator[str]:
    """Serve a Hub from `storage_dir` while the `with` block runs; a later server on the same folder continues it.

    Args:
        storage_dir (`Path`):
            Folder of the repositories and files. Made if missing.
        faults (`list[Fault]`, *optional*):
            What goes wrong; may change while the server runs.
        requests (`list[str]`, *optional*):
            Gets method and path of every request.

    Yields:
        `str`: the endpoint, to be set as `HF_ENDPOINT`.

    Example:
    ```python
    with local_hub(tmp_path / "hub") as endpoint:
        run_against_hub("from huggingface_hub import create_repo; create_repo('m')", endpoint, tmp_path / "home")
    ```
    """
    own = {"store": HubStore(Path(storage_dir)), "faults": [] if faults is None else faults}
    handler = type("BoundHubHandler", (HubHandler,), {**own, "requests": [] if requests is None else requests})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    endpoint = handler.endpoint = f"http://127.0.0.1:{server.server_port}"
    # shutdown() waits for the poll interval, whose default of half a second every test would pay.
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield endpoint
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def hub_environment(endpoint: str, home: Path) -> dict[str, str]:
    """Environment variables of a process whose Hub is `endpoint`, with the cache in `home`, which is made."""
    home.mkdir(parents=True, exist_ok=True)
    # Cache folders, offline switches, tokens and proxies of the caller must not leak in.
    foreign = re.compile(r"(HF_|HUGGING_?FACE_|TRANSFORMERS_).*|.*_PROXY", re.IGNORECASE)
    environment = {name: value for name, value in os.environ.items() if not foreign.fullmatch(name)}
    environment |= {"HF_ENDPOINT": endpoint, "HF_TOKEN": "hf_local", "HF_HOME": str(home), "HF_HUB_OFFLINE": "0"}
    return environment | {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1"}


def run_against_hub(code: str, endpoint: str, home: Path, variables: dict[str, str] | None = None) -> CompletedProcess:
    """Run Python `code` in a new process whose Hub is `endpoint`.

    A new process, because `huggingface_hub` reads its settings once, when it is imported.

    Args:
        code (`str`):
            Python source; common indentation is removed.
        endpoint (`str`):
            What `local_hub` yielded.
        home (`Path`):
            Becomes `HF_HOME` and the working directory. Made if missing. A second `home` has an empty cache, so it
            sees what another machine would see.
        variables (`dict[str, str]`, *optional*):
            Further environment variables.

    Returns:
        `subprocess.CompletedProcess`: with `stdout` and `stderr` as text.

    Raises:
        `AssertionError`: if the code fails or takes too long, with its stdout and stderr.
    """
    home = Path(home).resolve()
    environment = hub_environment(endpoint, home) | (variables or {})
    options: dict[str, Any] = {"environment": environment, "folder": home, "timeout": SUBPROCESS_TIMEOUT_SECONDS}
    try:
        done = run_python(textwrap.dedent(code), **options)
        reason = f"exit status {done.returncode}" if done.returncode else None
    except TimeoutExpired as error:
        done, reason = error, "timed out"
    if reason:
        output = f"--- stdout\n{done.stdout}\n--- stderr\n{done.stderr}"
        raise AssertionError(f"Code run against the Hub failed: {reason}\n{output}")
    return done
