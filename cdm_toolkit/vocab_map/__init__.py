"""Map teacher token ids to student token ids: one map for all positions (static), or per position (contextual)."""
