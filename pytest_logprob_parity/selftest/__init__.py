"""Faults planted in a real engine, their true effect by a float64 reference, and whether the verdicts see them."""
