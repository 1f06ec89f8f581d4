"""Boosting: further members, each for the tasks that the ensemble answers worst."""
