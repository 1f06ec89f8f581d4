"""What vLLM's own code makes of exported adapters: its checks, its names and its matrices."""

import copy
import shlex
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file

from helpers import ensembles, toy
from helpers.member_kinds import KINDS, NAMES, llama, make
from hf_ensemble import PeftEnsembleModel
from hf_ensemble.ensemble.saving.export import export_for_servers
from hf_ensemble.ensemble.saving.vllm import VLLM_RANKS, vllm_obstacles

pytest.importorskip("vllm")
cli_args = pytest.importorskip("vllm.entrypoints.common.cli_args")
lora_model = pytest.importorskip("vllm.lora.lora_model")
LoRAConfig = pytest.importorskip("vllm.config.lora").LoRAConfig
PEFTHelper = pytest.importorskip("vllm.lora.peft_helper").PEFTHelper
FlexibleArgumentParser = pytest.importorskip("vllm.utils.argparse_utils").FlexibleArgumentParser

WEIGHTS = {"first": 0.5, "second": 0.75, "third": -0.25}
# What vLLM's Llama takes: its linear layers, and its embeddings.
MODULES = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "embed_tokens", "lm_head"}
RANKS = [1, 5, 8, 24]


@pytest.fixture(autouse=True)
def without_pinned_memory(monkeypatch):
    """vLLM's builds for GPUs pin what they read, which a machine without one cannot."""
    monkeypatch.setattr(lora_model, "PIN_MEMORY", torch.cuda.is_available(), raising=False)


def as_vllm_loads(folder, max_lora_rank, modules=frozenset(MODULES)):
    """Each module's `lora_a`, `lora_b` and scaling, after the checks that a server makes of an adapter."""
    helper = PEFTHelper.from_local_dir(str(folder), max_position_embeddings=64)
    helper.validate_legal(LoRAConfig(max_lora_rank=max_lora_rank))
    read = lora_model.LoRAModel.from_local_checkpoint(
        str(folder), set(modules), helper, device="cpu", dtype=torch.float32, model_vocab_size=len(toy.VOCABULARY)
    )
    assert read.rank <= max_lora_rank
    return read.loras


def with_loaded(base, loras):
    """A copy of the base with the loaded matrices added to its weights."""
    changed = copy.deepcopy(base)
    for path, lora in loras.items():
        delta = lora.scaling * (lora.lora_b @ lora.lora_a)
        weight = changed.get_submodule(path).weight
        weight.data += delta.T if isinstance(changed.get_submodule(path), torch.nn.Embedding) else delta
    return changed


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return toy.save_model(llama(), tmp_path_factory.mktemp("base"))


def ensemble_on(base, kinds):
    model = make(type(llama()).from_pretrained(base), kinds)
    weights = {"mixed": WEIGHTS, "one": {"second": 1.0}}
    return PeftEnsembleModel(model, NAMES, weights, combination="weights")


@pytest.mark.parametrize("kind", ["ranks and scalings", "targets", "embeddings", "output layer", *RANKS])
@torch.no_grad()
def test_what_vllm_loads_computes_the_weights(base, kind, tmp_path):
    kinds = KINDS[kind] if isinstance(kind, str) else [{"r": kind, "use_rslora": True}, {"r": kind}, {"r": kind}]
    ensemble = ensemble_on(base, kinds)
    exported = export_for_servers(ensemble, tmp_path)
    batch = ensembles.prompts()
    for task, folder in exported.adapters.items():
        loras = as_vllm_loads(folder, exported.max_lora_rank)
        assert len(loras) == len(load_file(Path(folder) / "adapter_model.safetensors")) / 2
        logits = with_loaded(type(llama()).from_pretrained(base).eval(), loras)(**batch).logits
        assert torch.allclose(logits, ensemble(**batch, task=task).logits, atol=1e-5)


def test_vllm_takes_the_ranks_that_we_name_and_no_other():
    for rank in range(1, 514):
        try:
            LoRAConfig(max_lora_rank=rank)
            accepted = True
        except ValueError:
            accepted = False
        assert accepted == (rank in VLLM_RANKS), rank


@pytest.mark.parametrize(
    "settings, reason",
    [
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"use_dora": True}, "DoRA"),
        ({"lora_bias": True}, "bias"),
        ({"bias": "all"}, "bias"),
        ({"r": 513}, "rank 513"),
    ],
)
def test_what_vllm_refuses_is_listed(settings, reason, tmp_path):
    config = LoraConfig(**{"r": 8, "target_modules": ["q_proj"], **settings})
    assert vllm_obstacles(config)
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=reason):
        PEFTHelper.from_local_dir(str(tmp_path), None).validate_legal(LoRAConfig(max_lora_rank=512))


@pytest.mark.parametrize("init", [True, False, "gaussian", "orthogonal", "eva", "mica"])
def test_an_initialization_that_leaves_the_base_as_it_is_is_none_of_vllms_business(init, tmp_path):
    config = LoraConfig(r=8, target_modules=["q_proj"], init_lora_weights=init)
    assert not vllm_obstacles(config)
    config.save_pretrained(tmp_path)
    PEFTHelper.from_local_dir(str(tmp_path), None).validate_legal(LoRAConfig(max_lora_rank=8))


@pytest.mark.parametrize("folder", ["served", "a=b, c"])
def test_vllm_reads_the_command_as_it_is_meant(base, folder, tmp_path):
    tasks = ["plain", "with space", "a=b", "a,b", "-dashed", "--with_underscore=x", '"quoted"', "häuser"]
    model = make(type(llama()).from_pretrained(base), [{"r": 1}] * 3)
    ensemble = PeftEnsembleModel(model, NAMES, {task: {"first": 1.0} for task in tasks})
    exported = export_for_servers(ensemble, tmp_path / folder)
    words = shlex.split(Path(exported.script).read_text())
    parser = FlexibleArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--enable-lora", action="store_true")
    parser.add_argument("--max-lora-rank", type=int)
    parser.add_argument("--max-loras", type=int)
    parser.add_argument("--max-cpu-loras", type=int)
    parser.add_argument("--lora-modules", nargs="+", action=cli_args.LoRAParserAction)
    read = parser.parse_args(words[2:])
    assert {own.name: own.path for own in read.lora_modules} == exported.adapters
