"""Checkpoint folders in Hugging Face format, and calibration on text."""
