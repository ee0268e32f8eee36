"""Slow, exact references, written from the formulas: Fractions, integers, float64, plain loops."""
