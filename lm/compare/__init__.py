"""Compares runs and sweeps, with the noise between seeds: `lm compare`.

`read` loads runs. `settings` groups the runs that differ only in the seed. `statistics` tests. `figures`, `text` and
`page` show the results. A new test goes to statistics.
"""
