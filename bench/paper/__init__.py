"""The paper (Dong, Chen & Pan, NIPS 2017) reproduced and surpassed: ``python bench/paper``.

Every subcommand is a module here with ``NAME``, ``SAID``, ``add_arguments`` and ``run``; they are
listed in ``__main__``. The installed package does not hold them.
"""
