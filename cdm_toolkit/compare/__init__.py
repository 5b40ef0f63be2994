"""Comparisons of methods at equal cost: studies, their cells, what is measured, figures."""
