"""What `tools/bench` measures: a module each."""
