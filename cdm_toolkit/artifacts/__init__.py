"""What is written to disk: versioned formats, fingerprints, provenance."""
