"""The paper (Dong, Chen & Pan, NIPS 2017) reproduced and surpassed: ``python -m
lobs_native.experiments``.

Every subcommand is a module here with ``NAME``, ``SAID``, ``add_arguments`` and ``run``; they are
listed in ``__main__``. None is imported by the rest of the package.
"""
