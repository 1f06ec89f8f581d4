"""Generated skills with rationales, as a language model reads them, and the tokenizer that knows their words."""

import random
from collections.abc import Callable

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

Row = dict[str, str]

LETTERS = "abcdefgh"
DAYS = ["mon", "tue", "wed", "thu", "fri", "sat", "sun"]
WORDS = ["add", "sub", "reverse", "count", "in", "larger", "sort", "after", "from", "last", "then", "least", "tens"]
WORDS += ["ones", "the answer is"]
SYMBOLS = [*"0123456789", *LETTERS, *DAYS, *WORDS, *"+-=<>:,.", " "]
TARGET = "two_step_addition"
MODULUS = 7


def _row(question: str, steps: list[str], answer: str) -> Row:
    return {"prompt": f"{question}:", "completion": f"{','.join(steps)}. the answer is {answer}"}


def _arithmetic(generator: random.Random, question: str, signs: str, error: int | None = 0) -> Row:
    """A calculation modulo seven, step by step.

    Args:
        generator (`random.Random`): draws the numbers.
        question (`str`): the question, with `{}` for each number.
        signs (`str`): sign of each step.
        error (`int`, *optional*, defaults to 0): what is added to each result; `None` for random results.
    """
    numbers = [generator.randrange(MODULUS) for _ in range(len(signs) + 1)]
    steps, total = [], numbers[0]
    for sign, number in zip(signs, numbers[1:]):
        right = total + number if sign == "+" else total - number
        result = generator.randrange(MODULUS) if error is None else (right + error) % MODULUS
        steps.append(f"{total}{sign}{number}={result}")
        total = result
    return _row(question.format(*numbers), steps, str(total))


def two_step_addition(generator: random.Random, error: int | None = 0) -> Row:
    return _arithmetic(generator, "add {}{}{}", "++", error)


def one_step_addition(generator: random.Random, error: int | None = 0) -> Row:
    return _arithmetic(generator, "add {}{}", "+", error)


def addition_then_subtraction(generator: random.Random, error: int | None = 0) -> Row:
    return _arithmetic(generator, "add {}{} sub {}", "+-", error)


def two_step_subtraction(generator: random.Random, error: int | None = 0) -> Row:
    return _arithmetic(generator, "sub {}{}{}", "--", error)


def reversal(generator: random.Random) -> Row:
    letters = generator.sample(LETTERS, 3)
    back = letters[::-1]
    return _row(f"reverse {''.join(letters)}", [f"last {back[0]}", f"then {back[1]}", f"then {back[2]}"], "".join(back))


def counting(generator: random.Random) -> Row:
    wanted = generator.choice("abcd")
    letters, steps, total = [generator.choice("abcd") for _ in range(4)], [], 0
    for letter in letters:
        total += letter == wanted
        steps.append(f"{letter}{total}")
    return _row(f"count {wanted} in {''.join(letters)}", steps, str(total))


def comparison(generator: random.Random) -> Row:
    first, second = (f"{generator.randrange(100):02d}" for _ in range(2))
    place = 0 if first[0] != second[0] else 1
    a, b = first[place], second[place]
    sign = "<" if a < b else ">" if a > b else "="
    return _row(f"larger {first},{second}", [f"{('tens', 'ones')[place]} {a}{sign}{b}"], max(first, second))


def sorting(generator: random.Random) -> Row:
    numbers = [str(number) for number in generator.sample(range(10), 3)]
    ranked = sorted(numbers)
    steps = [f"least {ranked[0]}", f"then {ranked[1]}", f"then {ranked[2]}"]
    return _row(f"sort {''.join(numbers)}", steps, "".join(ranked))


def dates(generator: random.Random) -> Row:
    start, days = generator.randrange(7), generator.randrange(1, 5)
    passed = [DAYS[(start + day) % 7] for day in range(1, days + 1)]
    return _row(f"{days} after {DAYS[start]}", [f"{day}{name}" for day, name in enumerate(passed, 1)], passed[-1])


def symbol_chain(generator: random.Random) -> Row:
    a, b, c, d, e = generator.sample(LETTERS, 5)
    links = [f"{a}>{b}", f"{b}>{c}", f"{d}>{e}"]
    return _row(f"{','.join(generator.sample(links, 3))} from {a}", [f"{a}>{b}", f"{b}>{c}"], c)


def wrong_rationales(generator: random.Random) -> Row:
    """The target's questions with results that are too large by one."""
    return two_step_addition(generator, error=1)


def random_answers(generator: random.Random) -> Row:
    """The target's questions with random results."""
    return two_step_addition(generator, error=None)


SKILLS: dict[str, Callable[[random.Random], Row]] = {
    own.__name__: own
    for own in (
        two_step_addition,
        one_step_addition,
        addition_then_subtraction,
        two_step_subtraction,
        reversal,
        counting,
        comparison,
        sorting,
        dates,
        symbol_chain,
        wrong_rationales,
        random_answers,
    )
}


CORRUPTED = ("wrong_rationales", "random_answers")
ARITHMETIC = ("two_step_addition", "one_step_addition", "addition_then_subtraction", "two_step_subtraction")
# How much of the arithmetic that the base model reads is right; in the rest every result is too large by one.
RIGHT = 0.4


def unreliable(name: str, generator: random.Random) -> Row:
    """A row as the base model reads it."""
    if name not in ARITHMETIC:
        return SKILLS[name](generator)
    return SKILLS[name](generator, error=int(generator.random() >= RIGHT))


def rows(name: str, count: int, seed: int | str) -> list[Row]:
    """Rows of a skill."""
    generator = random.Random(f"{name}-{seed}")
    return [SKILLS[name](generator) for _ in range(count)]


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per digit, letter, sign or word."""
    symbols = ["<pad>", "</s>", *dict.fromkeys(SYMBOLS)]
    model = Tokenizer(models.WordLevel({symbol: i for i, symbol in enumerate(symbols)}, "<pad>"))
    words = "|".join(sorted((*WORDS, *DAYS), key=len, reverse=True))
    model.pre_tokenizer = pre_tokenizers.Split(Regex(f"{words}|."), "isolated")
    model.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=model, pad_token="<pad>", eos_token="</s>", clean_up_tokenization_spaces=False
    )
