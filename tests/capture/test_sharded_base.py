"""Capture, scores and answers of a model whose frozen base is sharded over two processes."""

import json
import sys

import numpy as np
import pytest
import torch
from accelerate import PartialState

from helpers import toy
from helpers.captures import causal_batch
from helpers.deepspeed import needs_deepspeed
from helpers.processes import run_ranks
from hf_ensemble.capture import GradientExtractor
from hf_ensemble.store import GradientStore

CODE = """
import json
import sys
import torch
from accelerate import PartialState
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import DataCollatorForSeq2Seq
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from helpers import toy
from helpers.captures import capture
from hf_ensemble.capture import GradientExtractor
from hf_ensemble.errors import CaptureError
from hf_ensemble.evaluate import Evaluator
from hf_ensemble.models import answer_head
from hf_ensemble.models.answer_scorer import AnswerScorer
from hf_ensemble.models.sharding import shard_base, shard_base_by_zero
from hf_ensemble.models.zero_sharding import is_cut
from hf_ensemble.tasks import TaskCollator, TaskSet, encode

folder, by, state, found = sys.argv[1], sys.argv[2], PartialState(cpu=True), {}
is_layer = lambda module: isinstance(module, LlamaDecoderLayer)
rows = toy.sft_tasks(train=9, validation=3)
# Of a batch, one process has the short answers and the other one the long ones, whose tokens the head takes one by one.
mixed = [{"prompt": "sum : 3 + 2 =", "completion": " 5"}, {"prompt": "2 =", "completion": " 5 yes 5 yes 5"}] * 4
rows["mixed"] = {"train": mixed, "validation": mixed[:4]}
if state.num_processes > 1:
    answer_head.LOGITS_BYTES = 1
tasks = TaskSet.from_datasets(rows)
table = encode(tasks.table("validation"), toy.tokenizer(), tasks.row_format)
collator = TaskCollator(DataCollatorForSeq2Seq(toy.tokenizer(), label_pad_token_id=-100))
prompt = toy.tokenizer()("sum : 3 + 2 =", return_tensors="pt")
for name, tied in (("tied", True), ("untied", False)):
    model = toy.with_lora(toy.llama(tie_word_embeddings=tied))
    if by == "fsdp":
        mesh = init_device_mesh("cpu", (state.num_processes,))
        shard_base(model, mesh, is_layer)
        # All of the base, and nothing of the adapter.
        assert all(isinstance(own.data, DTensor) != own.requires_grad for own in model.parameters())
    if by == "zero":
        sizes = [own.numel() for own in model.parameters()]
        shard_base_by_zero(model, state.device, is_layer)
        for size, own in zip(sizes, model.parameters()):
            assert own.requires_grad != is_cut(own)
            # Of an odd number, half of one more.
            assert own.requires_grad or (own.numel() == 0 and own.ds_tensor.numel() == (size + 1) // 2)
    capture(f"{folder}/{name}", model, rows, batch_size=2)
    scores = Evaluator(model, collator, 2, disable_tqdm=True).score_rows(AnswerScorer(model), table)
    if state.is_main_process:
        # As saving does: no process may be left with a unit that others have to gather.
        model.state_dict()
    answer = model.generate(**prompt, max_new_tokens=4, do_sample=False)
    found[name] = [scores.loss.tolist(), answer.tolist()]
if by == "fsdp":
    model = toy.with_lora(toy.llama())
    base, adapter = model.get_base_model(), {own for own in model.parameters() if own.requires_grad}
    fully_shard([base.model.norm, base.lm_head], mesh=mesh, ignored_params=adapter)
    try:
        GradientExtractor(model, 16)
    except CaptureError as error:
        assert "base_model.model.model.norm" in str(error) and "base_model.model.lm_head" in str(error)
    else:
        raise AssertionError("its backward would read weights that are freed")
with open(f"{folder}/found-{state.process_index}.json", "w") as file:
    json.dump(found, file)
"""


@pytest.mark.parametrize("by", ["fsdp", pytest.param("zero", marks=needs_deepspeed)])
def test_a_sharded_base_gives_what_one_process_finds(by, tmp_path, monkeypatch):
    one, two = tmp_path / "one", tmp_path / "two"
    two.mkdir()
    for rank in run_ranks(CODE, 2, str(two), by):
        assert rank.returncode == 0, rank.stderr[-3000:]
    one.mkdir()
    monkeypatch.setattr(sys, "argv", ["-c", str(one), "none"])
    # The code's own, which later tests do not find.
    monkeypatch.setattr(PartialState, "_shared_state", {})
    exec(compile(CODE, "<code>", "exec"), {})
    expected = json.loads((one / "found-0.json").read_text())
    found = [json.loads((two / f"found-{rank}.json").read_text()) for rank in range(2)]
    for embeddings, (losses, answer) in expected.items():
        own, other = GradientStore(one / embeddings), GradientStore(two / embeddings)
        assert other.identity == own.identity
        for split in ("train", "validation"):
            for column in ("features", "margin"):
                values = (getattr(store.table(split), column) for store in (other, own))
                np.testing.assert_allclose(*values, atol=1e-5)
        for rank in found:
            np.testing.assert_allclose(rank[embeddings][0], losses, atol=1e-5)
            assert rank[embeddings][1] == answer


@pytest.mark.parametrize("when", ["new", "wrong"])
def test_processes_that_run_a_model_together_make_the_same_passes(when, monkeypatch):
    """Hooks that are new to another process are checked, and wrong ones disabled there, too: both take a pass more."""
    model, told, forwards = toy.with_lora(toy.llama()), [], []
    rows, collator = causal_batch("right")
    monkeypatch.setattr("hf_ensemble.capture.gradients.is_sharded", lambda model: True)
    extractor = GradientExtractor(model, 16)
    expected, name = extractor(collator(rows)), extractor.hooked[0]
    model.register_forward_hook(lambda *_: forwards.append(None))
    extractor(collator(rows))
    alone = len(forwards)

    def beside_another(function):
        # What processes tell each other of a batch none of whose hooks is new, until they differ.
        told.append({0: "new", 1: "wrong"}.get(len(told)))
        return [function(), {name} if told[-1] == when else set()]

    monkeypatch.setattr("hf_ensemble.capture.gradients.run_in_step", beside_another)
    found = extractor(collator(rows))
    assert len(forwards) == 3 * alone and (name in extractor.lora_hooks.disabled) is (when == "wrong")
    assert torch.allclose(found.features, expected.features, atol=1e-5)
