"""What an ensemble cannot be made of, asked for or learnt from."""

import pytest
import torch
from torch import nn
from transformers import DynamicCache

from helpers import toy
from helpers.ensembles import randomize_adapters
from hf_ensemble import PeftEnsembleModel, push_run_to_hub, write_model_card
from hf_ensemble.ensemble.saving import files
from hf_ensemble.errors import EnsembleError, HfEnsembleError

NAN = float("nan")
ROW = {"input_ids": [3, 4, 5], "labels": [-100, 4, 5]}


@pytest.fixture(scope="module")
def model():
    peft_model = toy.with_lora(toy.llama())
    peft_model.add_adapter("a", toy.lora(r=2))
    randomize_adapters(peft_model, ["default", "a"])
    return peft_model.eval()


@pytest.fixture(scope="module")
def ensemble(model):
    return PeftEnsembleModel(model, ["default", "a"], {"x": {"default": 0.5, "a": 0.5}})


MADE = {
    "model is a base": (
        {"model": nn.Linear(1, 1)},
        "to be a PeftModel with the adapters, found a Linear",
    ),
    "model is a name": ({"model": "gpt2"}, "Expected model to be a PeftModel with the adapters, found a str"),
    "members are a name": ({"members": "default"}, "Expected members as a list of adapter names, found 'default'"),
    "members are None": ({"members": None}, "Expected members as a list of adapter names, found None"),
    "no members": ({"members": []}, r"Expected different adapters of the model as members, found \[\]"),
    "member is unknown": ({"members": ["z"]}, r"found \['z'\]; the model has \['default', 'a'\]"),
    "member is a number": ({"members": [0]}, "Adapter name 0 is not a valid folder name"),
    "member leads out": ({"members": ["../a"]}, "is not a valid folder name: use letters"),
    "members repeat": ({"members": ["a", "a"]}, "Expected different adapters"),
    "weights are a list": ({"weights": [0.5, 0.5]}, "Expected the weights by task as a dict by name"),
    "weights of a task are a list": ({"weights": {"x": [0.5]}}, "Expected the weights of 'x' as a dict by name"),
    "weight of an unknown adapter": ({"weights": {"x": {"z": 1.0}}}, r"name unknown adapters \['z'\]; the adapters"),
    "weight is text": ({"weights": {"x": {"a": "1"}}}, "must be finite numbers and not all zero, found {'a': '1'}"),
    "weight is NaN": ({"weights": {"x": {"a": NAN}}}, "must be finite numbers"),
    "weight is True": ({"weights": {"x": {"a": True}}}, "must be finite numbers"),
    "weights are 0": ({"weights": {"x": {"a": 0.0}}}, "not all zero"),
    "default weights are a list": ({"default_weights": [1.0]}, "Expected the weights of 'default' as a dict by name"),
    "labels are a list": ({"label_space": ["yes"]}, r"Expected label_space to be a LabelSpace, found \['yes'\]"),
    "combination is unknown": ({"combination": "sum"}, "combination has to be one of .* found 'sum'"),
    "combination is None": ({"combination": None}, "combination has to be one of .* found None"),
    "routing is unknown": ({"routing": "magic"}, "routing has to be one of .* found 'magic'"),
}


@pytest.mark.parametrize("bad", MADE)
def test_ensembles_are_refused(bad, model):
    given, message = MADE[bad]
    with pytest.raises(EnsembleError, match=message):
        PeftEnsembleModel(**{"model": model, "members": ["default", "a"], **given})


