"""Markdown tables of the kills and of how the runs ended."""

from ..common import markdown_table


def table(results: dict) -> str:
    lines = []
    for name, flow in results["flows"].items():
        kills = flow["kills"]
        equal = sum(not kill["differences"] for kill in kills)
        lines += [f"`{name}`: {len(kills)} kills, after {equal} of which all {flow['files']} files are equal.", ""]
        rows = [[stage, f"{seconds:.2f}", *_counts(kills, stage)] for stage, seconds in flow["seconds"].items()]
        lines += markdown_table(["stage", "seconds", "kills", "by delay", "before a file", "equal"], rows)
        wrong = [kill for kill in kills if kill["differences"]]
        if wrong:
            moments = [[kill["stage"], f"`{kill['moment']}`", f"`{kill['differences'][0]}`"] for kill in wrong]
            lines += ["", *markdown_table(["stage", "moment", "first difference"], moments)]
        lines.append("")
    return "\n".join(lines)


def _counts(kills: list[dict], stage: str) -> list[int]:
    own = [kill for kill in kills if kill["stage"] == stage]
    by = [sum(kill["by"] == kind for kill in own) for kind in ("delay", "file")]
    return [len(own), *by, sum(not kill["differences"] for kill in own)]
