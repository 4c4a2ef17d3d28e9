"""The oracle: proved values, honest error bounds, and the case families of the golden corpus."""
