"""Markdown table of the scripts and of what they left."""

from ..common import markdown_table


def table(results: dict) -> str:
    rows = [
        [f"`{name}`", f"`{own['sha256']}`", own["changed_lines"], _ended(own["as it is"]), _ended(own["edited"])]
        for name, own in results["scripts"].items()
    ]
    header = ["script", "SHA-256", "changed lines", "as it is", "with a trainer of ours"]
    return "\n".join(markdown_table(header, rows)) + "\n"


def _ended(found: dict) -> str:
    if found["errors"]:
        return f"`` {found['errors'][-1]} ``".replace("|", "\\|")
    return ", ".join(name if value else f"not {name}" for name, value in found.items() if name != "errors") or "ended"
