"""Words of messages."""


def counted(number: int, noun: str) -> str:
    """A number of things: "1 group", "2 groups"."""
    return f"{number} {noun}{'' if number == 1 else 's'}"
