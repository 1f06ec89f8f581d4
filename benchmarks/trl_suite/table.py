"""Markdown tables of how many of trl's tests pass in each mode."""

from collections import Counter

from ..common import markdown_table

MODES = {
    "parent": "`SFTTrainer` and `SFTConfig`",
    "single": "`EnsembleSFTTrainer` and `EnsembleSFTConfig`",
    "several": "the same, each dataset cut into a dict of two",
}


def table(results: dict) -> str:
    tests, modes = results["tests"], results["modes"]
    reference = modes.get("parent", {})
    runnable = [name for name, own in reference.items() if own["outcome"] != "skipped"]
    lines = [
        f"`{tests['file']}` of trl, commit {tests['commit']} (SHA-256 {tests['sha256']}...), on trl "
        f"{results['versions']['trl']}: {len(reference)} tests of `SFTTrainer`, of which {len(runnable)} run on a CPU "
        "with stand-ins for their models and datasets.",
        "",
    ]
    rows = [
        [f"`{mode}`", MODES[mode], *_counts(own, runnable), results["seconds"][mode]] for mode, own in modes.items()
    ]
    lines += markdown_table(["mode", "trainer", "passed", "failed", "seconds"], rows)
    passed = [name for name in runnable if reference[name]["outcome"] == "passed"]
    for mode, own in modes.items():
        names = runnable if mode == "parent" else passed
        failed = [[f"`{name}`", _code(own[name]["reason"])] for name in names if _failed(own, name)]
        heading = "Failed" if mode == "parent" else "Passed in `parent`, failed"
        if failed:
            lines += ["", f"{heading} in `{mode}`:", "", *markdown_table(["test", "error"], failed)]
    left_out = Counter(own["reason"] for own in reference.values() if own["outcome"] == "skipped")
    lines += ["", "Not run:", "", *markdown_table(["reason", "tests"], sorted(left_out.items()))]
    return "\n".join(lines) + "\n"


def _code(text: str) -> str:
    """A cell with a message, in which there may be backticks and bars."""
    return f"`` {text} ``".replace("|", "\\|")


def _failed(outcomes: dict, name: str) -> bool:
    return name in outcomes and outcomes[name]["outcome"] == "failed"


def _counts(outcomes: dict, runnable: list[str]) -> tuple[int, int]:
    passed = sum(outcomes.get(name, {}).get("outcome") == "passed" for name in runnable)
    return passed, sum(_failed(outcomes, name) for name in runnable)
