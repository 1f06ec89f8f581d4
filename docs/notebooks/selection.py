# %% [markdown]
# # Which datasets help one target
#
# Four small datasets: two whose rules agree, one that contradicts them, and one with random answers. Which of them
# help the first? Everything is generated and the model is tiny, so that the notebook runs on a CPU in well under a
# minute. With your own data, replace the first two cells.

# %%
import random

from datasets import Dataset


def rows(rule: str, count: int, seed: int) -> Dataset:
    """Numbers as "small" or "large", by a rule."""
    draw, made = random.Random(f"{rule}{seed}"), []
    for _ in range(count):
        number = draw.randrange(16)
        is_large = {"same": number > 7, "opposite": number <= 7, "random": draw.random() < 0.5}[rule]
        made.append({"prompt": f"{number} is", "completion": " large" if is_large else " small"})
    return Dataset.from_list(made)


rules = {"target": "same", "friend": "same", "contradiction": "opposite", "noise": "random"}
train = {name: rows(rule, 12 if name == "target" else 48, 1 + i) for i, (name, rule) in enumerate(rules.items())}
validation = {name: rows(rule, 32, 100 + i) for i, (name, rule) in enumerate(rules.items())}

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
# The trainer captures gradients, trains once on everything to calibrate, chooses, and trains the final adapter.

# %%
from peft import LoraConfig

from hf_ensemble import SelectionSFTConfig, SelectionSFTTrainer

trainer = SelectionSFTTrainer(
    model=model,
    args=SelectionSFTConfig(
        output_dir="notebook-selection",
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
    target="target",
)
metrics = trainer.train().metrics
print(trainer.selection.auxiliary, trainer.selection.summary)

# %% [markdown]
# Each step of the search with its prediction, and what simpler choices were predicted to give:

# %%
for step in trainer.selection.path:
    print(f"{step['added']:>30}: predicted loss {step['predicted_loss']:.3f}, close calls {step['close_calls']}")
print({name: round(loss, 3) for name, loss in trainer.selection.baselines.items()})
print("measured:", round(metrics["eval_target_loss"], 3))

# %% [markdown]
# The captured gradients answer further questions without any training: groups, mixtures, single rows.

# %%
selector = trainer.selector()
print(selector.mixture("target").weights)
print(selector.group(num_groups=2).groups)
print({task: len(ids) for task, ids in selector.score_examples("target").worst(0.1).items()})
