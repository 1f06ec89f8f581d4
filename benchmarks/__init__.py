"""Measurements behind the figures of the documentation; run from the repository root, see README.md here."""
