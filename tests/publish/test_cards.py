"""Cards by themselves: what is escaped, and what of an existing card stays."""

import ast
import re

import pytest
import yaml
from huggingface_hub import ModelCard, ModelCardData
from trl.trainer.utils import generate_model_card

from helpers import toy
from helpers.markdown import code_blocks, raw_html, tables
from hf_ensemble import TaskSet
from hf_ensemble._cards import (
    BEGIN,
    CARD,
    END,
    CardParts,
    joined_cards,
    own_text,
    split_card,
    update_card_file,
    updated_card,
)
from hf_ensemble.ensemble.members import BaseModelReference, EnsembleMember
from hf_ensemble.ensemble.saving.card import saved_card
from hf_ensemble.ensemble.saving.ensemble_config import SavedEnsembleConfig
from hf_ensemble.ensemble.saving.pushing import card_maker
from hf_ensemble.errors import CardError, HfEnsembleError
from hf_ensemble.evaluate import TaskScores
from hf_ensemble.publish import EnsembleCardData
from hf_ensemble.publish.card import render_ensemble
from hf_ensemble.runs import Results, RunRecord

HOSTILE = [
    "a|b",
    "a\\|b",
    "a | b | c",
    "a\nb",
    "a\r\n\r\n# b",
    "\n---\n",
    "---",
    "...",
    "a: b",
    "a: &x [*x]",
    "!!python/object:os.system",
    "{a: b}",
    "[a, b",
    "'a",
    'a"b',
    '"""',
    "# a",
    "* a",
    "*a*",
    "**a**",
    "_a_",
    "__a__",
    "~~a~~",
    "`a`",
    "```",
    "````\nprint(1)",
    "<b>a</b>",
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "</details>",
    "<!-- a -->",
    "-->",
    END,
    f"\n{END}\n{BEGIN}",
    "[a](javascript:alert(1))",
    "![a](http://host/x.png)",
    "&lt;b&gt;",
    "$a$ $$b$$",
    "{{ 7 * 7 }}",
    "{% raw %}",
    "@everyone",
    "\u202ea\u202c",
    "a\u200bb\x00\x07",
    "\\",
    "\\n",
    "ü 名 🙂",
    "x" * 300,
]


def visible(name):
    """A name as a reader can see it at all: on one line, without control characters."""
    return " ".join(re.sub("[\u202a-\u202e\u200b\x00\x07]", "", name).split())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved ensemble's adapters, as far as a card reads them."""
    folder = tmp_path_factory.mktemp("cards")
    for name in ("group_0", "group_1"):
        toy.lora(target_modules=["q_proj"]).save_pretrained(folder / "adapters" / name)
    return folder


def ensemble(name):
    members = [EnsembleMember("group_0", [name]), EnsembleMember("group_1", ["plain"])]
    weights = {name: {"group_0": 1.0}, "plain": {"group_1": 0.5, "group_0": 0.5}}
    base = BaseModelReference("user/base", None, "AutoModelForCausalLM")
    return SavedEnsembleConfig(base, members, weights, {"group_0": 1.0}, tags=[name])


def check(card, name, outside):
    metadata = split_card(card)[0]
    assert metadata["library_name"] == "hf-ensemble" and name in metadata["tags"]
    assert ModelCard(card).data.base_model == "user/base"
    rest = split_card(card)[1]
    # The two marks, the note of the metadata and the fold of the configuration.
    assert all(re.match(r"<!-- (hf_ensemble|metadata): |</?(details|summary)>", part) for part in raw_html(rest)), (
        outside
    )
    found = tables(rest)
    for table in found:
        assert len({len(row) for row in table}) == 1
    cells = {cell for table in found for row in table for cell in row}
    assert visible(name) in cells
    blocks = code_blocks(rest, "python")
    assert len(blocks) == 5
    values = {node.value for block in blocks for node in ast.walk(ast.parse(block)) if isinstance(node, ast.Constant)}
    assert name in values


