"""Against originals: the replacements in ``lobs_native.compat`` against the programs themselves."""
