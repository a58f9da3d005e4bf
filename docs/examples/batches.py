"""Batches by hand: from a pool, through a queue, made ahead, padded; see docs/runs.md.

python docs/examples/batches.py
"""

import threading

import numpy as np

from cllm.data import Batch, BatchPool, BatchQueue, Examples, Producer, Sequences, Tokens
from cllm.data.batch import feed


def main():
    # [pool, queue] A thread of one's own fills batches, two wait at most.
    pool, queue = BatchPool(), BatchQueue(maxsize=2)

    def produce():
        try:
            for i in range(5):
                inputs, targets, _ = pool.empty((4, 8))  # int64, aligned, uninitialised
                inputs[...], targets[...] = i, i + 1
                queue.put(Batch(inputs, targets))
            queue.close()
        except BaseException as error:
            queue.fail(error)  # is raised where the batches are taken, with its traceback

    thread = threading.Thread(target=produce)
    thread.start()
    queue.watch(thread)  # should it die without a word, nobody waits for ever
    for batch in queue:  # until it is closed and empty
        first, second = batch.split(2)  # views; the buffers go back when the last of them is dropped
        print("batch", first.inputs[0, 0], "in parts of", len(first), "and", len(second))
    thread.join()
    del batch, first, second
    print("arrays that are out of the pool:", pool.stats()["arrays_out"])

    # [producer] The order of training, made ahead; what comes is what it would be without.
    examples = feed(Examples(np.arange(10), np.arange(10) % 2), "my examples")
    with Producer(examples, ahead=2) as producer:
        for index in (0, 1, 2, 1_000_000):  # any place at once: an order is computed, not drawn
            batch = producer.batch(index, batch_size=4, seed=1337)
            print(batch.position, batch.inputs)

    # [documents] Three ways to cut documents that end with token 0.
    tokens = np.array([5, 3, 0, 7, 7, 7, 7, 0, 4, 0])
    packed = feed(Tokens(tokens, end=0), "packed", block_size=9)
    for batch in packed.batches(batch_size=1):
        print("packed", batch.targets[0], "of which count", batch.targets[batch.mask])
    for batch in feed(Sequences(Tokens(tokens, end=0)), "padded").batches(batch_size=3):
        print("padded", batch.inputs.tolist())


if __name__ == "__main__":
    main()
