"""Local stand-ins for the datasets that trl's tests load: the same columns and splits, other text."""

import json
from pathlib import Path

from datasets import Dataset, Features, Image, List, Value
from PIL import Image as Picture

# Every sentence has seven words: with the full stop and the end token nine tokens a row. Tests count packed rows.
TRAIN_SENTENCES = (
    "The old gardener waters roses every morning.",
    "A small river runs behind our house.",
    "Seven swallows rest upon the telegraph wire.",
    "Fresh bread cools beside the open window.",
    "My neighbour repairs clocks during winter evenings.",
    "Heavy clouds gather above the northern hills.",
    "The baker counts coins before closing time.",
    "Two grey cats sleep under the stairs.",
    "Bright lanterns hang along the harbour wall.",
    "Her brother paints boats with blue stripes.",
    "Children collect round stones near the shore.",
    "An early train leaves before the sunrise.",
    "Tall grass hides the narrow garden path.",
    "The teacher reads stories after every lunch.",
    "Warm rain falls softly over quiet fields.",
    "Our grandfather keeps bees behind the orchard.",
    "Many travellers stop here for cold water.",
)
TEST_SENTENCES = (
    "The tired sailor mends nets every evening.",
    "Young trees bend when strong winds arrive.",
)
SPLITS = {"train": TRAIN_SENTENCES, "test": TEST_SENTENCES}

WEATHER_TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tells the weather of a town.",
        "parameters": {
            "type": "object",
            "properties": {"town": {"type": "string", "description": "Name of the town."}},
            "required": ["town"],
        },
        "return": {"type": "string", "description": "The weather in one word."},
    },
}


def write_datasets(folder: Path) -> list[str]:
    """Write every stand-in as `folder/OWNER/NAME/CONFIGURATION/SPLIT.parquet`.

    Returns:
        `list[str]`: the names that `load_dataset` can be asked for.
    """
    makers = {
        "trl-internal-testing/zen": ZEN,
        "trl-internal-testing/harmony": HARMONY,
        "trl-internal-testing/toolcall": {"language_modeling": toolcall},
        "trl-internal-testing/zen-image": ZEN_IMAGE,
        "trl-internal-testing/zen-multi-image": ZEN_MULTI_IMAGE,
    }
    for name, configurations in makers.items():
        for configuration, make in configurations.items():
            for split, sentences in SPLITS.items():
                path = folder / name / configuration / f"{split}.parquet"
                path.parent.mkdir(parents=True, exist_ok=True)
                rows = [make(sentence, number) for number, sentence in enumerate(sentences)]
                # Arrow infers dicts that differ from row to row as one struct; pictures have to be declared.
                features = _picture_features(rows) if "images" in rows[0] else None
                Dataset.from_list(rows, features=features).to_parquet(str(path))
    return list(makers)


def halves(sentence: str) -> tuple[str, str]:
    """A sentence as a prompt and its completion."""
    words = sentence.split()
    return " ".join(words[:3]), " " + " ".join(words[3:])


def message(role: str, content: str | None, **more) -> dict:
    return {"role": role, "content": content, **more}


def question(sentence: str) -> dict:
    return message("user", f"Go on: {halves(sentence)[0]}")


def answer(sentence: str, **more) -> dict:
    return message("assistant", sentence, **more)


ZEN = {
    "standard_language_modeling": lambda sentence, number: {"text": sentence},
    "conversational_language_modeling": lambda sentence, number: {"messages": [question(sentence), answer(sentence)]},
    "standard_prompt_completion": lambda sentence, number: dict(zip(("prompt", "completion"), halves(sentence))),
    "conversational_prompt_completion": lambda sentence, number: {
        "prompt": [question(sentence)],
        "completion": [answer(sentence)],
    },
    "standard_implicit_prompt_preference": lambda sentence, number: {
        "chosen": sentence,
        "rejected": " ".join(reversed(sentence.split())),
    },
}


def _harmony(sentence: str, number: int) -> tuple[list[dict], list[dict], dict]:
    """Prompt, completion and template arguments of a row with a thought."""
    asked = [message("system", "Finish what was begun."), question(sentence)]
    given = [answer(sentence, thinking=f"A sentence of {len(sentence.split())} words.")]
    kwargs = {
        "reasoning_effort": ("low", "medium", "high")[number % 3],
        "model_identity": "You write short sentences.",
    }
    return asked, given, kwargs


def harmony_messages(sentence: str, number: int) -> dict:
    asked, given, kwargs = _harmony(sentence, number)
    return {"messages": [*asked, *given], "chat_template_kwargs": kwargs}


def harmony_completion(sentence: str, number: int) -> dict:
    asked, given, kwargs = _harmony(sentence, number)
    return {"prompt": asked, "completion": given, "chat_template_kwargs": kwargs}


HARMONY = {"language_modeling": harmony_messages, "prompt_completion": harmony_completion}


def toolcall(sentence: str, number: int) -> dict:
    """A conversation in which a tool is called; the tools are JSON, as trl reads them."""
    town = sentence.split()[-1].removesuffix(".").title()
    call = {"type": "function", "function": {"name": "weather", "arguments": {"town": town}}}
    messages = [
        message("user", f"How is the weather in {town}?"),
        message("assistant", None, tool_calls=[call]),
        message("tool", "sunny", name="weather"),
        message("assistant", f"It is sunny in {town}."),
    ]
    return {"messages": messages, "tools": json.dumps([WEATHER_TOOL])}


def picture(number: int) -> Picture.Image:
    return Picture.new("RGB", (32, 32), (13 * number % 256, 29 * number % 256, 200))


ZEN_IMAGE = {
    "conversational_language_modeling": lambda sentence, number: {
        "messages": [question(sentence), answer(sentence)],
        "images": [picture(number)],
    },
    "conversational_prompt_completion": lambda sentence, number: {
        "prompt": [question(sentence)],
        "completion": [answer(sentence)],
        "images": [picture(number)],
    },
}
# None, one or two pictures a row.
ZEN_MULTI_IMAGE = {
    "conversational_prompt_completion": lambda sentence, number: {
        "prompt": [question(sentence)],
        "completion": [answer(sentence)],
        "images": [picture(number + other) for other in range(number % 3)],
    },
}


def _picture_features(rows: list[dict]) -> Features:
    messages = List({"role": Value("string"), "content": Value("string")})
    return Features({name: List(Image()) if name == "images" else messages for name in rows[0]})
