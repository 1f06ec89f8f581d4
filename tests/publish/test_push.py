"""Pushing over real HTTP: what is uploaded, what goes, and what happens when the Hub or the connection fails."""

import json
import textwrap
import threading

import pytest
import torch
from huggingface_hub import HfApi, constants

from helpers import toy
from helpers.ensembles import randomize_adapters
from helpers.hub_server import Fault, HubStore, hub_environment, local_hub
from helpers.processes import PythonProcess
from hf_ensemble import PeftEnsembleModel
from hf_ensemble._cards import CARD, own_text, split_card
from hf_ensemble._hub import Repository, push_folder
from hf_ensemble.ensemble import PromptRouter
from hf_ensemble.ensemble.saving.pushing import push_ensemble
from hf_ensemble.errors import EnsembleError, PushError

REPOSITORY = "hub-user/pushed"
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return toy.save_model(toy.llama(num_hidden_layers=1), tmp_path_factory.mktemp("push") / "base")


@pytest.fixture
def ensemble(base):
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), toy.lora(r=2), adapter_name="a")
    model.add_adapter("b", toy.lora(r=2))
    randomize_adapters(model, ["a", "b"])
    return PeftEnsembleModel(model, ["a", "b"], {"sums": {"a": 1.0}, "diffs": {"b": 1.0}})


class Hub:
    """A Hub that this process pushes to."""

    def __init__(self, folder):
        self.folder, self.faults, self.requests = folder, [], []

    def files(self, revision="main"):
        return HubStore(self.folder).files(REPOSITORY, revision)[1]

    def text(self, name):
        store = HubStore(self.folder)
        return store.read_object(self.files()[name]["sha256"]).decode()

    def num_commits(self):
        return sum("/commit/" in request for request in self.requests)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    own = Hub(tmp_path / "hub")
    with local_hub(own.folder, own.faults, own.requests) as endpoint:
        own.endpoint = endpoint
        for module in ("constants", "hf_api", "file_download", "lfs", "_commit_api"):
            for name in ("ENDPOINT", "_HF_DEFAULT_ENDPOINT"):
                monkeypatch.setattr(f"huggingface_hub.{module}.{name}", endpoint, raising=False)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("HF_TOKEN", "hf_local")
        # Waiting between tries is the library's; here it takes no time.
        monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
        monkeypatch.setattr("tenacity.nap.time.sleep", lambda seconds: None)
        yield own


def test_a_push_replaces_what_was_pushed_before_in_one_commit(hub, ensemble, tmp_path, caplog):
    ensemble.push_to_hub(REPOSITORY, tags="mine", commit_message="First")
    expected = {f"adapters/{name}/{file}" for name in "ab" for file in ADAPTER_FILES}
    assert set(hub.files()) == {".gitattributes", CARD, "ensemble_config.json", *expected}
    assert json.loads(hub.text("ensemble_config.json"))["base_model"]["name_or_path"] == ""
    assert "is the local folder" in caplog.text
    card = hub.text(CARD)
    assert f'from_pretrained("{REPOSITORY}", base_model=base_model)' in card
    assert {"hf-ensemble", "mine"} <= set(split_card(card)[0]["tags"])
    # Written by hand on the Hub, beside files and pictures of its owner's.
    card = "---\nlicense: mit\n---\n\n# Mine\n\n" + split_card(card)[1]
    (tmp_path / "own" / "assets").mkdir(parents=True)
    for name in (CARD, "notes.txt", "assets/logo.png", "assets/affinity.png"):
        (tmp_path / "own" / name).write_text(card if name == CARD else "own")
    push_folder(Repository(REPOSITORY), tmp_path / "own")
    assert {"notes.txt", "assets/affinity.png"} <= set(hub.files())

    smaller = PeftEnsembleModel(ensemble.model, ["b"], {"diffs": {"b": 1.0}})
    before = hub.num_commits()
    smaller.save_pretrained(tmp_path / "pushed", push_to_hub=True, repo_id=REPOSITORY)
    assert hub.num_commits() == before + 1
    kept = {f"adapters/b/{file}" for file in ADAPTER_FILES}
    assert set(hub.files()) == {".gitattributes", CARD, "ensemble_config.json", "notes.txt", "assets/logo.png", *kept}
    metadata, _ = split_card(hub.text(CARD))
    assert own_text(hub.text(CARD)) == "# Mine" and metadata["license"] == "mit"
    assert "# Ensemble of 1 adapter\n" in hub.text(CARD) and "| b | -" in hub.text(CARD)
    # Nothing has changed: no further commit.
    smaller.push_to_hub(REPOSITORY)
    assert hub.num_commits() == before + 1


