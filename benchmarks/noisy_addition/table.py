"""Markdown table of right and random additions."""

from ..common import markdown_table

HEADER = ("seed", "target's loss at the base model", "AUC of groups", "AUC of single examples")


def table(results: dict) -> str:
    lines = [
        f"{results['clean_groups']} right and {results['groups'] - results['clean_groups']} random groups of "
        f"{results['group_size']} examples, in {results['num_subsets']} random subsets of {results['subset_size']}.",
        "",
    ]
    rows = [
        (world["seed"], f"{world['base_loss']:.2f}", f"{world['groups_auc']:.3f}", f"{world['examples_auc']:.3f}")
        for world in results["worlds"]
    ]
    return "\n".join([*lines, *markdown_table(HEADER, rows)]) + "\n"