@pytest.mark.parametrize("name", HOSTILE)
def test_no_name_breaks_a_card(folder, name):
    """Trainers refuse such names for tasks; an ensemble made by hand takes any, and metrics are called anything."""
    with pytest.raises(HfEnsembleError):
        TaskSet.from_datasets({name: toy.sum_rows(4), "plain": toy.sum_rows(4)})
    card = updated_card("# By hand\n", *saved_card(folder, ensemble(name), "user/ensemble"))
    check(card, name, "saved")
    assert own_text(card) == "# By hand"
    again = updated_card(card, *saved_card(folder, ensemble(name), "user/ensemble"))
    assert again == card


@pytest.mark.parametrize("name", HOSTILE)
def test_no_name_of_a_metric_breaks_a_card_of_a_run(folder, name):
    scores = {task: TaskScores(1.0, 0.5, 4, {name: 0.25}) for task in (name, "plain")}
    record = RunRecord({}, {}, {})
    data = EnsembleCardData(
        ensemble=ensemble(name),
        results=Results.of(record, "eval", {name: scores, "ensemble": scores}),
        configuration={"configuration": {name: name}},
    )
    metadata, body, _ = render_ensemble(data, folder, "user/ensemble")
    card = updated_card(None, metadata, body)
    check(card, name, "run")
    assert any(visible(name.replace("_", " ")) in cell for table in tables(body) for cell in table[0])
    assert {result.metric_type for result in ModelCard(card).data.eval_results} == {"accuracy", "loss", name}


CITATION = "```bibtex\n@misc{mine,\n}\n```\n"
METADATA = {
    "library_name": "peft",
    "base_model": "user/base",
    "tags": ["hf-ensemble", "lora"],
    "license": "mit",
    "model-index": [{"name": "ensemble", "results": [{"task": {"type": "a"}}]}],
}


def test_a_written_card_stays_beside_the_generated_part():
    by_hand = "---\nlicense: apache-2.0\ntags:\n- mine\nlanguage: de\n---\n\n# My model\n\nBe careful.\n"
    card = updated_card(by_hand, METADATA, "generated once")
    assert own_text(card) == "# My model\n\nBe careful."
    metadata = split_card(card)[0]
    assert metadata["license"] == "apache-2.0" and metadata["language"] == "de"
    assert metadata["tags"] == ["hf-ensemble", "lora", "mine"] and metadata["base_model"] == "user/base"
    # Text behind the generated part, and another body.
    card = updated_card(card + "\nThe end.\n", METADATA, "generated twice \\1 \\g<0>")
    assert own_text(card) == "# My model\n\nBe careful.\n\n\n\nThe end."
    assert "generated once" not in card and "generated twice \\1 \\g<0>" in card


def test_metadata_that_were_changed_by_hand_stay_and_others_follow():
    other = {"name": "another", "results": []}
    card = updated_card(None, {**METADATA, "datasets": ["a/old"], "pipeline_tag": "x"}, "body")
    metadata, rest = split_card(card)
    metadata |= {
        "license": "gpl-3.0",
        "datasets": ["a/old", "mine/added"],
        "model-index": [*METADATA["model-index"], other],
    }
    edited = f"---\n{yaml.safe_dump({**metadata, 'thumbnail': 'x.png'})}---\n{rest}"
    new = {
        **METADATA,
        "base_model": "user/other",
        "datasets": ["a/new"],
        "license": "bsd",
        "model-index": [{"name": "ensemble", "results": []}],
    }
    found = split_card(updated_card(edited, new, "body"))[0]
    assert found["license"] == "gpl-3.0" and found["thumbnail"] == "x.png"
    assert found["datasets"] == ["a/new", "mine/added"] and found["base_model"] == "user/other"
    assert found["model-index"] == [{"name": "ensemble", "results": []}, other]
    # What is no longer said goes, unless it was changed.
    assert "pipeline_tag" not in found
    unchanged = split_card(updated_card(card, {**METADATA, "license": "bsd"}, "body"))[0]
    assert unchanged["license"] == "bsd" and "datasets" not in unchanged


