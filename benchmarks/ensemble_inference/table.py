"""Markdown tables of the time that an ensemble's forward takes."""

from ..common import markdown_table

SMALL, LARGE = "one adapter, B rows", "one adapter, m x B rows"
# The method that each time is compared with, in the order of the tables.
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
    # Weights with a single entry, and different adapters in the rows.
    "ensemble, one adapter a row": SMALL,
}


def table(results: dict) -> str:
    machine, shape, measured = results["machine"], results["shape"], results["members"]
    lines = [
        f"{results['parameters'] / 1e6:.0f}M parameters, LoRA of rank {shape['rank']} on every linear layer, B = "
        f"{shape['batch_size']} rows, prompts of {shape['length']} tokens, {shape['repetitions']} repetitions; "
        f"{machine['device']}, {machine['threads']} thread(s), {machine['dtype']}. Milliseconds; in brackets, the "
        "ratio to the reference of the method.",
    ]
    columns = [f"m = {members}" for members in measured]
    for phase in ("prefill", "decode"):
        rows = [[method, *(_cell(own, method, phase) for own in measured.values())] for method in REFERENCE]
        lines += ["", *markdown_table([phase, *columns], rows)]
    generate = results["generate"].values()
    rows = [
        [method, *(f"{own[method]:.0f} ({own[method] / own[LARGE]:.2f})" for own in generate)]
        for method in next(iter(generate))
    ]
    lines += ["", *markdown_table([f"generate, {shape['tokens']} tokens", *columns], rows)]
    return "\n".join(lines) + "\n"


def _cell(own: dict, method: str, phase: str) -> str:
    """Milliseconds, and their ratio to the reference."""
    value, reference = own[method][phase], own[REFERENCE[method]][phase]
    return f"{value:.1f}" if method == REFERENCE[method] else f"{value:.1f} ({value / reference:.2f})"
