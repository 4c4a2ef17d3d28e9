"""The result of a run: on the terminal, as files for programs, and as a page that people look at."""
