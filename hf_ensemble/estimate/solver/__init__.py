"""The search for optima of the surrogate: Newton steps, and changes of a known optimum by one task."""
