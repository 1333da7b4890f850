# SPDX-License-Identifier: Apache-2.0
"""Time of one call on a device, without the gaps between launches where that is possible.

On a GPU the calls are captured in a CUDA graph and the graph is replayed between two events. What
cannot be captured is launched one by one between the events, gaps included, and the result says so.
On a CPU the clock on the wall is read.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from statistics import median, quantiles

import torch

Call = Callable[[], object]

# a replay should outlast the launch of its graph by far, with calls enough for an average
REPLAY_SECONDS = 2e-3
CALLS = 24
# slow calls are replayed less often, but not less than this
SLOW_SECONDS = 3.0
REPLAYS_AT_LEAST = 3
# buffers that are read in turn: together several times the 50 MB of an H100's L2 cache
COLD_BYTES = 300e6
MOST_BUFFERS = 40


@dataclass(frozen=True)
class Timing:
    """Time of one call.

    Attributes:
        us: Median over the replays, microseconds.
        p20_us: A fifth of the replays were faster.
        p80_us: A fifth of the replays were slower.
        replays: How often the calls were timed.
        calls: How many calls a replay has.
        method: "cuda graph", "eager" (launched one by one) or "wall clock".
        note: Why no graph could be captured.
    """

    us: float
    p20_us: float
    p80_us: float
    replays: int
    calls: int
    method: str
    note: str | None = None


def buffers_for(nbytes: int) -> int:
    """Returns how many buffers of `nbytes` calls must read in turn to find none of it cached."""
    return max(1, min(MOST_BUFFERS, math.ceil(COLD_BYTES / nbytes)))


def measure(calls: Sequence[Call], device: torch.device, *, replays: int = 9) -> Timing:
    """Returns the time of one of `calls`, which do the same work on buffers of their own."""
    once = _warm_up(calls, device)
    rounds = math.ceil(min(CALLS, REPLAY_SECONDS / once) / len(calls))
    batch = list(calls) * max(1, rounds)
    affordable = int(SLOW_SECONDS / (once * len(batch)))
    replays = max(REPLAYS_AT_LEAST, min(replays, affordable))
    method, note, run = _runner(batch, device)
    samples = [run() / len(batch) * 1e6 for _ in range(replays)]
    p20, *_, p80 = quantiles(samples, n=5, method="inclusive")
    return Timing(median(samples), p20, p80, replays, len(batch), method, note)


def _warm_up(calls: Sequence[Call], device: torch.device) -> float:
    """Runs some calls, so that all is compiled; returns the seconds of a later one."""
    for call in calls[:3]:
        call()
    _wait(device)
    start = time.perf_counter()
    calls[0]()
    _wait(device)
    return max(time.perf_counter() - start, 1e-6)


def _runner(batch: Sequence[Call], device: torch.device) -> tuple[str, str | None, Callable]:
    """Returns the method, a note, and what runs the batch and returns its seconds."""
    if device.type != "cuda":
        return "wall clock", None, lambda: _on_the_wall(batch)
    try:
        graph = _capture(batch)
    except Exception as error:
        # whatever an operation refuses under capture; it runs nevertheless
        with suppress(RuntimeError):
            torch.cuda.synchronize(device)
        return "eager", first_line(error), lambda: _between_events(lambda: _run(batch))
    graph.replay()
    return "cuda graph", None, lambda: _between_events(graph.replay)


def _capture(batch: Sequence[Call]) -> torch.cuda.CUDAGraph:
    # libraries set up their workspaces once for every stream: not in the capture
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        batch[0]()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        _run(batch)
    return graph


def _run(batch: Sequence[Call]) -> None:
    for call in batch:
        call()


def _between_events(run: Callable[[], object]) -> float:
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) / 1e3


def _on_the_wall(batch: Sequence[Call]) -> float:
    start = time.perf_counter()
    _run(batch)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def first_line(error: BaseException) -> str:
    """Returns the kind of an error and the first line of its message."""
    message = str(error).strip().splitlines()
    return f"{type(error).__name__}: {message[0][:200]}" if message else type(error).__name__
