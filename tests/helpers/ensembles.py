"""What an ensemble computes, by its definition: plain forwards of each adapter, or changed weights of a copy."""

import copy

import torch
from peft.tuners.lora import LoraLayer

from helpers import toy


def outputs_of(model, names, batch):
    """Each adapter's logits on the whole batch, in float32."""
    active, results = model.active_adapter, {}
    for name in names:
        model.set_adapter(name)
        results[name] = model(**batch).logits.float()
    model.set_adapter(active)
    return results


def weighted_logits(model, names, batch, rows):
    """sum_k w_k l_k with one dict of weights per row."""
    return combined(outputs_of(model, names, batch), rows, lambda values, w: sum(v * x for v, x in zip(w, values)))


def combined(outputs, rows, combine):
    """Row by row: `combine(list of logits, list of weights)` over the adapters with a weight."""
    result = []
    for number, weights in enumerate(rows):
        used = [name for name, weight in weights.items() if weight]
        result.append(combine([outputs[name][number] for name in used], [weights[name] for name in used]))
    return torch.stack(result)


def geometric_mean(values, weights):
    return torch.log_softmax(sum(w * torch.log_softmax(v, -1) for v, w in zip(values, weights)), -1)


def arithmetic_mean(values, weights):
    mean = sum(w * torch.softmax(v.double(), -1) for v, w in zip(values, weights)) / sum(weights)
    return mean.log().float()


def with_summed_deltas(model, weights):
    """A copy of the base whose weights are the base's plus the weighted sum of the adapters' deltas."""
    changed = copy.deepcopy(model)
    for module in changed.modules():
        if isinstance(module, LoraLayer):
            for name, weight in weights.items():
                if name in module.lora_A or name in module.lora_embedding_A:
                    module.get_base_layer().weight.data += weight * module.get_delta_weight(name)
    return changed.unload()


def greedy(logits_of, ids, mask, steps):
    """Greedy decoding without a cache; `logits_of` takes the inputs of a step."""
    for _ in range(steps):
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        logits = logits_of({"input_ids": ids, "attention_mask": mask, "position_ids": positions})
        following = logits[:, -1].argmax(-1, keepdim=True)
        ids, mask = torch.cat([ids, following], 1), torch.cat([mask, torch.ones_like(following)], 1)
    return ids


def randomize_adapters(model, names, scale=0.3, seed=1):
    """Every parameter of the adapters away from its start: LoRA, DoRA magnitudes, saved modules, token rows."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if any(f".{name}." in f"{path}." for name in names):
                if "magnitude" in path:
                    parameter.mul_(1 + scale * torch.rand_like(parameter))
                else:
                    parameter.copy_(torch.randn(parameter.shape) * scale)


def prompts(rows=4, length=7, vocabulary=(3, 30)):
    """Prompts of different lengths, padded on the left."""
    torch.manual_seed(2)
    ids = torch.randint(*vocabulary, (rows, length))
    mask = torch.ones_like(ids)
    for row in range(1, rows, 2):
        mask[row, : 1 + row % 3] = 0
        ids[row, : 1 + row % 3] = 0
    return {"input_ids": ids, "attention_mask": mask}


ADAPTERS = {
    "a": toy.lora(r=4),
    "b": toy.lora(r=8, use_rslora=True),
    "c": toy.lora(r=2, lora_alpha=16, target_modules=["q_proj", "down_proj"]),
}
