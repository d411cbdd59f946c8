"""Folders in the style of Hugging Face: checkpoints, and text to calibrate on."""
