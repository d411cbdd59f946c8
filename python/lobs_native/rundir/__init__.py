"""The run directory: what keeps a long run from being lost."""
