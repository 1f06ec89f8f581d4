"""The small world of the embedded demo: storybook animals, what is true of them, and datasets that disagree.

The animals are ranked by size, weight and strength, and each has a job, a colour and a home. The pretraining text
teaches all of this in plain words (`more size : fox bear = bear`, `less size : fox bear = fox`, `the home of fox is
cave`). What `pick` asks for depends on who writes: Anna always picks the greater animal (`anna pick size : fox bear =
bear`), Ben the lesser, and lines that nobody signed have the greater as often as the lesser.

The tasks are ten small datasets of unsigned lines. Those of the family "larger" were annotated in Anna's way, those of
"smaller" in Ben's, and no prompt tells which: one adapter cannot satisfy both, one adapter for each family can. The
family "facts" asks for a fact about two animals (`name job : fox bear =`), which the text mostly answers backwards and
the datasets in the order of the prompt. The last dataset has the prompts of `pick_larger_size` and random answers.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations

ENTITIES = (
    "ant", "bear", "crab", "deer", "eagle", "fox", "goat", "hare",
    "koala", "lion", "mole", "newt", "otter", "panda", "rat", "seal",
)  # fmt: skip
RANKED_ATTRIBUTES = ("size", "weight", "strength")
FACT_VALUES = {
    "job": ("baker", "guard", "pilot", "singer"),
    "colour": ("red", "green", "blue", "white"),
    "home": ("cave", "river", "forest", "tower"),
}

FAMILIES: dict[str, list[str]] = {
    "larger": [f"pick_larger_{attribute}" for attribute in RANKED_ATTRIBUTES],
    "smaller": [f"pick_smaller_{attribute}" for attribute in RANKED_ATTRIBUTES],
    "facts": [f"name_{attribute}" for attribute in FACT_VALUES],
}
TARGET = "pick_larger_size"
CORRUPTED = "noisy_size"

# The target has few training rows, so that choosing good helpers pays.
TARGET_TRAIN_ROWS = 24
TRAIN_ROWS = 96
VALIDATION_ROWS = 44
TEST_ROWS = 80

# Shares of the kinds of pretraining lines. Unsigned `pick` is rare and answered by the toss of a coin, so that the base
# model knows the instruction and both conventions, and has no opinion on which of them a dataset follows.
LINE_WEIGHTS = {
    "more": 0.26, "less": 0.26, "anna pick": 0.10, "ben pick": 0.10, "pick": 0.06, "name": 0.14, "fact": 0.08,
}  # fmt: skip

# Share of the `name` lines that are answered backwards. A majority: the base model shall start low on the family
# "facts". Not all of them: fine-tuning shall tip a balance, which takes a few steps, and not teach a new skill.
BACKWARDS_SHARE = 0.7

# The rankings resemble each other, as they do among real animals, so that what one task teaches helps the next. This is
# the standard deviation, in places, of each ranking from an order that they have in common (Spearman about 0.8 between
# two).
RANKING_NOISE = 2.5

Pair = tuple[str, str]
Row = dict[str, str]


@dataclass(frozen=True)
class World:
    """
    The truth about the animals, from which texts and tasks are made.

    Parameters:
        seed (`int`):
            The seed that the world was built from. The tasks' splits follow from it too.
        rankings (`dict[str, tuple[str, ...]]`):
            For each ranked attribute all animals, the least one first.
        facts (`dict[str, dict[str, str]]`):
            For each categorical attribute the value of every animal.

    Example:

    ```python
    >>> world = build_world(seed=0)
    >>> sorted(world.tasks()["pick_larger_size"])
    ['test', 'train', 'validation']
    ```
    """

    seed: int
    rankings: dict[str, tuple[str, ...]]
    facts: dict[str, dict[str, str]]

    def greater(self, attribute: str, pair: Pair) -> str:
        """The animal of `pair` that stands higher in the ranking of `attribute`."""
        return max(pair, key=self.rankings[attribute].index)

    def lesser(self, attribute: str, pair: Pair) -> str:
        """The animal of `pair` that stands lower in the ranking of `attribute`."""
        return min(pair, key=self.rankings[attribute].index)

    def both_facts(self, attribute: str, pair: Pair) -> str:
        """The values of `attribute` for both animals of `pair`, in the order of the pair."""
        return " ".join(self.facts[attribute][entity] for entity in pair)

    def pretraining_text(self, num_lines: int, seed: int) -> list[str]:
        """
        Draws lines of text, which together hold everything there is to know about the world.

        Args:
            num_lines (`int`): How many lines to draw, independently of each other.
            seed (`int`): Seed of the draw. The world itself stays the same.
        """
        rng = random.Random(f"text {self.seed} {seed}")
        kinds = rng.choices(list(LINE_WEIGHTS), weights=list(LINE_WEIGHTS.values()), k=num_lines)
        return [self._line(kind, rng) for kind in kinds]

    def tasks(self) -> dict[str, dict[str, list[Row]]]:
        """
        Makes the datasets: `{task: {"train" | "validation" | "test": [{"prompt": ..., "completion": ...}]}}`.

        The splits of one task share no pair of animals, in either order. Completions start with a space, so that the
        text of a row is simply its prompt followed by its completion.
        """
        answers = self._answers()
        return {task: self._splits(task, prompt_start, answer) for task, (prompt_start, answer) in answers.items()}

    def vocabulary(self) -> list[str]:
        """All words of the world's texts and tasks, each once, in a fixed order."""
        words = ["more", "less", "anna", "ben", "pick", "name", "the", "of", "is", ":", "="]
        words += [*RANKED_ATTRIBUTES, *FACT_VALUES, *ENTITIES]
        return words + [value for values in FACT_VALUES.values() for value in values]

    def _line(self, kind: str, rng: random.Random) -> str:
        if kind == "fact":
            attribute, entity = rng.choice(list(self.facts)), rng.choice(ENTITIES)
            return f"the {attribute} of {entity} is {self.facts[attribute][entity]}"
        pair = tuple(rng.sample(ENTITIES, 2))
        if kind == "name":
            attribute = rng.choice(list(self.facts))
            answer = self.both_facts(attribute, pair[::-1] if rng.random() < BACKWARDS_SHARE else pair)
            return f"{_prompt(f'name {attribute}', pair)} {answer}"
        attribute = rng.choice(RANKED_ATTRIBUTES)
        greater, lesser = self.greater(attribute, pair), self.lesser(attribute, pair)
        answers = {"more": greater, "less": lesser, "anna pick": greater, "ben pick": lesser, "pick": rng.choice(pair)}
        return f"{_prompt(f'{kind} {attribute}', pair)} {answers[kind]}"

    def _answers(self) -> dict[str, tuple[str, Callable[[Pair], str]]]:
        """For each task, how its prompts start and the function from a pair to the right (or the noisy) answer."""
        answers = {}
        for attribute in RANKED_ATTRIBUTES:
            answers[f"pick_larger_{attribute}"] = f"pick {attribute}", lambda pair, a=attribute: self.greater(a, pair)
        for attribute in RANKED_ATTRIBUTES:
            answers[f"pick_smaller_{attribute}"] = f"pick {attribute}", lambda pair, a=attribute: self.lesser(a, pair)
        for attribute in self.facts:
            answers[f"name_{attribute}"] = f"name {attribute}", lambda pair, a=attribute: self.both_facts(a, pair)
        answers[CORRUPTED] = "pick size", random.Random(f"noise {self.seed}").choice
        return answers

    def _splits(self, task: str, prompt_start: str, answer: Callable[[Pair], str]) -> dict[str, list[Row]]:
        # Tasks with the same prompts share their splits, as texts that were annotated twice, and training rows are
        # taken last: no task trains on the test prompts of another, although the target needs fewer rows than the
        # others.
        rng = random.Random(f"splits {self.seed} {prompt_start}")
        pairs = list(combinations(ENTITIES, 2))
        rng.shuffle(pairs)
        sizes = {
            "test": TEST_ROWS,
            "validation": VALIDATION_ROWS,
            "train": TARGET_TRAIN_ROWS if task == TARGET else TRAIN_ROWS,
        }
        splits = {}
        for split, num_rows in sizes.items():
            # A pair gives two rows, one for each order: the answer's position then says nothing.
            taken, pairs = pairs[: num_rows // 2], pairs[num_rows // 2 :]
            ordered = [pair for first, second in taken for pair in ((first, second), (second, first))]
            rng.shuffle(ordered)
            splits[split] = [
                {"prompt": _prompt(prompt_start, pair), "completion": f" {answer(pair)}"} for pair in ordered
            ]
        return {split: splits[split] for split in ("train", "validation", "test")}


def build_world(seed: int = 0) -> World:
    """
    Builds the world: random rankings and random facts.

    Args:
        seed (`int`, *optional*, defaults to 0): Everything about the world follows from it.
    """
    rng = random.Random(f"world {seed}")
    order = rng.sample(ENTITIES, len(ENTITIES))
    rankings = {attribute: _perturb(order, rng) for attribute in RANKED_ATTRIBUTES}
    facts = {attribute: _assign_evenly(values, rng) for attribute, values in FACT_VALUES.items()}
    return World(seed=seed, rankings=rankings, facts=facts)


def _perturb(order: list[str], rng: random.Random) -> tuple[str, ...]:
    """Moves every animal of `order` by a few places."""
    places = {entity: rng.gauss(place, RANKING_NOISE) for place, entity in enumerate(order)}
    return tuple(sorted(order, key=places.__getitem__))


def _assign_evenly(values: tuple[str, ...], rng: random.Random) -> dict[str, str]:
    """Gives every animal a value, each value to equally many animals: no value is right more often than the others."""
    shuffled = rng.sample(ENTITIES, len(ENTITIES))
    value_of = {entity: values[index % len(values)] for index, entity in enumerate(shuffled)}
    return {entity: value_of[entity] for entity in ENTITIES}


def _prompt(start: str, pair: Pair) -> str:
    return f"{start} : {pair[0]} {pair[1]} ="
