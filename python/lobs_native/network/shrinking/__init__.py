"""Smaller dense networks: which units belong together, which of them go, and taking them out."""
