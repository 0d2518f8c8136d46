"""A verb for `test_machines.py`: a small sweep with checkpoints, slots and rates, by one process or
by several."""

import dataclasses
import pathlib
import time
from typing import Annotated

import jax
import numpy as np
import toys
import tyro

from jaxbd import devices, files
from jaxbd.base import UserError
from jaxbd.cli import job as long_job
from jaxbd.data import draw
from jaxbd.metrics import sweep_rates
from jaxbd.training import sweep


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    """A verb for tests.

    Attributes:
      out: arrays of all results.
      stall_at: step at which process `stalls` says so, by a file beside the output, and waits for
        its end; -1 for before it has begun.
      job: how it may be stopped.
    """

    out: pathlib.Path
    stall_at: int = 0
    stalls: int = 1
    job: Annotated[long_job.Flags, tyro.conf.arg(name="")] = long_job.Flags(save_every=2)


def run(args: Args) -> int:
    # here, because it computes when it is imported
    from test_sweep_slots import BY_SIZE, KEY, LINEAR, NUDGING

    data, drawn = toys.quadrants(0, 40, np.float64), draw.uniform(8)
    cells = toys.widen(sweep.grid(range(4), source=range(4)))
    five = jax.tree.map(lambda leaf: leaf[:5], cells)
    victim = {"params": {"w": 0.3 * np.random.default_rng(0).normal(size=(64, 4))}}

    def stall(at: int) -> None:
        if args.stall_at == at and jax.process_index() == args.stalls:
            args.out.with_suffix(".stalled").touch()
            time.sleep(600)

    def note(what: str, done: int, total: int) -> None:
        print(f"{what}: step {done}", flush=True)
        if done:
            stall(done)

    stall(-1)
    paths = long_job.prepare(args.out, args.job)
    with long_job.open_run(paths, args.job, {"cells": 5}) as run:
        run = dataclasses.replace(run, progress=note)
        some = NUDGING, drawn, data, five, victim
        first = sweep.search(run, "five", KEY, *some, num_steps=8, slots=5, chunk=2, course=True)
        every = BY_SIZE, drawn, data, cells, victim
        found = sweep.search(run, "pairs", KEY, *every, num_steps=23, slots=6)
    rates = sweep_rates.attack_success(
        KEY, LINEAR, NUDGING, first.states, five, victim, data, batch_size=8
    )
    try:
        devices.check_same("number", str(jax.process_index()).encode(), "count anew")
    except UserError as error:
        print(error)
    arrays = {
        "states": first.states,
        "infos": first.course,
        "found": found.states,
        "steps": found.steps,
        "rates": rates,
    }
    named = {
        jax.tree_util.keystr(path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(arrays)
    }
    with files.replacing(args.out) as sibling, sibling.open("wb") as file:
        np.savez(file, **named)
    long_job.finish(paths)
    print(f"{len(devices.in_use())} devices, resumed {run.resumed}")
    return 0
