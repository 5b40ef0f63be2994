"""Which student ids stand for a teacher id: everywhere (static), or at one position (contextual)."""
