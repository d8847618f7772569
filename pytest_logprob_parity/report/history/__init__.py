"""The history of a repo's checks: how a few numbers of each drift over runs and versions. Only the standard library."""
