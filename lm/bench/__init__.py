"""Measures speed against the machine's limits and against other libraries: `lm bench`.

Each thing that is timed has a file; `turns` lets two sides take turns. A new benchmark gets a file and a line in
__main__.
"""
