"""Times that can be compared: all contenders take turns in one process.

A machine's speed drifts, by its clock and by its neighbours. Contenders that take turns drift together, so the
ratio of their times stands where the times don't. Each has the same number of turns and runs a few times in each,
and its fastest run counts: whatever else the machine does only ever adds time.

New arrays are part of the work. The C library's allocator is told to keep what is freed, for every contender alike:
whether pages go back to the system and come again, zeroed, depends on who else allocated what in between. And where an
array lies is a matter of luck: which sets of the caches its pages share with the others' takes up to a quarter of a
pass. So other memory is free in each round, and everybody meets several places.
"""

from __future__ import annotations

import ctypes
import gc
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

_RUNS = 3  # per turn, after one that warms the caches and is not counted
_SLOW = 40.0  # a contender this many times slower than the fastest takes every eighth turn, and runs once in it
_SELDOM = 8
_PAGE, _ELSEWHERE = 2**12, 2**11  # bytes; pages, of which some are taken in a round: new arrays come to lie elsewhere

_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8  # of mallopt(3)


def keep_memory() -> None:
    """Let this process's allocator neither map large arrays one by one nor give freed memory back. (glibc alone.)"""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_ARENA_MAX, 1)  # a thread's own arena would give its memory back all the same
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


@dataclass
class Contender:
    """Something that is timed.

    Attributes:
        run: does the work once.
        turns: seconds, the fastest run of each turn.
        cores: processor seconds per second over all turns: 1.0 for one thread.
    """

    run: Callable[[], object]
    turns: list[float] = field(default_factory=list)
    cores: float = 0.0

    @property
    def seconds(self) -> float:
        """The fastest turn."""
        return min(self.turns)


def timed(contenders: Mapping[str, Callable[[], object]], budget_s: float, least: int = 5) -> dict[str, Contender]:
    """Let contenders take turns until the budget is spent.

    Args:
        contenders: what is timed, by name.
        budget_s: seconds for all of them together; at least `least` rounds are made whatever they take.
        least: rounds.
    """
    turns_of = {name: Contender(run) for name, run in contenders.items()}
    once = {name: _warmed(contender.run) for name, contender in turns_of.items()}
    slow_from_s = _SLOW * min(once.values(), default=0.0)
    processor, wall = dict.fromkeys(turns_of, 0.0), dict.fromkeys(turns_of, 0.0)
    gc.collect()
    gc.disable()
    try:
        begin, repetitions, offsets = time.perf_counter(), 0, random.Random(0)
        while repetitions < least or time.perf_counter() - begin < budget_s:
            taken = np.empty(offsets.randrange(_ELSEWHERE) * _PAGE, np.uint8)
            for name, contender in turns_of.items():
                slow = once[name] > slow_from_s
                if slow and repetitions % _SELDOM:
                    continue
                busy, start = time.process_time(), time.perf_counter()
                contender.turns.append(_turn(contender.run, _RUNS if not slow else 1))
                wall[name] += time.perf_counter() - start
                processor[name] += time.process_time() - busy
            repetitions += 1
            del taken
    finally:
        gc.enable()
    for name, contender in turns_of.items():
        contender.cores = processor[name] / wall[name]
    return turns_of


def _warmed(run: Callable[[], object]) -> float:
    """Compile, allocate, fill caches; the seconds of one run after that."""
    run()
    run()
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _turn(run: Callable[[], object], runs: int) -> float:
    if runs > 1:
        run()
    fastest = float("inf")
    for _ in range(runs):
        start = time.perf_counter()
        run()
        fastest = min(fastest, time.perf_counter() - start)
    return fastest
