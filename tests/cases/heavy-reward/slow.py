import time

time.sleep(130)


def score(completion, **row):
    return float(len(completion) % 3)
