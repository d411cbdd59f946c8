"""The cases, one file per operation: inputs, our method and its rivals, the check, the tolerance.

``cases(quick)`` yields those that ``paired.py`` compares, one at a time because some of them fill a
gigabyte. The other functions build single cases; ``bench_<stem>.py`` calls them with its own sizes.
"""
