"""Solvers for one weight matrix: which weights to remove, and how to repair the rest."""
