"""Times of an ensemble's forward as Markdown."""

from ..common import markdown_table

SMALL, LARGE = "one adapter, B rows", "one adapter, m x B rows"
# What each side's time is divided by; in the order of the table.
REFERENCE = {
    LARGE: LARGE,
    # PEFT, m forwards of B rows.
    "set_adapter in turn": LARGE,
    # PEFT with adapter_names, one forward of m x B rows.
    "mixed batch": LARGE,
    # fused=False, and the default.
    "ensemble, one after the other": LARGE,
    "ensemble, all at once": LARGE,
    SMALL: SMALL,
    # combination="weights", every adapter in every row.
    "ensemble, weights": SMALL,
    # Weights with one entry, different adapters in the rows.
    "ensemble, one adapter a row": SMALL,
}


def table(results: dict) -> str:
    machine, shape, measured = results["machine"], results["shape"], results["members"]
    lines = [
        f"{results['parameters'] / 1e6:.0f}M parameters, LoRA of rank {shape['rank']} on every linear layer, B = "
        f"{shape['batch_size']} rows, prompts of {shape['length']} tokens, {shape['repetitions']} repetitions; "
        f"{machine['device']}, {machine['threads']} thread(s), {machine['dtype']}. Milliseconds, and the ratio to the "
        "reference of the side.",
    ]
    columns = [f"m = {members}" for members in measured]
    for phase in ("prefill", "decode"):
        rows = [[side, *(_cell(own, side, phase) for own in measured.values())] for side in REFERENCE]
        lines += ["", *markdown_table([phase, *columns], rows)]
    generate = results["generate"].values()
    rows = [
        [side, *(f"{own[side]:.0f} ({own[side] / own[LARGE]:.2f})" for own in generate)]
        for side in next(iter(generate))
    ]
    lines += ["", *markdown_table([f"generate, {shape['tokens']} tokens", *columns], rows)]
    return "\n".join(lines) + "\n"


def _cell(own: dict, side: str, phase: str) -> str:
    """Milliseconds and, of a side that is no reference, their ratio to it."""
    value, reference = own[side][phase], own[REFERENCE[side]][phase]
    return f"{value:.1f}" if side == REFERENCE[side] else f"{value:.1f} ({value / reference:.2f})"
