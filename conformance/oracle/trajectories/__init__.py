"""Training in any arithmetic: the model, its gradient by hand, AdamW, and what makes the trajectories' fixtures."""
