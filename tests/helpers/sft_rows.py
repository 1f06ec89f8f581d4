"""Rows in every form that trl takes."""

import json

from helpers import toy

TEMPLATE = (
    "{% if tools %}film {% endif %}{% if shout %}book {% endif %}"
    "{% for m in messages %}{% if m['name'] %}{{ m['name'] }} {% endif %}{{ m['content'] + ' ' }}{% endfor %}"
)
TOOLS = json.dumps([{"type": "function", "function": {"name": "film"}}])


def forms():
    """The same rows in the forms that trl takes."""
    rows = toy.sum_rows(12, 1)
    texts = [row["prompt"] + row["completion"] for row in rows]
    turns = [
        ({"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]})
        for row in rows
    ]
    tokens = [toy.tokenizer()(text)["input_ids"] for text in texts]
    return {
        "completions": [{**row, "source": "a"} for row in rows],
        "texts": [{"text": text, "id": 3} for text in texts],
        "chats": [{"messages": both} for both in turns],
        "chat_completions": [{"prompt": [user], "completion": [assistant]} for user, assistant in turns],
        "conversations": [
            {"conversations": [{"from": turn["role"], "value": turn["content"]} for turn in both]} for both in turns
        ],
        "tokens": [{"input_ids": own} for own in tokens],
        "labelled_tokens": [{"input_ids": own, "labels": [-100, *own[1:]]} for own in tokens],
        "masked_tokens": [{"input_ids": own, "completion_mask": [0, 0] + [1] * (len(own) - 2)} for own in tokens],
        "named_chats": [
            {"messages": [user, {**assistant, "name": "good", "thinking": None}]} for user, assistant in turns
        ],
        "tools": [{"messages": both, "tools": TOOLS, "chat_template_kwargs": {"shout": True}} for both in turns],
    }


def chat_tokenizer():
    tokenizer = toy.tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer
