"""People, models and rules rank answers: `lm rank`, `lm judge`, `lm auto-rank`.

`app` is the web page, `widget` the same in a notebook, `results` and `agreement` say how far raters can be trusted.
What they decide is kept by data/annotations, and stage `reward` learns from it.
"""
