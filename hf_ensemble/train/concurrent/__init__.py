"""Several trainings over one base model at once: each an ordinary trainer, whose passes through the base are shared."""
