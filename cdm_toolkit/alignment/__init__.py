"""Align the token sequences of a teacher and a student over one text."""
