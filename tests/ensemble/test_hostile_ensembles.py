"""Folders of others that are damaged, foreign or hostile: each is refused by naming the file and the fault."""

import json
import os
import pickle
import shutil

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from helpers import toy
from helpers.member_kinds import KINDS, NAMES, make
from hf_ensemble import PeftEnsembleModel
from hf_ensemble._files import sha256_of
from hf_ensemble._records import with_checksum
from hf_ensemble.ensemble.saving.files import load_adapter
from hf_ensemble.errors import EnsembleError, EnsembleLoadError

CONFIG, ADAPTER, TENSORS = "ensemble_config.json", "adapter_config.json", "adapter_model.safetensors"
Q_PROJ = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def origin(tmp_path_factory):
    """A saved ensemble and its base."""
    folder = tmp_path_factory.mktemp("origin")
    toy.save_model(toy.llama(), folder / "base")
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    ensemble = PeftEnsembleModel(make(base, KINDS["ranks and scalings"]), NAMES, {"x": {"first": 0.5, "second": 0.5}})
    ensemble.save_pretrained(folder / "saved")
    return folder


@pytest.fixture
def saved(origin, tmp_path):
    """A copy to damage, beside a folder with a secret."""
    shutil.copytree(origin / "saved", tmp_path / "saved")
    shutil.copytree(origin / "saved", tmp_path / "outside")
    return tmp_path / "saved"


def with_checksums(folder):
    """Make the checksums right again, as whoever alters files on purpose would."""
    try:
        data = json.loads((folder / CONFIG).read_text())
        for member, files in data["files"].items():
            files.update({name: sha256_of(folder / "adapters" / member / name) for name in files})
        if not (folder / CONFIG).is_symlink():
            (folder / CONFIG).write_text(json.dumps(with_checksum(data)))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass


def ensemble(change):
    """Edit `ensemble_config.json`."""

    def damage(folder):
        data = json.loads((folder / CONFIG).read_text())
        result = change(data)
        (folder / CONFIG).write_text(json.dumps(data if result is None or not isinstance(result, list) else result))

    return damage


def adapter(**changes):
    """Edit the second adapter's configuration."""

    def damage(folder):
        path = folder / "adapters/second" / ADAPTER
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return damage


def tensors(change):
    """Edit the second adapter's tensors."""

    def damage(folder):
        path = folder / "adapters/second" / TENSORS
        data = load_file(path)
        change(data)
        save_file(data, path, metadata={"format": "pt"})

    return damage


def link(name, target):
    """Put a link that leads out of the folder in the place of a file or folder."""

    def damage(folder):
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        path.symlink_to(folder.parent / "outside" / target)

    return damage


class Trap:
    """Leaves a mark where it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (self.mark,)


def pickled_adapter(folder):
    (folder / "adapters/second" / TENSORS).unlink()
    with (folder / "adapters/second/adapter_model.bin").open("wb") as file:
        pickle.dump(Trap(str(folder.parent / "executed")), file)


def own_base(folder, config_changes, weights="safetensors"):
    """A base model of the attacker's, which the ensemble names."""
    base = folder.parent / "base"
    toy.save_model(toy.llama(), base)
    data = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**data, **config_changes}))
    (base / "modeling_evil.py").write_text(f"import os\nos.mkdir({str(folder.parent / 'executed')!r})\n")
    if weights == "pickle":
        (base / "model.safetensors").unlink()
        with (base / "pytorch_model.bin").open("wb") as file:
            pickle.dump(Trap(str(folder.parent / "executed")), file)
    ensemble(lambda d: d["base_model"].update(name_or_path=str(base)))(folder)


def set_value(key, value):
    def change(data):
        data[key].view(-1)[0] = value

    return tensors(change)


