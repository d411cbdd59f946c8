"""How fast: the operations against their rivals, in pairs (``paired.py``) and under pytest."""
