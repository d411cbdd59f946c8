"""A whole network: which layers, in which order, with which share of the budget."""
