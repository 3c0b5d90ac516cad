"""What is new of a request."""

from __future__ import annotations

from dataclasses import dataclass, field

from d2f.engine.request import BlockView, GenerationResult


@dataclass(frozen=True, kw_only=True, slots=True)
class Update:
    """A request as it stands after a step of the engine.

    Example:
        >>> Update(seconds=0.5, waited=0.1, num_forwards=2, token_ids=[4, 5]).done
        False
    """

    seconds: float = 0.0
    """Since the request's first step began; 0 before that."""
    waited: float = 0.0
    """Seconds between its submission and its first step."""
    num_forwards: int = 0
    """Model calls so far."""
    token_ids: list[int] = field(default_factory=list)
    """Committed so far: the response up to its first gap."""
    blocks: list[BlockView] = field(default_factory=list)
    """The response's blocks; of watched requests only."""
    result: GenerationResult | None = None
    """Set in the last update of a request that is done."""
    error: Exception | None = None
    """Set in the last update of a request that failed."""

    @property
    def done(self) -> bool:
        """Whether no other update follows."""
        return self.result is not None or self.error is not None
