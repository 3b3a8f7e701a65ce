import numpy as np

table = np.zeros(700_000_000)


def score(completion, **row):
    return float(len(completion))