CASES = {
    # The ensemble's configuration.
    "no configuration": (lambda f: (f / CONFIG).unlink(), f"holds no {CONFIG}"),
    "no JSON": (lambda f: (f / CONFIG).write_text("{"), f"{CONFIG} is damaged"),
    "no object": (ensemble(lambda d: [d]), f"{CONFIG} is damaged: expected a JSON object, found list"),
    "deep nesting": (lambda f: (f / CONFIG).write_text("[" * 100000 + "]" * 100000), f"{CONFIG} is damaged"),
    "another format": (ensemble(lambda d: d.update(format="adapters")), f"{CONFIG}.*expected the format"),
    "a newer version": (ensemble(lambda d: d.update(format_version=99)), f"{CONFIG} has format version 99"),
    "no version": (ensemble(lambda d: d.update(format_version="1")), f"{CONFIG}.*with a format_version"),
    "no members": (ensemble(lambda d: d.__delitem__("members")), f"{CONFIG}.*damaged: KeyError\\('members'\\)"),
    "members of text": (ensemble(lambda d: d.update(members="first")), f"{CONFIG}.*damaged"),
    "empty members": (ensemble(lambda d: d["members"].clear()), f"{CONFIG}: expected at least one member"),
    "path as name": (
        ensemble(lambda d: d["members"][0].update(name="../../outside")),
        "'../../outside' is not a valid",
    ),
    "absolute name": (ensemble(lambda d: d["members"][0].update(name="/etc")), "'/etc' is not a valid folder name"),
    "number as name": (ensemble(lambda d: d["members"][0].update(name=7)), "7 is not a valid folder name"),
    "two of a name": (ensemble(lambda d: d["members"].append(d["members"][0])), f"{CONFIG}: two members.* same name"),
    "combination": (ensemble(lambda d: d.update(combination="magic")), f"{CONFIG}: unknown combination 'magic'"),
    "routing": (ensemble(lambda d: d.update(routing="magic")), f"{CONFIG}: unknown routing 'magic'"),
    "weights of others": (ensemble(lambda d: d["weights"]["x"].update(d=1.0)), f"{CONFIG}.*unknown adapters \\['d'\\]"),
    "weight nan": (ensemble(lambda d: d["weights"]["x"].update(first=float("nan"))), f"{CONFIG}.*'x'.*finite"),
    "weight infinite": (ensemble(lambda d: d["default_weights"].update(first=1e999)), f"{CONFIG}.*'default'.*finite"),
    "weights of a task called default": (
        ensemble(lambda d: d["weights"].update(default={"first": float("nan")})),
        f"{CONFIG}.*'default'.*finite",
    ),
    "weight of text": (ensemble(lambda d: d["weights"]["x"].update(first="1")), f"{CONFIG}.*'x'.*finite numbers"),
    "weights zero": (ensemble(lambda d: d["weights"]["x"].update(first=0.0, second=0)), f"{CONFIG}.*not all zero"),
    "weights a list": (ensemble(lambda d: d.update(weights=[1.0])), f"{CONFIG}.*damaged"),
    "label": (
        ensemble(lambda d: d.update(label_space={"names": ["a"], "task_labels": {"x": [3]}})),
        f"{CONFIG}: the labels of 'x' are \\[3\\]",
    ),
    "base class": (ensemble(lambda d: d["base_model"].update(auto_class="Trainer")), f"{CONFIG}.*class 'Trainer'"),
    "no base": (ensemble(lambda d: d["base_model"].update(name_or_path="")), "does not name its base model"),
    "base nowhere": (
        ensemble(lambda d: d["base_model"].update(name_or_path="/nowhere")),
        "'/nowhere' cannot be loaded",
    ),
    "base outside": (
        ensemble(lambda d: d["base_model"].update(name_or_path="../base")),
        f"{CONFIG}.*'../base' leads out",
    ),
    "base with code on": (ensemble(lambda d: d["base_model"].update(trust_remote_code=True)), f"{CONFIG}.*damaged"),
    "base with code": (
        lambda f: own_base(f, {"model_type": "evil", "auto_map": {"AutoModelForCausalLM": "modeling_evil.Evil"}}),
        "base model .* cannot be loaded",
    ),
    "base pickled": (lambda f: own_base(f, {}, "pickle"), "base model .* cannot be loaded: .*safetensors"),
    "configuration elsewhere": (link(CONFIG, CONFIG), f"{CONFIG} leads out of"),
    # An adapter's files.
    "adapter missing": (lambda f: shutil.rmtree(f / "adapters/second"), f"'second': {ADAPTER} is missing"),
    "weights missing": (lambda f: (f / "adapters/second" / TENSORS).unlink(), f"'second': {TENSORS} is missing"),
    "weights pickled": (pickled_adapter, f"'second': {TENSORS} is missing.*pickled weights are not read"),
    "adapter elsewhere": (link("adapters/second", "adapters/second"), f"'second': {ADAPTER} leads out of"),
    "weights elsewhere": (link(f"adapters/second/{TENSORS}", f"adapters/second/{TENSORS}"), f"{TENSORS} leads out of"),
    "weights garbage": (
        lambda f: (f / "adapters/second" / TENSORS).write_bytes(b"x" * 99),
        f"'second': {TENSORS} does not hold safetensors",
    ),
    "weights cut": (
        lambda f: os.truncate(f / "adapters/second" / TENSORS, 2000),
        f"'second': {TENSORS} does not hold safetensors",
    ),
    "adapter no JSON": (lambda f: (f / "adapters/second" / ADAPTER).write_text("{"), f"'second': {ADAPTER} is damaged"),
    "no kind": (lambda f: (f / "adapters/second" / ADAPTER).write_text("{}"), f"{ADAPTER} is damaged: it has no peft"),
    "other kind": (
        adapter(peft_type="XLORA", adapters={"0": "/etc"}),
        f"'second': {ADAPTER} has the peft_type 'XLORA'",
    ),
    "megatron": (adapter(megatron_config={"a": 1}, megatron_core="os"), f"'second': {ADAPTER} sets megatron_config"),
    "replicated layers": (adapter(layer_replication=[[0, 2], [0, 2]]), "sets layer_replication.*changes the base"),
    "initialization": (adapter(init_lora_weights="pissa"), "init_lora_weights 'pissa'.*changes the base model"),
    "biases": (adapter(bias="all"), f"'second': {ADAPTER} has bias 'all'"),
    "rank": (adapter(r=4), f"{TENSORS} has rank 8 at .*, where {ADAPTER} says 4"),
    "rank huge": (adapter(r=10**9, rank_pattern={".*": 8}), f"{ADAPTER} states the rank 1000000000"),
    "rank of text": (adapter(r="8"), f"{ADAPTER} has the rank '8'"),
    "rank negative": (adapter(r=-1), f"{ADAPTER} has the rank -1"),
    "scaling infinite": (adapter(lora_alpha=float("inf")), f"{ADAPTER} has the scaling inf"),
    "targets": (adapter(target_modules={"q_proj": 1}), f"{ADAPTER} has target_modules"),
    "long pattern": (adapter(target_modules="(a+)+" * 500), f"{ADAPTER} has target_modules .* expected names"),
    "targets elsewhere": (adapter(target_modules=["q_proj", "lm_head"]), f"{TENSORS} lacks|does not fit"),
    "no module": (adapter(target_modules=["nothing"]), "'second' in .* does not fit the base model"),
    "nan": (set_value(f"{Q_PROJ}.lora_A.weight", float("nan")), f"{TENSORS}: tensor .*lora_A.* not finite"),
    "infinite": (set_value(f"{Q_PROJ}.lora_B.weight", float("inf")), f"{TENSORS}: tensor .*lora_B.* not finite"),
    "integers": (
        tensors(lambda d: d.update({f"{Q_PROJ}.lora_A.weight": d[f"{Q_PROJ}.lora_A.weight"].to(torch.int32)})),
        f"{TENSORS}: tensor .* has the dtype I32",
    ),
    "shape": (
        tensors(lambda d: d.update({f"{Q_PROJ}.lora_A.weight": torch.zeros(8, 33)})),
        f"{TENSORS}: tensor .*lora_A.* has the shape \\[8, 33\\], expected \\[8, 32\\]",
    ),
    "half a pair": (
        tensors(lambda d: d.pop(f"{Q_PROJ}.lora_B.weight")),
        f"{TENSORS}: the tensor '.*q_proj.lora_B.weight' is missing",
    ),
    "a pair missing": (
        tensors(lambda d: [d.pop(f"{Q_PROJ}.lora_{x}.weight") for x in "AB"]),
        f"'second': {TENSORS} lacks 2 tensors",
    ),
    "foreign module": (
        tensors(lambda d: d.update({f"{Q_PROJ}_.lora_{x}.weight": torch.zeros(8, 8) for x in "AB"})),
        "q_proj_.lora_A.weight' is for a module that the base model does not have",
    ),
    "base replaced": (
        tensors(lambda d: d.update({"base_model.model.model.norm.weight": torch.zeros(32)})),
        f"{TENSORS}: tensor .*norm.weight' would replace weights of the base model",
    ),
    "base layer replaced": (
        tensors(lambda d: d.update({f"{Q_PROJ}.base_layer.weight": torch.zeros(32, 32)})),
        "base_layer.weight' would replace weights of the base model",
    ),
    "base replaced through a token's place": (
        tensors(
            lambda d: d.update(
                {"base_model.model.model.embed_tokens.token_adapter.base_layer.weight": torch.zeros(45, 32)}
            )
        ),
        "token_adapter.base_layer.weight' would replace weights of the base model",
    ),
    "vocabulary of another base": (
        tensors(lambda d: d.update({"base_model.model.model.embed_tokens.weight": torch.zeros(50, 32)})),
        "embed_tokens.weight' would replace weights of the base model",
    ),
    "stray tensor": (
        tensors(lambda d: d.update(stray=torch.zeros(2))),
        f"{TENSORS}: expected tensors of an adapter.*found 'stray'",
    ),
    "another adapter's tensor": (
        tensors(lambda d: d.update({f"{Q_PROJ}.lora_A.first.weight": torch.zeros(8, 32)})),
        f"{TENSORS}: tensor .*lora_A.first.weight' does not belong in an adapter",
    ),
}


