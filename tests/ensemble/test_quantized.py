"""4-bit and 8-bit bases on the CPU."""

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from helpers import oracles, toy
from helpers.captures import causal_batch, relative_error
from hf_ensemble import EnsembleSFTConfig, EnsembleSFTTrainer, PeftEnsembleModel
from hf_ensemble._compat import keep_quantized_weights_in_place
from hf_ensemble.capture import GradientExtractor

FOUR_BIT = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")


@pytest.fixture
def base_folder(tmp_path):
    return toy.save_model(toy.llama(hidden_size=64, intermediate_size=128), tmp_path / "base")


def quantized(folder):
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder, quantization_config=FOUR_BIT), toy.lora())
    torch.manual_seed(0)
    toy.randomize(model)
    return model


def test_gradients_over_a_4_bit_base_equal_autograd_also_after_an_evaluation(base_folder):
    rows, collator = causal_batch("right")
    model = quantized(base_folder)
    keep_quantized_weights_in_place(model)
    extractor = GradientExtractor(model, projection_dim=None)
    first = extractor(collator(rows)).features
    assert not extractor.fallback
    # An evaluation without gradients is what makes bitsandbytes repack weights on some CPUs.
    with torch.no_grad():
        model.eval()(input_ids=collator(rows)["input_ids"])
    assert torch.equal(extractor(collator(rows)).features, first)

    def margin_alone(i):
        ids, labels = (torch.tensor([rows[i][key]]) for key in ("input_ids", "labels"))
        return oracles.margins(model(input_ids=ids).logits, labels)[0]

    assert relative_error(first, oracles.per_example_gradients(model, margin_alone, len(rows))) < 1e-4


def test_ensemble_over_a_4_bit_base(base_folder, tmp_path):
    args = EnsembleSFTConfig(
        output_dir=str(tmp_path / "run"),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        num_train_epochs=1,
        learning_rate=1e-2,
        num_groups=2,
        affinity_subsets=10,
        projection_dim=64,
    )
    trainer = EnsembleSFTTrainer(
        model=base_folder,
        args=args,
        train_dataset=toy.sft_tasks(),
        peft_config=toy.lora(),
        quantization_config=FOUR_BIT,
    )
    metrics = trainer.train().metrics
    assert metrics["eval_mean_loss"] > 0
    loaded = PeftEnsembleModel.from_pretrained(tmp_path / "run" / "ensemble", quantization_config=FOUR_BIT)
    ids = torch.randint(3, 20, (3, 6))
    with torch.no_grad():
        expected = trainer.ensemble.eval()(input_ids=ids, task=list(trainer.tasks)).logits
        found = loaded(input_ids=ids, task=list(trainer.tasks)).logits
    # The trainer keeps adapters of a quantized base in bfloat16.
    assert torch.allclose(found, expected, atol=2e-2)
