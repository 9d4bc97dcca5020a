"""The answer of an evaluation task, or what went wrong in the terms of whoever asked."""

from __future__ import annotations

from typing import Any

import ray

from laasp_ray.errors import SearchError

TASK_RETRIES = 5
"""How often a task whose worker or node was lost is run again."""


def answer(reference: Any, task: str, remedy: str) -> Any:
    """Waits for the task behind `reference`. What it raised is raised here as it was; SearchError, naming `task` and
    the `remedy`, when it was lost."""
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        raise error.as_instanceof_cause() from error
    except ray.exceptions.RayError as error:
        raise SearchError(
            f"{task} was not finished (one whose worker is lost is tried {TASK_RETRIES + 1} times): {error}; "
            f"if its worker ran out of memory, {remedy}"
        ) from error