def trl_draft():
    draft = {"base_model": "a/b", "model_name": "out", "hub_model_id": "me/out", "dataset_name": "a/data"}
    links = {f"{name}_url": "https://host" for name in ("wandb", "trackio", "comet")}
    return str(generate_model_card(**draft, **links, tags=["sft"], trainer_name="SFT", trainer_citation="@a{b,\n}"))


def peft_draft():
    return str(ModelCard.from_template(ModelCardData(library_name="peft"))) + "\n### Framework versions\n\n- PEFT 0.21"


@pytest.mark.parametrize("draft", [trl_draft, peft_draft])
def test_drafts_of_other_libraries_are_replaced_unless_someone_wrote_into_them(draft):
    text = draft()
    assert own_text(text) == "" and split_card(updated_card(text, METADATA, "body"))[1].count("#") == 0
    remote = updated_card("# Of the Hub\n", METADATA, "remote")
    assert own_text(joined_cards(text, remote)) == "# Of the Hub"
    assert own_text(updated_card(joined_cards(remote, text), METADATA, "new")) == "# Of the Hub"
    # What PEFT puts below any card is nobody's either.
    versions = "### Framework versions\n\n- PEFT 0.21.2"
    card = updated_card("# By hand\n", METADATA, "body")
    for saved in (f"# By hand\n{versions}", f"{card}\n{versions}"):
        assert own_text(saved) == "# By hand" and versions not in updated_card(saved, METADATA, "body")
    heading = "## Training procedure" if draft is trl_draft else "## Uses"
    for own, edited in (
        ("Be careful.", text.replace(heading, f"Be careful.\n\n{heading}")),
        ("The end.", text + "\nThe end.\n"),
        ("@misc{mine,", text + f"\n{CITATION}"),
        ("@misc{mine,", text.replace(heading, f"Cite this model as:\n\n{CITATION}\n{heading}")),
    ):
        kept = own_text(updated_card(edited, METADATA, "body"))
        assert own in kept and heading in kept


def test_facts_that_are_no_longer_said_go_and_an_authors_stay():
    """A base that has become a local folder is no model id; results of other weights are not this model's."""
    facts = {**METADATA, "base_model_relation": "adapter"}
    unsaid = {key: facts[key] for key in ("library_name", "tags")}
    mine = {"name": "mine", "results": []}
    metadata, rest = split_card(updated_card(None, facts, "body"))
    card = f"---\n{yaml.safe_dump({**metadata, 'model-index': [*facts['model-index'], mine]})}---\n{rest}"
    found = split_card(updated_card(card, unsaid, "body"))[0]
    assert found.keys() == {*unsaid, "model-index"} and found["model-index"] == [mine]
    by_hand = "---\nbase_model: user/by-hand\nbase_model_relation: quantized\n---\n\n# Mine\n"
    card = updated_card(updated_card(by_hand, unsaid, "body"), unsaid, "again")
    assert split_card(card)[0]["base_model"] == "user/by-hand"
    # What another one has pushed since is not taken for an author's.
    local, remote = updated_card(None, facts, "local"), updated_card(None, unsaid, "remote")
    assert "base_model" not in split_card(updated_card(joined_cards(local, remote), unsaid, "new"))[0]


@pytest.mark.parametrize(
    "block",
    [
        "---\ntags: [unclosed\n---\n",
        "---\njust a rule\n---\n",
        "---\ndate: 2024-13-45\n---\n",
        "---\nversion: !!int one\n---\n",
        f"---\ntags: {'[' * 3000}{']' * 3000}\n---\n",
    ],
    ids=["unclosed", "text", "date", "number", "nested"],
)
def test_a_card_that_cannot_be_read_is_left_as_it_is(tmp_path, block):
    (tmp_path / CARD).write_text(block + "text")
    with pytest.raises(CardError, match="was left as it is: The card's metadata block"):
        update_card_file(tmp_path / CARD, METADATA, "body")
    assert (tmp_path / CARD).read_text() == block + "text"


