"""Runs and sweeps compared, with noise: `lm compare`.

`read` loads runs, `settings` groups those that differ in the seed only, `statistics` tests, `figures`, `text` and
`page` show. A new test goes to statistics.
"""