def test_a_merged_adapter_is_pushed_with_its_card(hub, ensemble):
    ensemble.merge("sums").push_to_hub(REPOSITORY)
    assert set(hub.files()) == {".gitattributes", CARD, *ADAPTER_FILES}
    metadata, text = split_card(hub.text(CARD))
    assert metadata["library_name"] == "peft" and "merge" in metadata["tags"]
    assert f'PeftModel.from_pretrained(base, "{REPOSITORY}")' in text


COMMIT, CREATE, LFS = "POST .*/commit/", "POST /api/repos/create", "PUT /lfs/"


def test_an_adapter_takes_an_ensembles_place_and_an_ensemble_an_adapters(hub, ensemble):
    beside = {".gitattributes", CARD}
    ensemble.push_to_hub(REPOSITORY)
    made = set(hub.files())
    for _ in range(2):
        ensemble.merge("sums").push_to_hub(REPOSITORY)
        assert set(hub.files()) == {*beside, *ADAPTER_FILES}
        ensemble.push_to_hub(REPOSITORY)
        assert set(hub.files()) == made


def test_an_authors_files_beside_the_adapters_stay(hub, ensemble):
    ensemble.push_to_hub(REPOSITORY)
    for name in ("adapters/a/README.md", "adapters/NOTES.md"):
        HfApi().upload_file(path_or_fileobj=b"mine", path_in_repo=name, repo_id=REPOSITORY)
    one = PeftEnsembleModel(ensemble.model, ["b"], {"sums": {"b": 1.0}})
    one.push_to_hub(REPOSITORY)
    found = set(hub.files())
    assert {"adapters/a/README.md", "adapters/NOTES.md"} <= found
    assert not {f"adapters/a/{name}" for name in ADAPTER_FILES} & found


def test_a_router_comes_and_goes_with_the_ensemble_that_has_it(hub, ensemble):
    plain = PeftEnsembleModel(ensemble.model, ["a", "b"])
    tensors = {"mean": torch.zeros(4), "matrix": torch.ones(4, 3), "bias": torch.zeros(3), "mixtures": torch.ones(3, 2)}
    ensemble.router = PromptRouter(**{**tensors, "mixtures": tensors["mixtures"] / 2})
    for other in (plain, ensemble.merge("sums")):
        ensemble.push_to_hub(REPOSITORY)
        loaded = PeftEnsembleModel.from_pretrained(REPOSITORY, base_model=toy.llama(num_hidden_layers=1))
        assert all(torch.equal(own, ensemble.router.tensors()[name]) for name, own in loaded.router.tensors().items())
        other.push_to_hub(REPOSITORY)
        assert "router.safetensors" not in hub.files()


def test_named_chat_templates_are_pushed(hub, ensemble, tmp_path):
    """Which lie in a folder of their own."""
    tokenizer = toy.tokenizer()
    tokenizer.chat_template = {"default": "{{ messages[0] }}", "tools": "{{ tools }}"}
    ensemble.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    push_ensemble(tmp_path / "saved", ensemble.ensemble_config(), Repository(REPOSITORY))
    assert {"chat_template.jinja", "additional_chat_templates/tools.jinja"} <= set(hub.files())


@pytest.mark.parametrize("request_", [CREATE, "GET /api/models/", "POST .*/preupload/", LFS, COMMIT])
@pytest.mark.parametrize("status", [None, 500, 503])
def test_what_fails_for_a_while_is_tried_again(hub, ensemble, request_, status):
    hub.faults.append(Fault(request_, status, times=2))
    ensemble.push_to_hub(REPOSITORY)
    assert hub.faults[0].times == 0 and "adapters/a/adapter_config.json" in hub.files()


@pytest.mark.parametrize("status", [None, 504])
def test_a_commit_whose_answer_was_lost_is_not_made_twice(hub, ensemble, status):
    hub.faults.append(Fault(COMMIT, status, times=1, is_late=True))
    ensemble.push_to_hub(REPOSITORY)
    store = HubStore(hub.folder)
    assert len(list((store.repos / REPOSITORY).glob("*.json"))) == 3  # its state, the first commit and this one


@pytest.mark.parametrize("status", [409, 412])
def test_a_commit_that_another_one_came_before_is_made_anew(hub, ensemble, status):
    hub.faults.append(Fault(COMMIT, status, times=2))
    ensemble.push_to_hub(REPOSITORY)
    assert "ensemble_config.json" in hub.files()


