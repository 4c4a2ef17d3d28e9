"""What is said of an answer: the rule, stochasticity, a run, and known results."""
