"""Queue and pool under 8 producers and 8 consumers: python tests/batch_stress.py [SECONDS]

Each producer takes batches of random shapes from one pool, writes its number and a running one into every
element, and puts them; each consumer checks every element, lets a second consumer hold the batch for a while,
and notes what it saw. Prints the counts; the exit status is 1 when anything is lost, doubled, out of order,
overwritten, or still out of the pool at the end.
"""

import gc
import random
import sys
import threading
import time

import numpy as np

from cllm.data import Batch, BatchPool, BatchQueue, QueueClosed

PRODUCERS = CONSUMERS = 8


def produce(number, queue, pool, until, made):
    rng = random.Random(number)
    sequence = 0
    while time.monotonic() < until:
        shape = rng.randrange(1, 9), rng.randrange(1, 200)
        batch = Batch(
            *pool.empty(shape, mask=True), position={"index": sequence, "epoch": 0, "sample": number}
        )
        batch.inputs[...], batch.targets[...], batch.mask[...] = number, sequence, sequence % 2
        while True:
            try:
                queue.put(batch, rng.choice((None, 0, 0.001)))
                break
            except TimeoutError:
                continue
        sequence += 1
    made[number] = sequence


def consume(number, queue, seen, wrong, shared):
    rng = random.Random(-1 - number)
    while True:
        try:
            batch = queue.get(rng.choice((None, 0, 0.001)))
        except TimeoutError:
            continue
        except QueueClosed:
            return
        producer, sequence = batch.position["sample"], batch.position["index"]
        seen.append((producer, sequence))
        shared[rng.randrange(len(shared))] = batch  # whoever was there is let go
        other = shared[rng.randrange(len(shared))]
        for one in (batch, other):
            if one is not None:
                producer, sequence = one.position["sample"], one.position["index"]
                right = (one.inputs == producer).all() and (one.targets == sequence).all()
                if not (right and (one.mask == sequence % 2).all()):
                    wrong.append((producer, sequence))


def run(seconds):
    """What happened in `seconds`, as counts; all but `items` and `recycled` are 0 if all is well."""
    queue, pool = BatchQueue(16), BatchPool()
    until = time.monotonic() + seconds
    made, seen = [0] * PRODUCERS, [[] for _ in range(CONSUMERS)]
    wrong, shared = [], [None] * 32
    producers = [
        threading.Thread(target=produce, args=(i, queue, pool, until, made)) for i in range(PRODUCERS)
    ]
    consumers = [
        threading.Thread(target=consume, args=(i, queue, seen[i], wrong, shared)) for i in range(CONSUMERS)
    ]
    for thread in producers + consumers:
        thread.start()
    for thread in producers:
        thread.join(seconds + 60)
    queue.close()
    for thread in consumers:
        thread.join(60)
    shared.clear()
    gc.collect()
    stats = pool.stats()
    expected = {(i, k) for i in range(PRODUCERS) for k in range(made[i])}
    found = [item for items in seen for item in items]
    disorder = 0
    for items in seen:
        last = [-1] * PRODUCERS
        for producer, sequence in items:
            disorder += sequence <= last[producer]
            last[producer] = sequence
    return {
        "items": len(found),
        "recycled": stats["recycled"],
        "hanging": sum(thread.is_alive() for thread in producers + consumers),
        "lost": len(expected.difference(found)),
        "twice": len(found) - len(set(found)),
        "out_of_order": disorder,
        "overwritten": len(wrong),
        "still_out": stats["arrays_out"] + stats["bytes_out"],
        "miscounted": stats["taken"] - 3 * len(expected),
        "empty": int(np.min(made) == 0),
    }


if __name__ == "__main__":
    counts = run(float(sys.argv[1]) if len(sys.argv) > 1 else 60)
    print(f"{PRODUCERS} producers, {CONSUMERS} consumers:", *(f"{name} {n}," for name, n in counts.items()))
    sys.exit(any(n for name, n in counts.items() if name not in ("items", "recycled")))
