"""Files: atomic writes, and reads that trust nothing."""
