# %% [markdown]
# # An ensemble from three datasets
#
# Two datasets agree, the third contradicts them: one adapter for all has to compromise, an ensemble has not.
# Everything is generated and the model is tiny, so that the notebook runs on a CPU in well under a minute.

# %%
import random

from datasets import Dataset


def rows(opposite: bool, count: int, seed: int) -> Dataset:
    """Numbers as "small" or "large", or the other way round."""
    draw, made = random.Random(seed), []
    for _ in range(count):
        number = draw.randrange(16)
        made.append({"prompt": f"{number} is", "completion": " large" if (number > 7) != opposite else " small"})
    return Dataset.from_list(made)


train = {"first": rows(False, 48, 1), "second": rows(False, 48, 2), "opposite": rows(True, 48, 3)}
validation = {"first": rows(False, 32, 4), "second": rows(False, 32, 5), "opposite": rows(True, 32, 6)}

# %% [markdown]
# A tokenizer with a token per word, and a model of two layers that has read such sentences with both answers: it knows
# their form, and no rule. Yours is `"Qwen/Qwen3-0.6B"` or the like.

# %%
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

words = ["<pad>", "<unk>", "<eos>", *map(str, range(16)), "is", "small", "large"]
vocabulary = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
vocabulary.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=vocabulary, pad_token="<pad>", unk_token="<unk>", eos_token="<eos>", model_max_length=32
)
random.seed(0)
torch.manual_seed(0)
model = LlamaForCausalLM(
    LlamaConfig(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=32,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=2,
    )
)
optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
for _ in range(150):
    text = [f"{random.randrange(16)} is {random.choice(('small', 'large'))} <eos>" for _ in range(64)]
    ids = tokenizer(text, return_tensors="pt").input_ids
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()

# %% [markdown]
# Train: gradients, one adapter for all, groups, one adapter per group, weights.

# %%
from peft import LoraConfig

from hf_ensemble import EnsembleSFTConfig, EnsembleSFTTrainer, collect_results

trainer = EnsembleSFTTrainer(
    model=model,
    args=EnsembleSFTConfig(
        output_dir="notebook-ensemble",
        use_cpu=True,
        bf16=False,
        num_train_epochs=8,
        learning_rate=1e-2,
        per_device_train_batch_size=16,
        gradient_checkpointing=False,
        disable_tqdm=True,
        report_to="none",
        logging_strategy="no",
        save_strategy="no",
    ),
    train_dataset=train,
    eval_dataset=validation,
    processing_class=tokenizer,
    peft_config=LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules="all-linear"),
)
trainer.train()
print(trainer.grouping.groups, trainer.grouping.summary)

# %% [markdown]
# Every system on every dataset, the base model among them:

# %%
results = collect_results(trainer)
for system, scores in results.scores.items():
    print(f"{system:>10}", {task: f"loss {own.loss:.3f}, accuracy {own.accuracy:.2f}" for task, own in scores.items()})

# %% [markdown]
# One model answers for each dataset as it was trained there. Its card, `notebook-ensemble/ensemble/README.md`, has
# the code that loads it elsewhere.

# %%
ensemble = trainer.model
batch = tokenizer(["13 is", "13 is"], return_tensors="pt", return_token_type_ids=False)
answers = ensemble.generate(**batch, task=["first", "opposite"], max_new_tokens=1)
print(tokenizer.batch_decode(answers))

# %% [markdown]
# Merged to one plain adapter per dataset, for servers that know nothing of ensembles:

# %%
merged = ensemble.merge("opposite")
print(merged.rank, merged.relative_error, merged.vllm_obstacles())
