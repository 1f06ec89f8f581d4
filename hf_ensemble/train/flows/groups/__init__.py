"""The groups of an ensemble: which are trained, one after the other or how many at once."""