def test_the_hubs_card_and_the_local_one_are_joined():
    local = updated_card("---\nlanguage: en\n---\n\nIntroduction.\n", METADATA, "local")
    remote = updated_card("---\nlicense: gpl-3.0\n---\n", METADATA, "remote")
    assert joined_cards(local, None) == local and joined_cards(None, remote) == remote
    joined = updated_card(joined_cards(local, remote), METADATA, "new")
    assert own_text(joined) == "Introduction." and "remote" not in joined and "local" not in joined
    assert split_card(joined)[0]["license"] == "gpl-3.0" and split_card(joined)[0]["language"] == "en"
    # Two texts: that on the Hub is not lost.
    remote = updated_card("Of the Hub.\n", METADATA, "remote")
    assert own_text(joined_cards(local, remote)) == "Of the Hub."


UNLICENSED = {key: value for key, value in METADATA.items() if key != "license"}


def test_what_a_caller_gives_is_the_authors():
    given = {"license": "mit", "tags": ["mine"], "base_model_relation": "quantized"}
    card = updated_card(None, UNLICENSED, "body", given)
    for _ in range(2):
        card = updated_card(card, UNLICENSED, "body")
        found = split_card(card)[0]
        assert found["license"] == "mit" and found["tags"] == [*UNLICENSED["tags"], "mine"]
    # Another one takes its place, but not that of an author.
    card = updated_card(updated_card(card, UNLICENSED, "body", {"license": "bsd"}), UNLICENSED, "body")
    assert split_card(card)[0]["license"] == "bsd"
    by_hand = updated_card(card.replace("license: bsd", "license: gpl"), UNLICENSED, "body", {"license": "mit"})
    assert split_card(by_hand)[0]["license"] == "gpl"
    # The library's own entries go as they came.
    other = {**UNLICENSED, "tags": ["other"]}
    assert split_card(updated_card(card, other, "body"))[0]["tags"] == ["other", "mine"]


def test_metadata_that_differ_on_the_hub_are_kept_and_said(caplog):
    by_hand = "---\nlicense: mit\nlanguage: en\ntags: [mine]\n---\n\nIntroduction.\n"
    local = updated_card(by_hand, UNLICENSED, "local")
    remote = updated_card("---\nlicense: gpl-3.0\ntags: [theirs]\n---\n", UNLICENSED, "remote")
    found = split_card(updated_card(joined_cards(local, remote), UNLICENSED, "new"))[0]
    assert (found["license"], found["language"]) == ("gpl-3.0", "en")
    assert found["tags"] == [*UNLICENSED["tags"], "theirs", "mine"]
    assert "The card on the Hub has license: gpl-3.0, which is kept in place of the local card's mit" in caplog.text
    # What nobody has changed there is no one's own.
    written = {**UNLICENSED, "pipeline_tag": "text-generation"}
    local = updated_card(None, written, "local").replace("pipeline_tag: text-generation", "pipeline_tag: other", 1)
    remote = updated_card(None, written, "remote")
    assert split_card(updated_card(joined_cards(local, remote), written, "new"))[0]["pipeline_tag"] == "other"


def test_what_a_script_gives_reaches_the_hub_each_time(tmp_path, caplog):
    path, remote = tmp_path / CARD, None
    for name in ("mit", "apache-2.0", "bsd"):
        update_card_file(path, UNLICENSED, "local", {"license": name, "language": [name[:2]]})
        remote = card_maker(path, CardParts(UNLICENSED, "remote"))(remote)
        found = split_card(remote)[0]
        assert (found["license"], found["language"]) == (name, [name[:2]])
    # Also into a card with a text of its own, but for what its author has set there.
    theirs = "---\nlanguage: fr\n---\n\nOf the Hub.\n"
    found = split_card(card_maker(path, CardParts(UNLICENSED, "remote"))(theirs))[0]
    assert (found["license"], found["language"]) == ("bsd", "fr")
    assert "The card has language: fr, which is kept in place of ['bs']" in caplog.text
