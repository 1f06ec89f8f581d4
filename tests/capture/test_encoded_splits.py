"""Rows that a capture makes tokens of by itself: what a chat template reads is read, whatever other tasks have."""

from helpers import toy
from hf_ensemble import TaskSet
from hf_ensemble.capture import encoded_splits

TEMPLATE = (
    "{% if tools %}film {% endif %}{% if shout %}book {% endif %}"
    "{% for m in messages %}{% if m['name'] %}{{ m['name'] }} {% endif %}{% if m['thinking'] %}very {% endif %}"
    "{{ m['content'] }} {% endfor %}"
)
TOOLS = [{"type": "function", "function": {"name": "film"}}]


def turns(**more):
    return [{"role": "user", "content": "sum"}, {"role": "assistant", "content": "3", **more}]


def test_messages_tools_and_template_arguments_may_differ_between_tasks():
    tokenizer = toy.tokenizer()
    tokenizer.chat_template = TEMPLATE
    datasets = {
        "plain": [{"messages": turns()}],
        "named": [{"messages": turns(name="good")}, {"messages": turns()}],
        "thoughtful": [{"messages": turns(thinking="long", tool_calls=[{"function": {"name": "film"}}])}],
        "tools": [{"messages": turns(), "tools": TOOLS}],
        "arguments": [{"messages": turns(), "chat_template_kwargs": {"shout": True}}],
    }
    tasks = TaskSet.from_datasets(datasets, datasets)
    encoded = encoded_splits(toy.llama(), tasks, tokenizer, None)
    for split in ("train", "validation"):
        texts = [tokenizer.decode(row) for row in encoded[split]["input_ids"]]
        assert texts == [
            "sum 3",
            "sum good 3",
            "sum 3",
            "sum very 3",
            "film sum 3",
            "book sum 3",
        ]
    assert encoded["train"]["task"][:] == ["plain", "named", "named", "thoughtful", "tools", "arguments"]
