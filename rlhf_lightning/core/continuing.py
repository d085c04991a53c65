"""Whether a run can go on from the checkpoint that it was given."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from rlhf_lightning.core.reading import CHECKPOINT_KEY, LAYOUT, read_checkpoint

ModuleT = TypeVar("ModuleT", bound=LightningModule)

_SHOWN = 3


def check_weights_fit(checkpoint: Mapping[str, Any], module: LightningModule) -> None:
    """Refuse the weights of another model, before torch lists all of their names.

    Args:
        checkpoint: the checkpoint (of a sharded strategy it may hold no weights here).
        module: the module that is to take them.

    Raises:
        ValueError: naming the first parameters that differ, with both shapes.
    """
    saved = checkpoint.get("state_dict") or {}
    wanted = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in saved.items() if isinstance(value, Tensor)}
    names = dict.fromkeys((*wanted, *found)) if module.strict_loading else wanted.keys() & found
    differences = [
        f"{name} is {_shape(found.get(name))} in the checkpoint and {_shape(wanted.get(name))} here"
        for name in names
        if found and wanted.get(name) != found.get(name)
    ]
    if differences:
        shown = "; ".join(differences[:_SHOWN])
        more = f"; and {len(differences) - _SHOWN} more" if len(differences) > _SHOWN else ""
        raise ValueError(
            f"ckpt_path: the checkpoint is of another model or vocabulary: {shown}{more}. Give the"
            " model that it was trained with"
        )


def check_whole(checkpoint: Mapping[str, Any], module: LightningModule) -> None:
    """Refuse to train on from a checkpoint that lacks what this takes (other uses need less).

    Args:
        checkpoint: the checkpoint.
        module: the module that is to continue it.

    Raises:
        ValueError: if it holds only weights, or is of another version of this package.
    """
    trainer: Any = module._trainer
    if trainer is None or trainer.state.fn != "fit":
        return
    layout = checkpoint.get(CHECKPOINT_KEY, {}).get("layout", 1)
    if layout != LAYOUT:
        which = "an earlier" if layout < LAYOUT else "a later"
        raise ValueError(
            f"ckpt_path: the checkpoint was written by {which} version of rlhf_lightning (layout"
            f" {layout}; this one has {LAYOUT}), which keeps the state of a run in another way."
            " Finish the run with that version, or start anew from its weights: `rlhf-lightning"
            " export` makes a folder of them, to be given as model"
        )
    if not trainer.strategy.lightning_restore_optimizer:  # it keeps these elsewhere
        return
    wanted = ("loops", "optimizer_states", "lr_schedulers", "callbacks")
    missing = [name for name in wanted if name not in checkpoint]
    if missing:
        raise ValueError(
            f"ckpt_path: the checkpoint lacks {', '.join(missing)}, so training cannot go on from"
            " it (save_weights_only writes such files). To start anew from its weights, export them"
            " and give the folder as model"
        )


def check_optimizers(states: list[dict[str, Any]], optimizers: Iterable[Optimizer]) -> None:
    """Refuse the state of another optimizer, and say which options stay the checkpoint's.

    Args:
        states: the checkpoint's ``optimizer_states``.
        optimizers: the new run's, before they take their state.

    Raises:
        ValueError: if they are of another kind, or their groups have other sizes.
    """
    for state, optimizer in zip(states, optimizers, strict=False):
        name = type(optimizer).__name__
        groups, wanted = state["param_groups"], optimizer.param_groups
        sizes = [[len(group["params"]) for group in side] for side in (groups, wanted)]
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"ckpt_path: the checkpoint's optimizer has groups of {sizes[0]} parameters, the"
                f" {name} of this run {sizes[1]}. Train the same parameters in the same groups"
            )
        for old, new in zip(groups, wanted, strict=True):
            strange = sorted(set(new) - set(old))
            if strange:
                raise ValueError(
                    f"ckpt_path: the checkpoint is of another optimizer: it has no option {strange}"
                    f" of {name}. Resume with the optimizer it was trained with"
                )
            _report_options(old, new, name)


def _report_options(old: dict[str, Any], new: dict[str, Any], name: str) -> None:
    # a schedule has moved the rate since, but not where it started from
    moved = {"lr", "initial_lr"} if "initial_lr" in old or "initial_lr" in new else set()
    starts = [group.get("initial_lr", group["lr"]) for group in (old, new) if "lr" in group]
    changes = [
        f"{key} {old[key]} (now {new[key]})"
        for key in new
        if key not in {"params", "name", *moved} and old[key] != new[key]
    ]
    if moved and len(set(map(float, starts))) > 1:
        changes.append(f"initial lr {float(starts[0])} (now {float(starts[1])})")
    if changes:
        rank_zero_warn(
            f"ckpt_path: {name} goes on with the checkpoint's {', '.join(changes)}: options of an"
            " optimizer are part of its state. To change them, set optimizer.param_groups in"
            " on_train_start"
        )


def load_module(
    cls: type[ModuleT],
    path: str | Path,
    map_location: Any,
    strict: bool | None,
    options: Mapping[str, Any],
) -> ModuleT:
    """A module with the options and the weights of a checkpoint, and nothing else of it.

    Options that a checkpoint describes by a class path (an optimizer, say) are not built from it:
    they keep the constructor's defaults.

    Args:
        cls: the module's class.
        path: the checkpoint.
        map_location: as of ``torch.load``.
        strict: whether all weights must match.
        options: constructor arguments that replace the checkpoint's.
    """
    checkpoint = read_checkpoint(path, map_location)
    saved = checkpoint.get("hyper_parameters") or {}
    known = inspect.signature(cls).parameters
    plain = {k: v for k, v in saved.items() if k in known and not _is_class(v)}
    module = cls(**{**plain, **options})
    module.configure_model()
    module.on_load_checkpoint(checkpoint)
    module.load_state_dict(checkpoint["state_dict"], strict=strict is not False)
    return module


def _is_class(value: Any) -> bool:
    return isinstance(value, Mapping) and "class_path" in value


def _shape(shape: tuple[int, ...] | None) -> str:
    return "missing" if shape is None else str(list(shape))
