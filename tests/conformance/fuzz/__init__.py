"""Inputs that are nearly right, of every kind that is read: a result or one line, soon and in little memory."""
