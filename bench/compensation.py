"""What compensation adds to an iteration of LAASP: with and without it side by side, in turns, on the same cores.

    python bench/compensation.py --data DATA [--network resnet20] [--images 4000] [--iterations 3] [--threads 2]

DATA is the folder of development data. Each way prunes its own copy of the network, iteration by iteration: LAASP's
pool plain, made up for, and made up for with obs. The first iteration measures the moments, which later ones follow.
Seconds are of the parts of an iteration; ratios are to the plain pool's, of all iterations.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from pathlib import Path

import torch
from machine import machine
from one_shot import CHECKPOINTS, Loop, config_of

from laasp_ray.methods.laasp import Laasp

WAYS = ("laasp", "laasp-made_up", "laasp_obs-made_up")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--network", choices=CHECKPOINTS, default="resnet20")
    parser.add_argument("--images", type=int, default=4000)
    parser.add_argument("--iterations", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--set", action="append", default=[], help="a setting of all ways, as the jobs take it")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(machine("torch"))
    weights = options.data / "checkpoints" / f"{CHECKPOINTS[options.network]}.safetensors"
    loops = {way: Loop(config_of(options, way, 0, 0.5), weights, options.images, 0, Laasp()) for way in WAYS}
    wall, cpu = defaultdict[str, float](float), defaultdict[str, float](float)
    for number in range(1, options.iterations + 1):
        for way, loop in loops.items():
            started, cpu_started = time.perf_counter(), time.process_time()
            result = loop.step()
            wall[way] += time.perf_counter() - started
            cpu[way] += time.process_time() - cpu_started
            decision = result.decision
            assert decision is not None
            parts = ", ".join(f"{name} {seconds:.2f}" for name, seconds in result.seconds.items())
            print(
                f"{number} {way}: {len(result.ranking)} candidates; {decision.layer} by {decision.criterion}, loss "
                f"{decision.loss_before:.4f} -> {decision.loss:.4f}; {parts}",
                flush=True,
            )
    print("\n| way | wall-clock s | CPU s | ratio | ratio of CPU s |\n|---|---|---|---|---|")
    for way in WAYS:
        print(
            f"| {way} | {wall[way]:.1f} | {cpu[way]:.1f} | {wall[way] / wall['laasp']:.2f} | "
            f"{cpu[way] / cpu['laasp']:.2f} |"
        )


if __name__ == "__main__":
    main()