IDS = torch.tensor([[3, 4, 5], [3, 6, 7]])
CALLS = {
    "no inputs": ("forward", {}, "Expected input_ids with a row for each example, found no inputs"),
    "task is a number": ("forward", {"input_ids": IDS, "task": 3}, "name of a task, or one name for each row"),
    "too few tasks": ("forward", {"input_ids": IDS, "task": ["x"]}, "one task for each of 2 rows, found 1"),
    "tasks are numbers": ("forward", {"input_ids": IDS, "task": [0, 1]}, "or one name for each row, found task="),
    "unknown routing": ("forward", {"input_ids": IDS, "routing": "magic"}, "routing has to be one of"),
    "no loss": ("forward", {"input_ids": IDS, "return_logits": False}, "expected labels, found none"),
    "tasks are a tensor": ("forward", {"input_ids": IDS, "task": torch.tensor([0, 1])}, "or one name for each row"),
    "hidden states": (
        "forward",
        {"input_ids": IDS, "output_hidden_states": True},
        "output_hidden_states cannot be set",
    ),
    "attentions": ("forward", {"input_ids": IDS, "output_attentions": True}, "output_attentions cannot be set"),
    "cache of one model": (
        "forward",
        {"input_ids": IDS, "task": "x", "past_key_values": DynamicCache()},
        "past_key_values of an earlier call of the ensemble, found DynamicCache",
    ),
    "kind of cache is unknown": (
        "generate",
        {"input_ids": IDS, "task": "x", "cache_implementation": "magic"},
        "cache_implementation 'dynamic' or 'static', found 'magic'",
    ),
    "no prompts": ("generate", {}, "Expected prompts in input_ids, found none"),
    "prompts for too many tasks": ("generate", {"input_ids": IDS, "task": ["x"] * 3}, "one task for each of 2 rows"),
    "no answer": ("score", {"input_ids": IDS, "labels": torch.full_like(IDS, -100)}, "an answer token in every row"),
    "task is unknown": ("merge", {"task": "z"}, r"No weights for the task 'z'; known: \['x'\]"),
    "rank is 0": ("merge", {"rank": 0}, "rank has to be a positive integer or None, found 0"),
    "rank is text": ("merge", {"rank": "8"}, "rank has to be a positive integer or None, found '8'"),
    "rank is True": ("merge", {"rank": True}, "rank has to be a positive integer or None, found True"),
    "merging is unknown": ("merge", {"method": "mean"}, "method has to be one of .* found 'mean'"),
    "merging is None": ("merge", {"method": None}, "method has to be one of"),
    "option is unknown": ("merge", {"method": "ties", "gamma": 1}, r"ties does not take the options \['gamma'\]"),
    "option of no method": ("merge", {"density": 0.5}, "'sum' takes no options"),
    "density is 0": (
        "merge",
        {"method": "ties", "density": 0},
        "density has to be a finite number above 0",
    ),
    "density is text": ("merge", {"method": "pcb", "density": "x"}, "density has to be a finite number"),
    "density is NaN": ("merge", {"method": "dare_linear", "density": NAN}, "density has to be a finite number"),
    "seed is text": ("merge", {"method": "dare_ties", "seed": "x"}, "seed has to be an integer of at least 0"),
    "share is 2": ("merge", {"method": "breadcrumbs", "drop_smallest": 2}, "drop_smallest has to be a finite number"),
    "factor is text": ("merge", {"method": "lines", "alpha": "x"}, "alpha has to be a finite number, found 'x'"),
}


@pytest.mark.parametrize("bad", CALLS)
def test_calls_are_refused(bad, ensemble):
    method, arguments, message = CALLS[bad]
    with pytest.raises(HfEnsembleError, match=message):
        getattr(ensemble, method)(**arguments)


def row(**changes):
    return {"x": [ROW, {**ROW, **changes}]}


