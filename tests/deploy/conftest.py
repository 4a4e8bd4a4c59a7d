"""The serving tests' questions and the eager model's answers."""

from tests.serving.conftest import eager, photos

__all__ = ["eager", "photos"]
