"""Twenty kills with SIGKILL: at random moments, of all ranks and of one, inside checkpoints, while data is
prepared.

    python tests/bench_kills.py [kills [seed]]

Half of them in one process, half on two ranks. After each the same command is started again; at the end
weights, optimizer state, shards and metrics (but times and rates) must be those of a run that nobody killed,
bit for bit.
"""

import random
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import test_midtrain


def main() -> None:
    kills, seed = (
        (int(word) for word in [*sys.argv[1:], "20", "0"][:2])
        if len(sys.argv) != 2
        else (int(sys.argv[1]), 0)
    )
    rng = random.Random(seed)
    for ranks in (1, 2):
        moments = ["all", "in a checkpoint"] + ["one rank", "launcher"] * (ranks > 1)
        kinds = ["in preparation"] * 2 + rng.choices(moments, k=kills // 2 - 2)
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            struck = test_midtrain.survive(Path(folder), kinds, ranks, steps=1000, seed=seed)
        seconds = time.perf_counter() - start
        print(
            f"{ranks} rank(s): {struck} of {len(kinds)} kills struck, the same run; {seconds:.0f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