def test_there_are_forty_cases():
    assert len(CASES) >= 40


@pytest.mark.parametrize("case", CASES)
def test_refused_by_file_and_fault(case, saved):
    damage, message = CASES[case]
    damage(saved)
    with_checksums(saved)
    with pytest.raises(EnsembleError, match=f"(?s){message}"):
        PeftEnsembleModel.from_pretrained(saved)
    assert not (saved.parent / "executed").exists()


def test_untouched_copy_loads(saved):
    assert PeftEnsembleModel.from_pretrained(saved).adapter_names == NAMES


@pytest.mark.parametrize("case", ["half a pair", "a pair missing", "no module", "nan"])
@torch.no_grad()
def test_a_refused_adapter_leaves_the_base_as_it_was(case, saved):
    damage, message = CASES[case]
    damage(saved)
    base, ids = toy.llama(), torch.randint(3, 20, (2, 5))
    names, logits = list(base.state_dict()), base(ids).logits
    first = {"second": saved / "adapters/second"}
    with pytest.raises(EnsembleLoadError):
        PeftEnsembleModel.from_adapters(base, first)
    assert list(base.state_dict()) == names and torch.equal(base(ids).logits, logits)
    # Beside adapters that are there already.
    model = PeftModel.from_pretrained(base, saved / "adapters/first", adapter_name="first").eval()
    logits = model(ids).logits
    with pytest.raises(EnsembleLoadError):
        load_adapter(model, saved / "adapters/second", "second")
    assert list(model.peft_config) == ["first"] and torch.equal(model(ids).logits, logits)
