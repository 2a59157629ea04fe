"""Speed beside the machine's limits and beside other libraries: `lm bench`.

A file for each thing that is timed; `turns` lets two sides take turns. A new benchmark gets a file and a line in
__main__.
"""
