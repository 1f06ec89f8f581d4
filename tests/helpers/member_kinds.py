"""Ensembles of every kind of adapter."""

from peft import PeftModel

from helpers import ensembles, toy

NAMES = ["first", "second", "third"]
WEIGHTS = {
    "x": {"first": 0.7, "second": 0.3},
    "y": {"third": 1.0},
    "z": {"first": 0.5, "second": 1.0, "third": 0.25},
    "minus": {"first": 1.5, "third": -0.5},
}
TASKS = ["x", "y", "z", "minus"]
KINDS = {
    "ranks and scalings": [{"r": 4}, {"r": 8, "use_rslora": True}, {"r": 2, "lora_alpha": 16}],
    "targets": [{"target_modules": ["q_proj"]}, {"target_modules": ["q_proj", "up_proj"]}, {"r": 3}],
    "dora": [{"use_dora": True}, {}, {"use_dora": True, "use_rslora": True}],
    "embeddings": [{"target_modules": ["embed_tokens", "q_proj"]}, {}, {"target_modules": ["embed_tokens"]}],
    "output layer": [{"target_modules": ["lm_head", "v_proj"]}, {}, {"target_modules": ["lm_head"]}],
    "saved modules": [
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj", "o_proj"]},
        {"target_modules": ["up_proj"], "modules_to_save": ["lm_head", "norm"]},
    ],
    "lora bias": [{"lora_bias": True, "target_modules": ["q_proj"]}, {"target_modules": ["q_proj"]}, {}],
    "tokens": [{"trainable_token_indices": [5, 6]}, {}, {"trainable_token_indices": [7]}],
}


def make(base, kinds, scale=0.15):
    settings = [toy.lora(**kind) for kind in kinds]
    model = PeftModel(base, settings[0], adapter_name=NAMES[0])
    for name, config in zip(NAMES[1:], settings[1:]):
        model.add_adapter(name, config)
    ensembles.randomize_adapters(model, NAMES, scale)
    return model.eval()


def llama(**overrides):
    # One attention bias lets lora_bias have a base bias.
    return toy.llama(attention_bias=True, **overrides)


def rows_of(tasks):
    return [WEIGHTS[task] for task in tasks]
