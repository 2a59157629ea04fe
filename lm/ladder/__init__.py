"""The ladder: runs of several sizes at several costs, planned, measured, fitted, drawn."""
