"""`Progress`: how long tasks tell how far they are."""

from collections.abc import Callable
from typing import TypeAlias

# Called with a task's name, what is done of it, and all of it.
Progress: TypeAlias = Callable[[str, int, int], None]
