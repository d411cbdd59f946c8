"""One matrix: choose which weights to remove and repair the rest."""
