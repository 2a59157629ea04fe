"""Runs and sweeps compared: read, grouped into settings, tested, drawn and told."""
