"""Losses by task: what a step's loss is averaged over, and each task's own training loss in the logs."""
