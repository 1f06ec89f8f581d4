"""Groups of tasks: what they are predicted to lose, how they are searched for, and the choice."""
