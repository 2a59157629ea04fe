"""The over-optimisation lab: what lm.overoptimisation measures, fits and draws."""
