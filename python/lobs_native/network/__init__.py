"""Pruning of whole networks: selection of the layers, their order and their shares of a budget."""
