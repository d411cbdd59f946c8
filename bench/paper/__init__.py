"""The experiments of the paper (Dong, Chen & Pan, NIPS 2017), and what goes beyond them.

Run ``python bench/paper``. Every subcommand is a module with ``NAME``, ``HELP``, ``add_arguments``
and ``run``; ``__main__`` lists them.
"""
