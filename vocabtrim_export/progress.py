"""`Progress`: how long tasks tell how far they are."""

from collections.abc import Callable
from typing import TypeAlias

# Called with a task's name, what is done of it, and all of it.
Progress: TypeAlias = Callable[[str, int, int], None]
# Called with the bytes that are done of one task, and all of its bytes.
BytesDone: TypeAlias = Callable[[int, int], None]
