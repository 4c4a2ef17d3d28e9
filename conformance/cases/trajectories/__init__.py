"""Trajectories: a small language model that is trained for some steps, and what every step must give."""
