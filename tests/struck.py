"""`cllm ...` that is struck by a signal: python tests/struck.py SIGNAL UNIT STEP PLACE WORDS ...

The processing unit UNIT sends itself SIGNAL, once or, as "SIGINT,SIGINT", several times. PLACE is "step",
when it begins the update after STEP steps, or a file of that step's checkpoint, when that is written.
"""

import os
import signal
import sys

from cllm import arrays, cli, parallel, train


def struck(function, is_there):
    def strike(*arguments):
        result = function(*arguments) if PLACE != "step" else None
        if parallel.here().rank == int(UNIT) and is_there(*arguments):
            for name in SIGNAL.split(","):
                os.kill(os.getpid(), getattr(signal, name))
        return function(*arguments) if PLACE == "step" else result

    return strike


SIGNAL, UNIT, STEP, PLACE, *WORDS = sys.argv[1:]
if PLACE == "step":
    train.Trainer._update = struck(train.Trainer._update, lambda trainer: trainer.step == int(STEP))
else:
    there = f".step-{int(STEP):08d}.tmp"
    arrays.write = struck(arrays.write, lambda path, _: (path.parent.name, path.name) == (there, PLACE))
sys.exit(cli.main(WORDS))
