"""Can predictions tell right from random answers to additions? The experiment of GradEx (arXiv 2409.19458).

    python -m benchmarks.noisy_addition.run OUTPUT

A GPT-2-shaped model is trained from scratch on additions of five digits with their intermediate steps, two in five of
them answered with random digits: it can add, but has learned not to rely on it. 500 further examples, 300 of
them right and 200 random, form 20 groups of 25; 25 more right ones are the target's training rows, and 200 its
validation rows. Groups are scored by the predicted loss of the target over 200 random subsets of 7 groups, and single
examples by their influence on it. Nothing is fine-tuned.
"""

import random
import tempfile
import time

import numpy as np
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from sklearn.metrics import roc_auc_score
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast, TrainingArguments, set_seed

from hf_ensemble import CaptureConfig, DataSelector, TaskSet, capture_gradients
from hf_ensemble.capture import training_recipe

from ..common import make_parser, write_results
from ..models import train_from_scratch
from .table import table

DIGITS, GROUPS, CLEAN_GROUPS, GROUP_SIZE = 5, 20, 12, 25
NUM_SUBSETS, SUBSET_SIZE = 200, 7
SYMBOLS = [*"0123456789", "+", "=", ",", ":"]


def addition(generator: random.Random, noisy: bool = False) -> dict[str, str]:
    """A sum with its steps, digit and carry from the last digit on, and its result; all digits random if `noisy`."""
    first, second = (generator.randrange(10 ** (DIGITS - 1), 10**DIGITS) for _ in range(2))
    carry, steps = 0, []
    for x, y in zip(reversed(str(first)), reversed(str(second))):
        carry, digit = divmod(int(x) + int(y) + carry, 10)
        steps.append(f"{digit}{carry}")
    answer = f"{','.join(steps)}:{first + second}"
    if noisy:
        answer = "".join(generator.choice("0123456789") if symbol.isdigit() else symbol for symbol in answer)
    return {"prompt": f"{first}+{second}=", "completion": answer}


def tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token per symbol."""
    model = Tokenizer(models.WordLevel({symbol: i for i, symbol in enumerate(["<pad>", "</s>", *SYMBOLS])}, "<pad>"))
    model.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=model, pad_token="<pad>", eos_token="</s>")


def pretrained(tokens: PreTrainedTokenizerFast, rows: int, seed: int) -> GPT2LMHeadModel:
    """The model after one epoch on `rows` additions, right and random in the same proportion as the groups."""
    set_seed(seed)
    generator = random.Random(seed)
    share = 1 - CLEAN_GROUPS / GROUPS
    texts = ["".join(addition(generator, generator.random() < share).values()) + tokens.eos_token for _ in range(rows)]
    encoded = tokens(texts, padding=True)
    ids, mask = np.array(encoded["input_ids"]), np.array(encoded["attention_mask"])
    data = {"input_ids": ids, "attention_mask": mask, "labels": np.where(mask == 1, ids, -100)}
    config = GPT2Config(
        vocab_size=len(tokens),
        n_positions=64,
        n_embd=128,
        n_layer=4,
        n_head=4,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=tokens.eos_token_id,
        eos_token_id=tokens.eos_token_id,
        pad_token_id=tokens.pad_token_id,
    )
    model = GPT2LMHeadModel(config)
    rows_of_ids = Dataset.from_dict({name: values.tolist() for name, values in data.items()})
    with tempfile.TemporaryDirectory() as folder:
        train_from_scratch(
            model,
            rows_of_ids,
            folder,
            per_device_train_batch_size=64,
            num_train_epochs=1,
            learning_rate=1e-3,
            logging_steps=200,
            disable_tqdm=True,
            seed=seed,
        )
    return model


def tasks(seed: int) -> tuple[TaskSet, dict[str, bool]]:
    """Tasks of the target and the groups, and which groups are noisy."""
    generator = random.Random(seed + 1)
    noisy = {f"group_{index:02d}": index >= CLEAN_GROUPS for index in range(GROUPS)}
    validation = Dataset.from_list([addition(generator) for _ in range(200)])
    train = {"target": Dataset.from_list([addition(generator) for _ in range(GROUP_SIZE)])}
    for name, wrong in noisy.items():
        train[name] = Dataset.from_list([addition(generator, wrong) for _ in range(GROUP_SIZE)])
    few = validation.select(range(2))
    return TaskSet.from_datasets(train, {name: validation if name == "target" else few for name in train}), noisy


def measure(rows: int, seed: int) -> dict:
    """Results of one world, from its base model to its scores."""
    tokens = tokenizer()
    model = get_peft_model(
        pretrained(tokens, rows, seed),
        LoraConfig(r=8, target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True, task_type="CAUSAL_LM"),
    )
    world, noisy = tasks(seed)
    # Predictions are for fine-tuning 3 epochs on the 525 rows.
    args = TrainingArguments("none", per_device_train_batch_size=16, learning_rate=5e-4, use_cpu=True, report_to="none")
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        recipe = training_recipe(args, 3 * -(-(GROUPS + 1) * GROUP_SIZE // 16))
        config = CaptureConfig(projection_dim=None)
        store = capture_gradients(model, world, config, folder, tokens, disable_tqdm=True, recipe=recipe)
        captured = time.perf_counter() - start
        selector = DataSelector.from_store(store)
    start = time.perf_counter()
    selection = selector.select(
        "target", "random_ensemble", num_subsets=NUM_SUBSETS, subset_size=SUBSET_SIZE, seed=seed
    )
    examples = selector.score_examples("target").scores
    chosen = time.perf_counter() - start
    labels = [wrong for name, wrong in noisy.items() for _ in examples[name]]
    influence = [-score for name in noisy for score in examples[name].values()]
    base = selector.estimator.base_loss()[selector.estimator.task_names.index("target")]
    return {
        "seed": seed,
        "base_loss": float(base),
        "groups_auc": roc_auc_score(list(noisy.values()), [selection.scores[name] for name in noisy]),
        "examples_auc": roc_auc_score(labels, influence),
        "group_scores": {name: selection.scores[name] for name in noisy},
        "capture_seconds": captured,
        "choice_seconds": chosen,
    }


def main() -> None:
    parser = make_parser(__file__, __doc__)
    parser.add_argument("--rows", type=int, default=200_000, help="additions that the base model is trained on")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="one world each")
    arguments = parser.parse_args()
    results = {
        "rows": arguments.rows,
        "groups": GROUPS,
        "clean_groups": CLEAN_GROUPS,
        "group_size": GROUP_SIZE,
        "num_subsets": NUM_SUBSETS,
        "subset_size": SUBSET_SIZE,
        "worlds": [measure(arguments.rows, seed) for seed in arguments.seeds],
    }
    write_results(arguments.output, results, table)


if __name__ == "__main__":
    main()