FITS = {
    "rows are None": ((None,), {}, "Expected a dict of rows by task, found None"),
    "rows are text": (("rows.jsonl",), {}, "Expected a dict of rows by task, found 'rows.jsonl'"),
    "no rows": (({},), {}, "Expected rows of at least one task, found none"),
    "no rows of a task": (({"x": []},), {}, r"found none of \['x'\]"),
    "rows without tasks": (([ROW],), {}, "rows with a column 'task', found the row"),
    "rows are numbers": (([1],), {}, "rows with a column 'task', found the row 1"),
    "no labels": (({"x": [{"input_ids": [3, 4]}]},), {}, "have no labels to fit weights to. Add a column 'labels'"),
    "no answer": ((row(labels=[-100] * 3),), {}, "an answer in every row of 'x', found no answer token in row 1"),
    "token above the vocabulary": ((row(input_ids=[3, 999, 5]),), {}, "token ids from 0 to .* found 999 in row 1"),
    "token is negative": ((row(input_ids=[3, -4, 5]),), {}, "token ids from 0 .* found -4 in row 1"),
    "label above the vocabulary": ((row(labels=[-100, 999, 5]),), {}, "labels from 0 to .* found 999 in row 1"),
    "label is negative": ((row(labels=[-100, -1, 5]),), {}, "labels from 0 to .* found -1 in row 1"),
    "constraint is unknown": ((row(),), {"constraint": "ridge"}, "constraint has to be one of .* found 'ridge'"),
    "batch is 0": ((row(),), {"batch_size": 0}, "batch_size has to be a positive integer, found 0"),
    "batch is text": ((row(),), {"batch_size": "8"}, "batch_size has to be a positive integer, found '8'"),
    "no row allowed": ((row(),), {"max_rows": 0}, "max_rows has to be a positive integer or None, found 0"),
    "no value allowed": ((row(),), {"max_values": 0}, "max_values has to be a positive integer, found 0"),
    "too few values": ((row(),), {"max_values": 3}, "max_values=3 holds no answer token.*Pass max_values="),
    "least weight is text": ((row(),), {"min_weight": "x"}, "min_weight has to be a finite number"),
    "least weight is 2": ((row(),), {"min_weight": 2}, "min_weight has to be a finite number .* found 2"),
    "seed is negative": ((row(),), {"seed": -1}, "seed has to be an integer of at least 0"),
    "precision is unknown": ((row(),), {"mixed_precision": "fp8"}, "mixed_precision has to be one of .* found 'fp8'"),
    "option is unknown": ((row(),), {"speed": 1}, r"fit_weights takes no \['speed'\]; it takes \['data_collator'"),
}


@pytest.mark.parametrize("bad", FITS)
def test_rows_to_fit_weights_to_are_refused(bad, ensemble):
    arguments, options, message = FITS[bad]
    before = (dict(ensemble.weights), dict(ensemble.default_weights))
    with pytest.raises(HfEnsembleError, match=message):
        ensemble.fit_weights(*arguments, **options)
    assert before == (ensemble.weights, ensemble.default_weights)


def load(*args, **kwargs):
    return lambda folder: PeftEnsembleModel.from_pretrained(*(a(folder) if callable(a) else a for a in args), **kwargs)


FILES = {
    "no folder": (load(lambda folder: folder / "none"), "none"),
    "not an ensemble": (load(lambda folder: folder), "holds no ensemble_config.json: it is not a saved ensemble"),
    "a file": (load(lambda folder: folder / "file"), "file"),
    "None": (load(None), "Expected name_or_path as a path, found None"),
    "a number": (load(3), "Expected name_or_path as a path, found 3"),
    "subfolder leads out": (load("folder", subfolder="../x"), "The subfolder '../x' leads out of 'folder'"),
    "subfolder of adapters": (load({"x": "a"}, subfolder="b"), "no subfolder of separate adapters, found 'b'"),
    "pickled base": (load("folder", use_safetensors=False), "from safetensors, .* found use_safetensors=False"),
    "arguments of a loaded base": (
        load("folder", base_model=nn.Linear(1, 1), dtype="auto"),
        r"base_model=Linear\(...\), which is loaded, found \['dtype'\]. Load it with them",
    ),
    "no adapters": (load({}), "Expected at least one adapter, found none"),
    "adapter leads out": (load({"../x": "folder"}), "is not a valid folder name"),
    "adapter is missing": (load({"x": "no/such/folder"}), "no/such/folder"),
    "adapters are a list": (
        lambda folder: PeftEnsembleModel.from_adapters(None, ["a"]),
        "Expected adapters as a dict by name",
    ),
    "card without a run": (lambda folder: write_model_card(folder), "holds no ensemble_config.json"),
    "upload without a run": (lambda folder: push_run_to_hub(folder, "user/x"), "holds no ensemble_config.json"),
    "upload of None": (lambda folder: push_run_to_hub(None, "user/x"), "folder of the run as a path, found None"),
}


@pytest.mark.parametrize("bad", FILES)
def test_folders_are_refused(bad, tmp_path, monkeypatch):
    act, message = FILES[bad]
    (tmp_path / "file").write_text("x")
    monkeypatch.setattr(files, "load_base", lambda *args, **kwargs: pytest.fail("a base model was loaded"))
    with pytest.raises(HfEnsembleError, match=message):
        act(tmp_path)


@pytest.mark.parametrize("folder", [None, 3])
def test_an_ensemble_is_saved_into_folders_only(ensemble, folder):
    with pytest.raises(EnsembleError, match="Expected the folder to save into as a path, found"):
        ensemble.save_pretrained(folder)
