"""When the parts of a base that DeepSpeed has cut are gathered and freed, and what their gradients are."""

import pytest

from helpers.deepspeed import needs_deepspeed
from helpers.processes import run_ranks

pytestmark = needs_deepspeed

CODE = """
import deepspeed
import torch
from accelerate import PartialState
from torch.multiprocessing.reductions import StorageWeakRef
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from helpers import toy
from hf_ensemble.models.sharding import is_sharded, shard_base_by_zero, whole_tensor
from hf_ensemble.models.zero_sharding import num_cut

state = PartialState(cpu=True)
ids = torch.tensor([[3, 4, 5, 6], [7, 3, 4, 4]])
trained = lambda model: {name: own for name, own in model.named_parameters() if own.requires_grad}
frozen = lambda model: [own for own in model.parameters() if not own.requires_grad]
is_layer = lambda module: isinstance(module, LlamaDecoderLayer)

def gathered(model):
    return [own for own in frozen(model) if own.numel() > 0]

def loss_of(model):
    return model(input_ids=ids, labels=ids).loss

def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: own.grad.clone() for name, own in trained(model).items()}

def check_gradients(model, loss=loss_of):
    found, expected = gradients(model, loss(model)), gradients(whole, loss(whole))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-6, rtol=1e-4)
    assert not gathered(model)
"""
SAME = """
for tied in (True, False):
    make = lambda: toy.with_lora(toy.llama(num_hidden_layers=4, tie_word_embeddings=tied))
    whole, model = make(), make()
    weights = [own.clone() for own in frozen(model)]
    shard_base_by_zero(model, state.device, is_layer)
    # Nothing is compiled first, for minutes.
    assert deepspeed.comm.comm.cdb.shm_comm_op is None
    assert is_sharded(model) and not gathered(model)
    assert all(torch.equal(whole_tensor(own), weight) for own, weight in zip(frozen(model), weights))
    number = whole.num_parameters(exclude_embeddings=True) - sum(own.numel() for own in trained(whole).values())
    assert num_cut(model) == number
    check_gradients(model)
    # Two runs, and then one backward pass through both.
    check_gradients(model, lambda model: loss_of(model) + 2 * loss_of(model))
    # The head takes the very tensor that the body gives.
    check_gradients(model, lambda model: model.lm_head(model.get_base_model().model(ids).last_hidden_state).var())
    # Those of one layer alone: the pass ends within the model.
    names = [name for name in trained(model) if "layers.2." in name]
    found, expected = (
        torch.autograd.grad(loss_of(own), [trained(own)[name] for name in names]) for own in (model, whole)
    )
    for one, other in zip(found, expected):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)
    assert not gathered(model)
    with torch.inference_mode():
        torch.testing.assert_close(loss_of(model), loss_of(whole))
    for reentrant in (True, False):
        for own in (model, whole):
            own.train()
            own.enable_input_require_grads()
            own.gradient_checkpointing_enable({"use_reentrant": reentrant})
        check_gradients(model)
"""
FREED = """
import gc

model = toy.with_lora(toy.llama(num_hidden_layers=4))
shard_base_by_zero(model, state.device, is_layer)
layers = list(filter(is_layer, model.modules()))
heads = (model.get_input_embeddings().weight, model.get_output_embeddings().weight)
storages, seen = [], []

def record(*ignored):
    open_layers = [any(own.numel() > 0 and not own.requires_grad for own in layer.parameters()) for layer in layers]
    seen.append(sum(open_layers))
    assert all(own.numel() > 0 for own in heads)

def keep(layer, inputs):
    record()
    storages.extend(StorageWeakRef(own.untyped_storage()) for own in frozen(layer))

for layer in layers:
    layer.register_forward_pre_hook(keep)
# A fused head reads the weights itself, after the body.
model.get_base_model().model.register_forward_hook(lambda *ignored: record())
loss = loss_of(model)
assert seen == [1] * 4 + [0] and not gathered(model)
# What cycles alone hold, the collector takes at a time of its own; what autograd holds, it cannot.
gc.collect()
assert len(storages) == 36 and all(storage.expired() for storage in storages), "autograd keeps gathered weights"
for own in trained(model).values():
    own.register_hook(record)
seen.clear()
loss.backward()
# The one that the pass leaves, and the one that it enters.
assert len(seen) == 56 and max(seen) <= 2 and not gathered(model)

def fail(*ignored):
    raise ValueError("no such luck")

handle = layers[2].mlp.register_forward_pre_hook(fail)
try:
    loss_of(model)
except ValueError:
    assert not gathered(model)
handle.remove()
assert loss_of(model).item() == loss.item()
"""
REFUSED = """
from hf_ensemble.capture import GradientExtractor
from hf_ensemble.errors import CaptureError, ConfigurationError
from hf_ensemble.train.inputs.sharding import check_whole

base = toy.llama()
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
deepspeed.zero.Init(module=base, mem_efficient_linear=False, dtype=torch.float32)
model = toy.with_lora(base)
for check, error, said in (
    (check_whole, ConfigurationError, "loaded while arguments with deepspeed were there"),
    (lambda model: GradientExtractor(model, 16), CaptureError, "that DeepSpeed has cut"),
):
    try:
        check(model)
    except error as refusal:
        assert said in str(refusal)
    else:
        raise AssertionError("nothing gathers it")
"""


@pytest.mark.parametrize("code", [SAME, FREED, REFUSED], ids=["same", "freed", "refused"])
def test_cut_bases(code):
    for rank in run_ranks(CODE + code, 2):
        assert rank.returncode == 0, rank.stderr[-3000:]
