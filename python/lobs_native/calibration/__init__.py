"""Calibration: passes over the data, and the statistics of the layers' inputs."""
