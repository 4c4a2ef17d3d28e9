"""What is asked: a case, its format, the corpus, and the dialects whose rows it uses."""
