"""Messages that say nothing to the person at the terminal, turned off for the command line."""

from __future__ import annotations

import logging
import warnings

from transformers.utils import logging as transformers_logging

_NOISE = (
    r".*isinstance\(treespec, LeafSpec\).*",  # Lightning with torch >= 2.10
    r"[\s\S]*JsonargparseDeprecationWarning[\s\S]*",  # Lightning with jsonargparse >= 4.49
    r"[\s\S]*deprecated in v4\.49\.0[\s\S]*",
    r".*have no `val_dataloader`\. Skipping val loop.*",  # a recipe without validation means it
    r".*does not have many workers.*",  # rollouts come from no workers
    # BaseModule has summed these over the ranks before it logs them.
    r".*recommended to use `self.log\('(?:train|rollout|eval|test|time)/.*sync_dist=True.*",
)


class _NoAdvertising(logging.Filter):
    """Drops Lightning's tips about products that are not installed."""

    def filter(self, record: logging.LogRecord) -> bool:
        return "💡 Tip:" not in record.getMessage()


_NO_ADVERTISING = _NoAdvertising()


def quieten() -> None:
    """Turn them off. May be called any number of times."""
    for message in _NOISE:
        warnings.filterwarnings("ignore", message=message)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_NO_ADVERTISING)
    transformers_logging.disable_progress_bar()
