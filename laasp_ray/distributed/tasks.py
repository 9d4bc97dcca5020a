"""Waits for an evaluation task, and converts its errors for the caller."""

from __future__ import annotations

from typing import Any

import ray

from laasp_ray.errors import SearchError

TASK_RETRIES = 5
"""The number of retries for a task whose worker or node was lost."""


def answer(reference: Any, task: str, remedy: str) -> Any:
    """Waits for the task behind `reference`. An error of the task is raised unchanged.

    Raises SearchError, naming `task` and the `remedy`, if the task was lost.
    """
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        raise error.as_instanceof_cause() from error
    except ray.exceptions.RayError as error:
        raise SearchError(
            f"{task} was not finished (one whose worker is lost is tried {TASK_RETRIES + 1} times): {error}; "
            f"if its worker ran out of memory, {remedy}"
        ) from error
