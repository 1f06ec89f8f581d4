"""The stages of a run, each an object over an explicit context; the trainers are facades over the flows."""
