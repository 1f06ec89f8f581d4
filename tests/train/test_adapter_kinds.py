"""Every kind of adapter and base model goes through a whole run, or is refused before anything is trained."""

import peft
import pytest
import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPVisionConfig,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlavaConfig,
    LlavaForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
)

from helpers import toy
from helpers.trainers import ESTIMATE, SMALL, sft_config, split
from hf_ensemble import (
    EnsembleConfig,
    EnsembleSFTTrainer,
    EnsembleTrainer,
    PeftEnsembleModel,
    SelectionConfig,
    SelectionSFTConfig,
    SelectionSFTTrainer,
    SelectionTrainer,
)
from hf_ensemble.errors import ConfigurationError

TASKS = {
    name: {"train": toy.sum_rows(6, 1, word), "validation": toy.sum_rows(3, 2, word)}
    for name, word in (("sums", "sum"), ("diffs", "diff"))
}
QUICK = {"num_train_epochs": 1, "num_components": 4, "projection_dim": 16}


def _lora(**settings):
    return toy.lora(**{"target_modules": ["q_proj", "v_proj"], **settings})


def _linear(kind, **settings):
    return kind(task_type="CAUSAL_LM", target_modules=["q_proj"], **settings)


# The others train their groups alone.
WITH_BASELINE = {"LoRA", "IA3", "VeRA", "token rows, tied", "saved head, tied", "encoder-decoder"}
# By name: trainer, base model and adapter.
FINISHED = {
    "LoRA": ("sft", "plain", _lora(use_rslora=True, rank_pattern={"q_proj": 2})),
    "DoRA": ("sft", "plain", _lora(use_dora=True)),
    "LoRA with biases of its own": ("sft", "plain", _lora(lora_bias=True)),
    "Gaussian start": ("sft", "plain", _lora(init_lora_weights="gaussian")),
    "IA3": ("sft", "plain", peft.IA3Config(
        task_type="CAUSAL_LM", target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]
    )),
    "IA3 with a saved head": ("sft", "plain", peft.IA3Config(
        task_type="CAUSAL_LM", target_modules=["k_proj"], feedforward_modules=[], modules_to_save=["lm_head"]
    )),
    "LoHa": ("sft", "plain", _linear(peft.LoHaConfig, r=2)),
    "OFT": ("sft", "plain", _linear(peft.OFTConfig, r=0, oft_block_size=4)),
    "VeRA": ("sft", "plain", _linear(peft.VeraConfig, r=4)),
    "token rows": ("sft", "plain", _lora(trainable_token_indices=[5, 6])),
    "token rows, tied": ("text", "tied", _lora(trainable_token_indices=[5, 6])),
    "saved embeddings": ("sft", "plain", _lora(modules_to_save=["embed_tokens", "lm_head"])),
    "saved embeddings, tied": ("sft", "tied", _lora(modules_to_save=["embed_tokens"], ensure_weight_tying=True)),
    "saved head, tied": ("sft", "tied", _lora(modules_to_save=["lm_head"], ensure_weight_tying=True)),
    "saved norm": ("sft", "plain", _lora(modules_to_save=["norm"])),
    "LoRA on embeddings": ("sft", "plain", _lora(target_modules=["q_proj", "embed_tokens"])),
    "LoRA on embeddings, tied": (
        "text", "tied", _lora(target_modules=["q_proj", "embed_tokens"], ensure_weight_tying=True),
    ),
    "LoRA on the head": ("text", "plain", _lora(target_modules=["q_proj", "lm_head"])),
    "resized vocabulary": ("sft", "resized", _lora()),
    "resized vocabulary, saved head": ("sft", "resized", _lora(modules_to_save=["lm_head"])),
    "resized vocabulary, LoRA on embeddings": ("sft", "resized", _lora(target_modules=["q_proj", "embed_tokens"])),
    "resized vocabulary, token rows": ("sft", "resized", _lora(trainable_token_indices=[45, 46])),
    "resized vocabulary, tied": ("sft", "resized tied", _lora()),
    "smaller vocabulary": ("sft", "smaller", _lora()),
    "encoder-decoder": ("text", "t5", peft.LoraConfig(task_type="SEQ_2_SEQ_LM", target_modules=["q", "v"], r=2)),
}  # fmt: skip
# By name: trainer, base model, adapter and what the message says.
REFUSED = {
    "AdaLoRA": ("sft", "plain", _linear(peft.AdaLoraConfig, total_step=9), "peft_type 'ADALORA'.*Use LoraConfig"),
    "VeRA without its projections": (
        "sft", "plain", _linear(peft.VeraConfig, r=4, save_projection=False), "save_projection False",
    ),
    "prompt tuning": (
        "sft", "plain", peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3), "'PROMPT_TUNING'",
    ),
    "prefix tuning": (
        "sft", "plain", peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3), "'PREFIX_TUNING'",
    ),
    "token rows alone": (
        "sft", "plain", peft.TrainableTokensConfig(task_type="CAUSAL_LM", token_indices=[3]),
        r"Use LoraConfig\(trainable_token_indices=",
    ),
    "biases": ("sft", "plain", _lora(bias="lora_only"), "bias 'lora_only'.*lora_bias=True"),
    "all biases": ("text", "plain", _lora(bias="all"), "bias 'all'.*lora_bias=True"),
    "PiSSA": ("sft", "plain", _lora(init_lora_weights="pissa"), "'pissa', which changes the base model.*Use True"),
    "OLoRA": ("text", "plain", _lora(init_lora_weights="olora"), "'olora', which changes the base model"),
    "replicated layers": ("sft", "plain", _lora(layer_replication=[[0, 2], [1, 2]]), "layer_replication.*Leave it out"),
    "invocation tokens": ("sft", "plain", _lora(alora_invocation_tokens=[3]), "alora_invocation_tokens"),
    "token rows, tied": ("sft", "tied", _lora(trainable_token_indices=[5]), "tie_word_embeddings=False"),
    "encoder-decoder": (
        "sft", "t5", peft.LoraConfig(task_type="SEQ_2_SEQ_LM", target_modules=["q"]), "encoder-decoder. Use Ensemble",
    ),
    "vision": ("sft", "vision", _lora(), "has to load its base model again.*found LlavaForConditionalGeneration"),
}  # fmt: skip


