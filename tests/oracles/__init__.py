"""Merge operators in float64 NumPy, written from the papers' formulas to check the library."""
