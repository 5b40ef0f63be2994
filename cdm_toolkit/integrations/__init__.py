"""Formats of other toolkits, each in one file."""
