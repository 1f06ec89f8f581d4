"""The code of docs/ensemble.md runs, one block after another."""

import re
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from helpers import toy
from helpers.member_kinds import make
from hf_ensemble import PeftEnsembleModel

DOCUMENT = (Path(__file__).parents[2] / "docs" / "ensemble.md").read_text(encoding="utf-8")


def test_snippets_run_one_after_another(tmp_path, monkeypatch):
    toy.save_model(toy.llama(), tmp_path / "base")
    names = ["group_0", "group_1", "group_2"]
    model = make(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), [{"r": 4}, {"r": 2}, {"use_rslora": True}])
    for old, new in zip(["first", "second", "third"], names):
        model.add_adapter(new, model.peft_config[old])
    ensemble = PeftEnsembleModel(model, names, {"sums": {"group_0": 0.5, "group_2": 0.5}, "films": {"group_1": 1.0}})
    ensemble.save_pretrained(tmp_path / "saved")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```", DOCUMENT, flags=re.DOTALL | re.MULTILINE)
    assert len(blocks) == 5
    namespace: dict = {}
    for number, block in enumerate(blocks):
        block = block.replace('"BASE"', '"base"').replace("user/my-ensemble", str(tmp_path / "saved"))
        exec(compile(block, f"docs/ensemble.md, python block {number}", "exec"), namespace)
    assert namespace["generated"].shape[0] == 2
    assert set(namespace["fit"].tasks) == {"sums", "films"}
    assert namespace["apart"].adapter_names == ["merged", "first"]
    ids = torch.randint(3, 20, (2, 4))
    assert PeftModel.from_pretrained(toy.llama(), tmp_path / "merged")(ids).logits.isfinite().all()
