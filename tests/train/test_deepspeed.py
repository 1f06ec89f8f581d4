"""What of `deepspeed` a run honours."""

import pytest
from accelerate import PartialState
from accelerate.utils import DistributedType
from transformers.integrations import is_deepspeed_zero3_enabled

from helpers.deepspeed import ZERO, needs_deepspeed
from helpers.trainers import sft_config
from hf_ensemble.train.inputs.sharding import without_sharding

pytestmark = needs_deepspeed

# As in the documentation of transformers.
USUAL = {
    "fp16": {"enabled": "auto", "loss_scale": 0},
    "bf16": {"enabled": "auto"},
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}},
    "scheduler": {
        "type": "WarmupDecayLR",
        "params": {"warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": "auto"},
    },
    "zero_optimization": {
        "stage": 3,
        "offload_optimizer": {"device": "none"},
        "overlap_comm": True,
        "contiguous_gradients": True,
        "sub_group_size": 1e9,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
        "stage3_max_live_parameters": 1e9,
        "stage3_max_reuse_distance": 1e9,
        "stage3_gather_16bit_weights_on_model_save": True,
    },
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "steps_per_print": 2000,
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "wall_clock_breakdown": False,
}


@pytest.mark.parametrize(
    ("config", "precision"), [(ZERO, {}), (USUAL, {}), (USUAL, {"fp16": True}), (USUAL, {"bf16": True})]
)
def test_trainings_are_given_arguments_without_deepspeed(config, precision, two_processes, tmp_path):
    args = sft_config(tmp_path, deepspeed=config, lr_scheduler_type="linear", **precision)
    own, sharding = without_sharding(args)
    assert (own.fp16, own.bf16) == (bool(precision.get("fp16")), bool(precision.get("bf16")))
    assert (own.deepspeed, own.deepspeed_plugin) == (None, None) and not hasattr(own, "hf_deepspeed_config")
    assert args.deepspeed == config and sharding is args.deepspeed_plugin
    # No model is cut while it is loaded.
    assert not is_deepspeed_zero3_enabled()
    assert without_sharding(own) == (own, None)


def test_to_accelerate_the_processes_share_rows(two_processes, tmp_path):
    args = sft_config(tmp_path, deepspeed=ZERO)
    device = args.device
    # As it is on a GPU.
    PartialState().distributed_type = DistributedType.DEEPSPEED
    own, _ = without_sharding(args)
    assert own.distributed_state.distributed_type is DistributedType.NO and own.device == device
    assert args.distributed_state.distributed_type is DistributedType.NO
