"""`hf-ensemble generate` answers as an evaluation does: whatever the batch, and up to the same token."""

import json

import pytest
import torch
from peft import get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    BartConfig,
    BartForConditionalGeneration,
    DataCollatorForSeq2Seq,
)

from helpers import toy
from helpers.markdown import code_blocks
from hf_ensemble import PeftEnsembleModel
from hf_ensemble.cli.main import main
from hf_ensemble.evaluate import AnswerEvaluator
from hf_ensemble.evaluate.answers import Question
from hf_ensemble.tasks import TaskCollator

PROMPTS = ["1 + 1", "the film was very good", "sum : 3 + 4 = 7 : sum", "2", "9 + 9 - 3 + 1 ="]


def bart():
    torch.manual_seed(0)
    size = {"vocab_size": len(toy.VOCABULARY), "d_model": 16, "max_position_embeddings": 64, "init_std": 0.5}
    sides = {"layers": 1, "attention_heads": 2, "ffn_dim": 24}
    size |= {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in sides.items()}
    tokens = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 2, "decoder_start_token_id": 2}
    return BartForConditionalGeneration(BartConfig(**size, **tokens, forced_eos_token_id=None)).eval()


def saved_ensemble(base, auto_class, folder, **settings):
    """Of one member."""
    toy.save_model(base, folder / "base")
    model = get_peft_model(auto_class.from_pretrained(folder / "base"), toy.lora(**settings), "one")
    toy.randomize(model)
    PeftEnsembleModel(model, ["one"], {"t": {"one": 1.0}}).save_pretrained(folder / "saved")
    return folder / "saved"


def answers(capsys, folder, *flags):
    line = ["generate", "--ensemble", str(folder), "--task", "t", "--prompts", *PROMPTS, "--json"]
    assert main([*line, "--max_new_tokens", "6", *flags]) == 0
    return [own["answer"] for own in json.loads(capsys.readouterr().out)["answers"]]


def test_an_encoder_decoder_that_counts_positions_through_padding_answers_alike_in_every_batch(tmp_path, capsys):
    settings = {"task_type": "SEQ_2_SEQ_LM", "target_modules": ["q_proj", "v_proj"]}
    saved = saved_ensemble(bart(), AutoModelForSeq2SeqLM, tmp_path, **settings)
    alone = answers(capsys, saved, "--batch_size", "1")
    assert len(set(alone)) > 2
    assert answers(capsys, saved, "--batch_size", "5") == alone
    # Nor does the card's code pad on the left.
    code = code_blocks((saved / "README.md").read_text(), "python")[0]
    assert "AutoTokenizer.from_pretrained" in code and "padding_side" not in code


@pytest.mark.parametrize("is_list", [False, True])
def test_answers_end_at_the_end_of_the_tokenizer_beside_the_ensemble_too(tmp_path, capsys, monkeypatch, is_list):
    """As after `run --eos_token`, whose adapters have learnt to end with another token than the base."""
    base = toy.llama(initializer_range=0.5)
    if is_list:
        base.generation_config.eos_token_id = [2, 1]
    saved = saved_ensemble(base, AutoModelForCausalLM, tmp_path)
    whole = answers(capsys, saved)
    words = [answer.split() for answer in whole]
    end = next(word for own in words for word in own[1:-1] if word not in own[:1])
    tokenizer = toy.tokenizer()
    tokenizer.eos_token = end
    tokenizer.save_pretrained(saved)
    found = answers(capsys, saved)
    assert found == [" ".join(own[: own.index(end)] if end in own else own) for own in words] != whole
    ensemble, tokenizer = PeftEnsembleModel.from_pretrained(saved), AutoTokenizer.from_pretrained(saved)
    evaluator = AnswerEvaluator(ensemble, tokenizer, TaskCollator(DataCollatorForSeq2Seq(tokenizer)), {}, 8)

    def generate(input_ids, attention_mask, tasks, settings):
        return ensemble.generate(input_ids, tasks, attention_mask=attention_mask, generation_config=settings)

    questions = [Question("t", tokenizer(prompt)["input_ids"], "") for prompt in PROMPTS]
    assert evaluator.answers(generate, questions, 6) == found
    # So does the code of a card that is written beside the tokenizer.
    monkeypatch.chdir(tmp_path)
    ensemble.save_pretrained(saved)
    card = (saved / "README.md").read_text().replace("path/to/saved", str(saved))
    cut, namespace = next(prompt for prompt, short, long in zip(PROMPTS, found, whole) if short != long), {}
    for block in code_blocks(card, "python"):
        if "vllm" in block:
            assert "stop_token_ids=[tokenizer.eos_token_id]" in block
        else:
            exec(block.replace("A prompt of t", cut).replace("=64", "=6"), namespace)
    short = found[PROMPTS.index(cut)]
    for answer in (namespace["answers"][0], namespace["generated"][0, namespace["batch"]["input_ids"].shape[1] :]):
        assert namespace["tokenizer"].decode(answer, skip_special_tokens=True).strip() == short
