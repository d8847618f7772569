"""Causes read off two traces: `semantics` puts together what the others find in the table of `positions`."""
