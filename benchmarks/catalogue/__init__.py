"""Faults of all kinds planted in a real engine, their true effect by a float64 reference, and whether the verdicts see them.

Knows the architecture of the models that it runs on. `bench_catalogue.py` is its command.
"""
