"""What LoRAX makes of exported adapters, by its rules: ranks that it does not fill up, and what it would leave out."""

import json
from pathlib import Path

import pytest

from helpers import toy
from helpers.member_kinds import KINDS, NAMES, llama, make
from hf_ensemble import PeftEnsembleModel
from hf_ensemble.ensemble.saving.export import export_for_servers
from hf_ensemble.ensemble.saving.lorax import lorax_rank


def filled_up(rank, num_shards):
    """The rank to which LoRAX fills an adapter up for its kernels."""
    smallest = 8 * num_shards
    if rank <= smallest:
        return smallest
    while rank % 16:
        rank += 1
    return rank


@pytest.mark.parametrize("num_shards", [1, 2, 4, 8])
def test_ranks_are_the_smallest_that_lorax_leaves_as_they_are(num_shards):
    for rank in range(1, 200):
        found = lorax_rank(rank, num_shards)
        assert found == min(r for r in range(rank, 300) if filled_up(r, num_shards) == r)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return toy.save_model(llama(num_hidden_layers=3), tmp_path_factory.mktemp("base"))


def exported(base, kinds, folder, **options):
    model = make(type(llama()).from_pretrained(base), kinds)
    weights = {"all": dict.fromkeys(NAMES, 0.5), "second": {"second": 1.0}}
    return export_for_servers(PeftEnsembleModel(model, NAMES, weights), folder, **options)


@pytest.mark.parametrize("num_shards, ranks", [(1, (16, 8)), (2, (16, 16)), (4, (32, 32))])
def test_adapters_have_a_rank_for_the_shards(base, num_shards, ranks, tmp_path):
    result = exported(base, KINDS["ranks and scalings"], tmp_path, num_shards=num_shards)
    configs = [json.loads((Path(path) / "adapter_config.json").read_text()) for path in result.adapters.values()]
    assert tuple(config["r"] for config in configs) == ranks
    assert result.lorax_obstacles == {} and result.max_lora_rank == max(ranks)


def test_what_lorax_would_leave_out_is_named_by_task(base, tmp_path):
    """Embeddings, and a module that some layers lack; where the adapters together fill all layers, nothing is."""
    embeddings = exported(base, KINDS["embeddings"], tmp_path / "embeddings")
    assert embeddings.lorax_obstacles == {"all": ["embeddings (model.embed_tokens)"]}
    # The last layer alone, and the first two.
    parts = [{"layers_to_transform": own, "target_modules": ["q_proj"]} for own in ([2], [0, 1], [0])]
    some = exported(base, parts, tmp_path / "some")
    assert some.lorax_obstacles == {"second": ["model.layers.*.self_attn.q_proj (in 2 of 3 layers)"]}
    assert exported(base, KINDS["output layer"], tmp_path / "output").lorax_obstacles == {}
