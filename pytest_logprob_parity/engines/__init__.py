"""Engines: one file for each kind, behind the protocol of base.py. They know no golden and no pytest."""
