"""Artifacts on disk: versioned formats with fingerprints and provenance."""
