"""Research programs, each in a folder that can be removed without touching the rest."""
