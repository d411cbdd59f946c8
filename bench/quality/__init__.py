"""How good: real networks pruned without retraining, compared by method."""
