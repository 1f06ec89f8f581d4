"""Templates of model cards and the style of their pictures; data files, read through `importlib.resources`."""
