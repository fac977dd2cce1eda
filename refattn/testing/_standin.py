"""Stand-in until typical lands."""

from refattn.testing._tolerance import tolerance


def typical(arithmetic, q, k, v, *, rate=1e-6, **options):
    return tolerance(arithmetic, q, k, v, **options)
