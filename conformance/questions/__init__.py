"""The other questions: which dialect, where two differ, what is repeated to the bit, what fresh data shows."""
