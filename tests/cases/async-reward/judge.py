async def one(completion, **row):
    return float(len(completion) % 5)


async def many(completions, **columns):
    return [float(len(c) % 5) for c in completions]


class Judge:
    async def __call__(self, completion, **row):
        return float(len(completion) % 5)


judge = Judge()
