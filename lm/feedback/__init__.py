"""People, models and rules rank answers: `lm rank`, `lm judge`, `lm auto-rank`.

`app` is the web page and `widget` the same in a notebook. `results` and `agreement` measure how far raters can be
trusted. data/annotations stores the verdicts, and stage `reward` learns from them.
"""
