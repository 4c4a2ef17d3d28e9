"""Implementations plugged into the suite: ours, exactly like a stranger's, and other packages' own classes."""
