"""Generated answers do not depend on batches or padding, and start where the answer of a row does."""

import pytest
import torch
from datasets import Dataset
from transformers import DataCollatorForSeq2Seq, MambaConfig, MambaForCausalLM

from helpers import toy
from hf_ensemble.errors import TaskError
from hf_ensemble.evaluate import AnswerEvaluator, AnswerMetric
from hf_ensemble.tasks import TaskCollator, TaskSet, encode


def evaluator(model, batch_size=8, extract="whole_text", collator=None, **settings):
    tokenizer = toy.tokenizer()
    pad = TaskCollator(collator or DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100))
    metric = AnswerMetric(extract, **{"max_new_tokens": 5, **settings})
    return AnswerEvaluator(model, tokenizer, pad, {"t": metric}, batch_size, disable_tqdm=True)


def generate_with(model):
    def generate(input_ids, attention_mask, tasks, settings):
        assert tasks == ["t"] * len(input_ids)
        return model.generate(input_ids=input_ids, attention_mask=attention_mask, generation_config=settings)

    return generate


def table(count=11):
    rows = toy.sum_rows(count, 3)
    for i, row in enumerate(rows):
        row["prompt"] = "the film was very good : "[: 4 * (i % 4)] + row["prompt"]
    tasks = TaskSet.from_datasets({"t": rows}, {"t": rows[:2]})
    return encode(tasks.table("train"), toy.tokenizer(), tasks.row_format)


def mamba():
    torch.manual_seed(0)
    size = {"vocab_size": len(toy.VOCABULARY), "hidden_size": 16, "state_size": 4, "num_hidden_layers": 2}
    return MambaForCausalLM(MambaConfig(**size, pad_token_id=0, eos_token_id=2, initializer_range=0.5)).eval()


@pytest.mark.parametrize("kind", ["llama", "mamba"])
def test_answers_are_those_of_each_row_alone_whatever_the_batch(kind):
    model = toy.with_lora(toy.llama(initializer_range=0.5)) if kind == "llama" else mamba()
    rows, alone = table(), []
    for row in rows:
        start = row["labels"].count(-100)
        prompt = torch.tensor([row["input_ids"][:start]])
        new = model.generate(
            input_ids=prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=5
        )
        alone.append(toy.tokenizer().decode(new[0, start:], skip_special_tokens=True).strip())
    assert len(set(alone)) > 2 and len({len(row["input_ids"]) for row in rows}) > 2
    model.train()
    state = torch.get_rng_state()
    for batch_size in (1, 3, 64):
        own = evaluator(model, batch_size)
        assert own.answers(generate_with(model), own.questions("t", rows), 5) == alone
    assert model.training and torch.equal(torch.get_rng_state(), state)


def test_generation_is_greedy_and_keeps_the_models_other_settings():
    model = toy.llama(initializer_range=0.5)
    model.generation_config.update(do_sample=True, temperature=5.0, top_k=3, num_beams=2, repetition_penalty=1.7)
    seen = []

    def generate(input_ids, attention_mask, tasks, settings):
        seen.append(settings)
        return generate_with(model)(input_ids, attention_mask, tasks, settings)

    own = evaluator(model)
    first, second = (own.answers(generate, own.questions("t", table()), 5) for _ in range(2))
    assert first == second
    assert (seen[0].do_sample, seen[0].num_beams, seen[0].repetition_penalty) == (False, 1, 1.7)
    assert seen[0].max_new_tokens == 5 and seen[0].eos_token_id == [2]
    assert model.generation_config.do_sample and model.generation_config.max_new_tokens is None


def test_nothing_after_the_end_counts():
    rows = Dataset.from_list(
        [{"input_ids": [5, 6, 7, 2], "labels": [-100, -100, 7, 2], "task": "t", "example_id": "0"}]
    )
    own = evaluator(toy.llama())

    def generate(input_ids, attention_mask, tasks, settings):
        return torch.cat([input_ids, torch.tensor([[7, 2, 9, 9]])], dim=1)

    assert own.questions("t", rows)[0].reference == toy.VOCABULARY[7]
    (found,) = own.score_tasks(generate, {"t": rows, "u": rows}).items()
    assert found[0] == "t" and found[1].figures == {"exact_match": 1.0, "f1": 1.0}
    assert {name: values.tolist() for name, values in found[1].rows.items()} == {
        name: [1.0] * len(rows) for name in ("exact_match", "f1")
    }


def test_the_prompt_of_a_chat_is_everything_before_its_last_answer():
    row = {"input_ids": [3, 4, 5, 6, 7, 8], "labels": [-100, 4, -100, -100, 7, 8], "task": "t", "example_id": "0"}
    (question,) = evaluator(toy.llama()).questions("t", Dataset.from_list([row]))
    assert question.prompt == [3, 4, 5, 6] and question.reference == " ".join(toy.VOCABULARY[i] for i in (7, 8))


@pytest.mark.parametrize("labels", [[3, 4, 5], [-100, -100, -100]])
def test_rows_without_a_prompt_or_an_answer_are_refused_by_name(labels):
    rows = Dataset.from_list([{"input_ids": [3, 4, 5], "labels": labels, "task": "t", "example_id": "seven"}])
    with pytest.raises(TaskError, match="Task 't', example 'seven': expected a prompt before the answer"):
        evaluator(toy.llama()).check({"t": rows})


def test_inputs_besides_tokens_are_refused():
    pad = DataCollatorForSeq2Seq(toy.tokenizer())
    own = evaluator(toy.llama(), collator=lambda rows: {**pad(rows), "pixel_values": torch.zeros(1)})
    with pytest.raises(TaskError, match=r"from tokens alone, found \['pixel_values'\]"):
        own.questions("t", table())
