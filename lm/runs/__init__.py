"""A run's folder and what a run says: workdir, checkpoints, metrics, timing, the terminal and HTML pages.

`workdir.open_workdir` and `workdir.load_trained_model` are what programs come for. Knows no stage. A new tracker goes
to trackers; what all pages share goes to html.
"""
