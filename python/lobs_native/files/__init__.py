"""Files: written atomically, and read as if they were hostile."""
