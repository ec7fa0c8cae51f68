"""Prints the peak extra memory of several calls as a JSON list; a process of its own, for run.py.

    python bench/peak_memory.py THREADS JOBS

JOBS is a JSON list of objects: subject "loss" with a case and an implementation, or subject "step"
with a workload and an implementation. Each is measured in a fork, made before any thread is
started: it finds the modules imported and nothing of the other calls' memory.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import harness  # noqa: F401  first of all: it sets what torch reads when it is loaded

# isort: split
import bench_loss
import bench_step
import torch


def _measure(job: dict[str, Any]) -> int:
    if job["subject"] == "loss":
        case = bench_loss.Case.from_json(job["of"])
        return bench_loss.peak_memory(case, job["implementation"], "cpu")
    workload = bench_step.Workload.from_json(job["of"])
    return bench_step.peak_memory(workload, job["implementation"], "cpu")


def _in_fork(job: dict[str, Any]) -> int:
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        # Whatever happens, this process must not go on with its parent's list.
        status = 1
        try:
            os.write(writing, str(_measure(job)).encode())
            status = 0
        finally:
            sys.stderr.flush()
            os._exit(status)
    os.close(writing)
    with os.fdopen(reading) as answer:
        text = answer.read()
    _, status = os.waitpid(child, 0)
    if status or not text:
        raise RuntimeError(f"peak memory: {job} failed in its process (status {status})")
    return int(text)


def main() -> int:
    threads, jobs = sys.argv[1:]
    torch.set_num_threads(int(threads))
    if any(job["subject"] == "step" for job in json.loads(jobs)):
        bench_step.why_no_networks()  # imports timm, once
    print(json.dumps([_in_fork(job) for job in json.loads(jobs)]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
