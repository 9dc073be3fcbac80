"""Makes worker/src/eval/metrics/reference.rs: metrics by numpy and scipy, for the tests to compare ours with.

    python3 tests/python/metrics.py > worker/src/eval/metrics/reference.rs

It needs numpy and scipy, and nothing of this project. Each metric is written as its paper has it, the plain way: the square root
of a matrix by Schur's method, all pairs of samples in loops or whole matrices, sorted lists. The features are made by a formula
that the tests repeat, so that both sides look at the same numbers.
"""

import numpy
from scipy.linalg import sqrtm
from scipy.stats import entropy, wasserstein_distance

SAMPLES, DIMENSIONS, CLASSES = 240, 6, 10


def features(seed):
    """Numbers that a test can reproduce exactly: remainders of products, no random generator and no function of libm."""
    place = numpy.arange(SAMPLES * DIMENSIONS, dtype=numpy.int64).reshape(SAMPLES, DIMENSIONS)
    mixed = (place * place * 7919 + place * (104729 + 2 * seed) + seed * 1299709) % 10007
    # Squares make a skewed distribution; columns differ in scale.
    return (mixed / 10007.0) ** 2 * (1.0 + numpy.arange(DIMENSIONS))


def probabilities(seed):
    place = numpy.arange(SAMPLES * CLASSES, dtype=numpy.int64).reshape(SAMPLES, CLASSES)
    mixed = (place * place * 6007 + place * (15485863 % 10007 + seed) + seed * 31) % 10007 + 1.0
    weights = mixed**4
    weights[:, 7] *= 0.01 if seed == 2 else 1.0
    return weights / weights.sum(axis=1, keepdims=True)


def frechet(one, other):
    means = numpy.sum((one.mean(axis=0) - other.mean(axis=0)) ** 2)
    covariances = numpy.cov(one, rowvar=False), numpy.cov(other, rowvar=False)
    root = sqrtm(covariances[0] @ covariances[1])
    return means + numpy.trace(covariances[0] + covariances[1] - 2 * root.real)


def kid(real, fake, block):
    kernel = lambda x, y: (x @ y / DIMENSIONS + 1.0) ** 3
    distances = []
    for start in range(0, SAMPLES - block + 1, block):
        a, b = real[start : start + block], fake[start : start + block]
        pairs = [(i, j) for i in range(block) for j in range(block) if i != j]
        within = [numpy.mean([kernel(x[i], x[j]) for i, j in pairs]) for x in (a, b)]
        between = numpy.mean([kernel(x, y) for x in a for y in b])
        distances.append(sum(within) - 2 * between)
    return numpy.mean(distances)


def distances(one, other):
    return numpy.sqrt(((one[:, None, :] - other[None, :, :]) ** 2).sum(axis=2))


def share_within(samples, of, neighbour=3):
    # The nearest of all is the sample itself.
    radii = numpy.sort(distances(of, of), axis=1)[:, neighbour]
    return numpy.mean((distances(samples, of) <= radii[None, :]).any(axis=1))


def score(p):
    return numpy.exp(numpy.mean([entropy(row, p.mean(axis=0)) for row in p]))


def shares(p):
    return numpy.bincount(p.argmax(axis=1), minlength=CLASSES) / len(p)


def number(name, value):
    print(f"pub const {name}: f64 = {float(value)!r};")


real, fake = features(1), features(2) * 0.8 + 0.1
own, true = probabilities(2), probabilities(1)
print("// What numpy and scipy make of the metrics: written by tests/python/metrics.py, which says how.\n")
number("FRECHET", frechet(real, fake))
number("FRECHET_OF_THE_SAME", frechet(real, real))
number("KID", kid(real, fake, SAMPLES))
number("KID_IN_BLOCKS_OF_80", kid(real, fake, 80))
number("PRECISION", share_within(fake, real))
number("RECALL", share_within(real, fake))
number("SCORE", score(own))
number("LABEL_KL", entropy(shares(own), shares(true)))
number("RELATIVE_ENTROPY", entropy(shares(own)) / entropy(shares(true)))
number("MODES", numpy.sum(shares(own) >= 0.1 * shares(true)))
number("NEAREST", distances(fake, real).min(axis=1).mean())
number("WASSERSTEIN_OF_A_COLUMN", wasserstein_distance(real[:, 2], fake[:, 2]))
pairs = lambda x: numpy.sqrt(numpy.mean([((a - b) ** 2).sum() for a in x for b in x]))
number("DIVERSITY", pairs(fake) / pairs(real))