def t5():
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    tokens = {"pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0}
    return T5ForConditionalGeneration(T5Config(vocab_size=len(toy.VOCABULARY), **sizes, **tokens)).eval()


def vision():
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    eye = CLIPVisionConfig(**sizes, image_size=8, patch_size=4, projection_dim=16)
    return LlavaForConditionalGeneration(
        LlavaConfig(vision_config=eye, text_config=toy.llama().config, image_token_index=44)
    )


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Folders of the base models by name."""
    folder = tmp_path_factory.mktemp("bases")
    made = {
        "plain": toy.llama(attention_bias=True),
        "tied": toy.llama(tie_word_embeddings=True),
        "t5": t5(),
        "vision": vision(),
    }
    return {name: toy.save_model(model, folder / name) for name, model in made.items()}


def model_of(name, bases):
    """What a trainer is given, and its tokenizer."""
    words = name.split()
    if words[0] not in ("resized", "smaller"):
        return bases[name], AutoTokenizer.from_pretrained(bases[name])
    folder = bases[words[1] if len(words) > 1 else "plain"]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    if words[0] == "resized":
        tokenizer.add_tokens(["<call>", "<reply>"])
    torch.manual_seed(3)
    model.resize_token_embeddings(len(tokenizer) - (4 if words[0] == "smaller" else 0), mean_resizing=False)
    return model, tokenizer


def trainer_of(kind, model, tokenizer, config, folder, train_baseline=False):
    tasks = TASKS
    if len(tokenizer) > len(toy.VOCABULARY):
        tasks = {
            name: {key: [{**row, "prompt": f"<call> {row['prompt']}"} for row in rows] for key, rows in own.items()}
            for name, own in tasks.items()
        }
    arguments = {"model": model, "processing_class": tokenizer, "peft_config": config}
    arguments |= {"train_dataset": split(tasks, "train"), "eval_dataset": split(tasks, "validation")}
    changes = {**QUICK, "num_groups": 2, "train_baseline": train_baseline, "calibration_runs": 0}
    if kind == "sft":
        return EnsembleSFTTrainer(args=sft_config(folder, **changes), **arguments)
    args = {**SMALL, **ESTIMATE, **changes, "output_dir": str(folder), "affinity_subsets": 20}
    return EnsembleTrainer(args=EnsembleConfig(**args), **arguments)


@pytest.mark.parametrize("name", FINISHED)
def test_a_run_is_finished_and_its_ensemble_loaded(name, bases, tmp_path):
    kind, base, config = FINISHED[name]
    model, tokenizer = model_of(base, bases)
    trainer = trainer_of(kind, model, tokenizer, config, tmp_path / "run", name in WITH_BASELINE)
    metrics = trainer.train().metrics
    assert metrics["eval_mean_loss"] > 0 and ("eval_baseline_mean_loss" in metrics) == (name in WITH_BASELINE)
    loaded = PeftEnsembleModel.from_pretrained(tmp_path / "run" / "ensemble")
    names, weights = trainer.ensemble.adapter_names, {}
    assert loaded.adapter_names == names and {"group_0", "group_1"} <= set(names)
    weights["all"] = dict.fromkeys(names, 1 / len(names))
    weights |= {name: {name: 1.0} for name in names}
    trainer.ensemble.weights = loaded.weights = weights
    torch.manual_seed(0)
    tasks = list(weights)
    ids = torch.randint(3, len(tokenizer) - 4, (len(tasks), 6))
    ids[:, 0] = len(tokenizer) - 1 if base.startswith("resized") else 5
    inputs = {"input_ids": ids, "task": tasks}
    if base == "t5":
        inputs["decoder_input_ids"] = ids[:, :3]
    with torch.no_grad():
        expected = trainer.ensemble.eval()(**inputs).logits
        for fused in (True, False):
            loaded.fused = fused
            assert torch.allclose(loaded(**inputs).logits, expected, atol=1e-5)
        if base in ("plain", "tied"):
            # Each member is what plain PEFT makes of its folder alone.
            folder = tmp_path / "run" / "ensemble" / "adapters" / "group_0"
            stock = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(bases[base]), folder).eval()
            row = tasks.index("group_0")
            assert torch.allclose(stock(input_ids=ids[row : row + 1]).logits[0], expected[row], atol=1e-5)


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_finished_is_refused_by_the_constructor(name, bases, tmp_path):
    kind, base, config, message = REFUSED[name]
    model, tokenizer = model_of(base, bases)
    with pytest.raises(ConfigurationError, match=f"(?s){message}"):
        trainer_of(kind, model, tokenizer, config, tmp_path / "run")
    assert not list(tmp_path.rglob("*.json"))


def test_adapters_are_refused_before_the_model_is_loaded(tmp_path):
    arguments = {"train_dataset": split(TASKS, "train"), "eval_dataset": split(TASKS, "validation")}
    config = _lora(init_lora_weights="pissa")
    for trainer, args, more in (
        (SelectionSFTTrainer, sft_config(tmp_path / "run", SelectionSFTConfig), {"target": "sums"}),
        (SelectionTrainer, SelectionConfig(output_dir=str(tmp_path / "run"), use_cpu=True), {"target": "sums"}),
        (EnsembleSFTTrainer, sft_config(tmp_path / "run"), {}),
    ):
        with pytest.raises(ConfigurationError, match="'pissa'"):
            trainer(model="nobody/nowhere", args=args, peft_config=config, **arguments, **more)
    # The same for a model that brings its adapter.
    model = peft.get_peft_model(toy.llama(), config)
    with pytest.raises(ConfigurationError, match="'pissa'"):
        EnsembleSFTTrainer(model=model, args=sft_config(tmp_path / "run"), **arguments)


def test_a_resized_vocabulary_is_loaded_by_plain_peft_too(bases, tmp_path):
    model, tokenizer = model_of("resized", bases)
    trainer = trainer_of("sft", model, tokenizer, _lora(), tmp_path / "run")
    trainer.train()
    base = AutoModelForCausalLM.from_pretrained(bases["plain"])
    base.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    adapter = tmp_path / "run" / "ensemble" / "adapters" / "group_0"
    stock = peft.PeftModel.from_pretrained(base, adapter).eval()
    ids = torch.tensor([[45, 5, 46, 7]])
    own = trainer.ensemble.model.eval()
    own.set_adapter("group_0")
    with torch.no_grad():
        assert torch.allclose(stock(input_ids=ids).logits, own(input_ids=ids).logits, atol=1e-6)
        alone = PeftEnsembleModel.from_adapters(bases["plain"], {"a": adapter})
        assert torch.allclose(stock(input_ids=ids).logits, alone(input_ids=ids).logits, atol=1e-6)


def gpt2_classifier(folder):
    torch.manual_seed(0)
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64, "num_labels": 4}
    config = GPT2Config(vocab_size=len(toy.VOCABULARY), **sizes, pad_token_id=None, bos_token_id=2, eos_token_id=2)
    return toy.save_model(GPT2ForSequenceClassification(config), folder)


def classifier_trainer(base, tokenizer, folder):
    tasks = toy.text_tasks(6, 3)
    return EnsembleTrainer(
        model=base,
        args=EnsembleConfig(**{**SMALL, **ESTIMATE, **QUICK, "output_dir": str(folder), "num_groups": 2}),
        train_dataset=split(tasks, "train"),
        eval_dataset=split(tasks, "validation"),
        processing_class=tokenizer,
        peft_config=peft.LoraConfig(task_type="SEQ_CLS", target_modules=["c_attn"], r=2, fan_in_fan_out=True),
    )


def test_a_classifier_without_a_padding_token_takes_the_tokenizers(tmp_path):
    trainer = classifier_trainer(gpt2_classifier(tmp_path / "base"), toy.tokenizer(), tmp_path / "run")
    trainer.train()
    loaded = PeftEnsembleModel.from_pretrained(tmp_path / "run" / "ensemble")
    batch = toy.tokenizer()(["the film was good", "bad film"], padding=True, return_tensors="pt")
    with torch.no_grad():
        found = [own(**batch, task="films").logits for own in (loaded, trainer.ensemble.eval())]
    assert torch.allclose(*found, atol=1e-5)


def test_a_tokenizer_without_a_padding_token_is_refused(tmp_path):
    tokenizer = toy.tokenizer()
    tokenizer.pad_token = None
    with pytest.raises(ConfigurationError, match="padding token.*Set tokenizer.pad_token"):
        classifier_trainer(gpt2_classifier(tmp_path / "base"), tokenizer, tmp_path / "run")
    assert not list((tmp_path / "run").rglob("*.json"))


def test_the_encoder_does_not_see_the_answer(bases, tmp_path):
    model, tokenizer = model_of("t5", bases)
    config = peft.LoraConfig(task_type="SEQ_2_SEQ_LM", target_modules=["q"], r=2)
    trainer = trainer_of("text", model, tokenizer, config, tmp_path / "run")
    row, raw = trainer.train_dataset[0], TASKS["sums"]["train"][0]
    assert tokenizer.decode(row["input_ids"]) == raw["prompt"]
    assert tokenizer.decode(row["labels"]) == f"{raw['completion'].strip()} <eos>"
    chats = [{"messages": [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]}]
    rows = {name: Dataset.from_list(chats * 3) for name in TASKS}
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    with pytest.raises(ConfigurationError, match="encoder-decoder model; found chats"):
        EnsembleTrainer(
            model=model,
            args=EnsembleConfig(output_dir=str(tmp_path / "run"), use_cpu=True),
            train_dataset=rows,
            eval_dataset=rows,
            processing_class=tokenizer,
            peft_config=config,
        )