REFUSED = {
    "401": (CREATE, 401, r"knows no such token \(401\)\. Log in with 'hf auth login' or pass token=, and call"),
    "403": (COMMIT, 403, r"may not write there \(403: .*\)\. Pass a token with write access or another repo_id, and"),
    "403 create": (CREATE, 403, r"may not write there \(403"),
    "404": (COMMIT, 404, r"does not find it \(404: .*\)\. Check repo_id and revision, and call"),
    "409": (COMMIT, 409, r"others were committing to it at the same time \(409: .*\)\. Call .* when they are done\."),
    "500": (COMMIT, 500, r"the Hub answered 500 in each of 4 tries \(.*\)\. Uploaded files are kept; to go on from"),
    "502 files": (LFS, 502, r"the Hub answered 502 in each of 4 tries"),
    "drop": (COMMIT, None, r"the connection dropped in each of 4 tries \(.*\)\. Uploaded files are kept; to go on"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_stays_refused_is_said_in_one_line(hub, ensemble, name):
    request, status, message = REFUSED[name]
    hub.faults.append(Fault(request, status))
    with pytest.raises(PushError, match=f"^'{REPOSITORY}' was not updated: .*{message}") as raised:
        ensemble.push_to_hub(REPOSITORY)
    assert "\n" not in str(raised.value) and f"model.push_to_hub('{REPOSITORY}')" in str(raised.value)
    hub.faults.clear()
    ensemble.push_to_hub(REPOSITORY)
    assert "ensemble_config.json" in hub.files()


@pytest.mark.parametrize(
    "name", ["a/b/c", "user/", "../x", "user/a b", "user/-x", "user/x.git", "http://host/x", "x" * 200]
)
def test_a_repository_that_the_hub_would_refuse(hub, ensemble, name):
    with pytest.raises(PushError, match="was not updated: "):
        ensemble.push_to_hub(name)
    assert hub.num_commits() == 0


def test_offline_and_arguments_without_an_upload(hub, ensemble, monkeypatch, tmp_path):
    with pytest.raises(EnsembleError, match=r"\['private', 'repo_id'\] are for an upload. Set push_to_hub=True"):
        ensemble.save_pretrained(tmp_path / "saved", repo_id=REPOSITORY, private=True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(PushError, match="HF_HUB_OFFLINE is set. Unset it, and call"):
        ensemble.push_to_hub(REPOSITORY)


def test_a_card_that_cannot_be_made_or_read_stops_no_push(hub, ensemble, tmp_path, caplog, monkeypatch):
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "notes.txt").write_text("own")
    push_folder(Repository(REPOSITORY), tmp_path / "own")
    store = HubStore(hub.folder)
    files = hub.files() | {CARD: store.file_entry(store.add_object(b"\xff\xfe not text"), lfs=False)}
    store.write_commit(REPOSITORY, False, {"parent": None, "title": "by git", "description": "", "files": files})
    ensemble.push_to_hub(REPOSITORY)
    assert store.read_object(hub.files()[CARD]["sha256"]) == b"\xff\xfe not text"
    assert "was left as it is: it is not UTF-8 text" in caplog.text and "ensemble_config.json" in hub.files()
    # The Hub refuses the metadata.
    hub.faults.append(Fault("POST /api/validate-yaml", 400))
    (tmp_path / "own" / CARD).write_text("---\nlicense: none\n---\n")
    (tmp_path / "own" / "more.txt").write_text("more")
    push_folder(Repository(REPOSITORY), tmp_path / "own")
    assert "more.txt" in hub.files() and "the Hub refuses its metadata" in caplog.text


def test_branches_and_pull_requests(hub, ensemble):
    only_b = PeftEnsembleModel(ensemble.model, ["b"], {"diffs": {"b": 1.0}})
    ensemble.push_to_hub(REPOSITORY, revision="dev/one")
    on_dev = hub.files("dev/one")
    assert "adapters/a/adapter_config.json" in on_dev and set(hub.files()) == {".gitattributes"}
    # Against the branch that is given, from which the members that are lacking are deleted.
    opened = only_b.push_to_hub(REPOSITORY, revision="dev/one", create_pr=True)
    number = opened.pr_url.rpartition("/")[2]
    in_request = hub.files(f"refs/pr/{number}")
    assert hub.files("dev/one") == on_dev and set(hub.files()) == {".gitattributes"}
    assert "adapters/b/adapter_config.json" in in_request and "adapters/a/adapter_config.json" not in in_request
    # A pull request takes further commits, and is no branch that could be created.
    ensemble.merge("sums").push_to_hub(REPOSITORY, revision=f"refs/pr/{number}")
    own = {name for name in in_request if not name.startswith(("adapters/", "ensemble_config"))}
    assert set(hub.files(f"refs/pr/{number}")) == {*own, *ADAPTER_FILES} and hub.files("dev/one") == on_dev
    before = len(hub.requests)
    with pytest.raises(PushError, match=f"create_pr=True .* found the revision 'refs/pr/{number}'.*Leave one of"):
        ensemble.push_to_hub(REPOSITORY, revision=f"refs/pr/{number}", create_pr=True)
    assert len(hub.requests) == before
    with pytest.raises(PushError, match="does not find it.*Check repo_id and revision"):
        ensemble.push_to_hub(REPOSITORY, revision="no-branch", create_pr=True)
    assert only_b.push_to_hub(REPOSITORY, create_pr=True).pr_url and set(hub.files()) == {".gitattributes"}


@pytest.mark.parametrize("status", [None, 504, 412])
def test_a_pull_request_whose_answer_was_lost_is_not_opened_twice(hub, ensemble, status):
    def heads():
        return set(HubStore(hub.folder).state(REPOSITORY)["heads"])

    hub.faults.append(Fault(COMMIT, status, times=1, is_late=status != 412))
    if status == 412:
        # Nothing was done: it is tried again.
        ensemble.push_to_hub(REPOSITORY, create_pr=True)
    else:
        with pytest.raises(PushError, match="when the pull request was to be opened.*Look whether it is there before"):
            ensemble.push_to_hub(REPOSITORY, create_pr=True)
    assert heads() == {"main", "refs/pr/1"} and hub.num_commits() == (2 if status == 412 else 1)


def test_what_was_written_by_hand_beside_a_saved_ensemble_is_pushed(hub, ensemble, tmp_path):
    ensemble.save_pretrained(tmp_path / "saved")
    path = tmp_path / "saved" / CARD
    path.write_text(path.read_text().replace("---\n", "---\nlicense: mit\n", 1) + "\nBy hand.\n")
    (tmp_path / "saved" / "notes.txt").write_text("private")
    ensemble.save_pretrained(tmp_path / "saved", push_to_hub=True, repo_id=REPOSITORY, tags=["mine"])
    for card in (path.read_text(), hub.text(CARD)):
        assert own_text(card) == "By hand." and split_card(card)[0]["license"] == "mit"
    assert f'from_pretrained("{REPOSITORY}"' in hub.text(CARD) and "mine" in split_card(hub.text(CARD))[0]["tags"]
    assert "notes.txt" not in hub.files()
    # A card that cannot be read stays where it is, and stops no upload.
    path.write_bytes(b"\xff\xfe not text")
    other = "hub-user/other"
    ensemble.save_pretrained(tmp_path / "saved", push_to_hub=True, repo_id=other)
    files = HubStore(hub.folder).files(other, "main")[1]
    assert path.read_bytes() == b"\xff\xfe not text" and "ensemble_config.json" in files
    assert b"# Ensemble of 2 adapters" in HubStore(hub.folder).read_object(files[CARD]["sha256"])


KILLED = """
from hf_ensemble import PeftEnsembleModel

model = PeftEnsembleModel.from_pretrained({folder!r})
model.push_to_hub({repository!r})
"""


@pytest.mark.parametrize("request_", [LFS, COMMIT])
def test_a_push_that_was_killed_is_made_by_the_next_one(hub, ensemble, tmp_path, request_):
    """Nothing is changed until the one commit; what was uploaded is not uploaded again."""
    ensemble.push_to_hub(REPOSITORY)
    first = hub.files()
    randomize_adapters(ensemble.model, ["a", "b"], seed=5)
    ensemble.save_pretrained(tmp_path / "saved")
    hub.faults.append(Fault(request_, times=1, stalled=threading.Event()))
    code = textwrap.dedent(KILLED).format(folder=str(tmp_path / "saved"), repository=REPOSITORY)
    environment = hub_environment(hub.endpoint, tmp_path / "home")
    process = PythonProcess(code, environment=environment, folder=tmp_path)
    try:
        assert hub.faults[0].stalled.wait(120)
    finally:
        process.kill()
        process.wait()
    assert hub.files() == first
    hub.requests.clear()
    ensemble.push_to_hub(REPOSITORY)
    uploads = [request for request in hub.requests if request.startswith("PUT /lfs/")]
    assert hub.files() != first and bool(uploads) == (request_ == LFS)
