"""`Closing`: what is closed when its `with` block is left."""

from abc import ABC, abstractmethod
from typing import Self


class Closing(ABC):
    """A context manager of itself, which closes itself at the end."""

    @abstractmethod
    def close(self) -> None:
        """Release what it holds. Calling it again does nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()
