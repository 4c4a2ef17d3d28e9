"""The suite, measured: mutants it must kill, honest variants it must accept."""
