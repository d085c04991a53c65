"""The endless stream of training prompts."""

from __future__ import annotations

from rlhf_lightning.core.distributed import rank, world_size
from rlhf_lightning.core.seeding import permutation


class PromptStream:
    """One random order of all prompts after another, without end.

    A place in the stream is a pure function of the phase, so there is nothing to save; and phases
    take the same prompts however many processes share them.

    Args:
        prompts: how many there are.
        per_phase: how many a phase takes, over all processes.
        seed: the orders follow from it.
    """

    def __init__(self, prompts: int, per_phase: int, seed: int) -> None:
        self.prompts = prompts
        self.per_phase = per_phase
        self.seed = seed
        self._lap = -1
        self._order: list[int] = []

    def positions(self, phase: int) -> range:
        """This rank's places in the stream in a phase."""
        share = self.per_phase // world_size()
        first = phase * self.per_phase + rank() * share
        return range(first, first + share)

    def __getitem__(self, position: int) -> int:
        """Which prompt stands at a place."""
        lap, place = divmod(position, self.prompts)
        if lap != self._lap:
            self._lap = lap
            self._order = permutation(self.prompts, self.seed, "prompts", lap).tolist()
        return self._order[place]
