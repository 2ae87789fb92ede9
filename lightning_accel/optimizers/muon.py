"""Muon for matrices, and Adam beside it for everything else."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.optim import Optimizer
from typing_extensions import override

from lightning_accel.core import register_by_tensor
from lightning_accel.optimizers.grouped import GroupedOptimizer


class MuonWithAuxAdam(GroupedOptimizer):
    """One optimizer whose parameter groups are torch's ``Muon``, ``AdamW`` or ``Adam``, with the names of DeepSpeed's.

    Muon orthogonalises the momentum of each matrix; vectors, embeddings and the like have no use for that. As one
    optimizer both have one place in Lightning's automatic optimization, one schedule and one checkpoint.

    State of a parameter: that of the class which updates it; ``momentum_buffer`` for Muon, ``step``, ``exp_avg`` and
    ``exp_avg_sq`` for Adam.

    Args:
        params: Parameter groups. Each has ``use_muon``: whether it is ``torch.optim.Muon``'s, which takes matrices
            only. The others are ``torch.optim.AdamW``'s, or with ``adam_w_mode=False`` ``torch.optim.Adam``'s. Further
            settings are those of these classes, and their defaults hold.

    Raises:
        ValueError: If a group does not say ``use_muon``, or has a parameter of Muon's that is no matrix.

    """

    def __init__(self, params: Iterable[dict[str, Any]]) -> None:
        super().__init__(params, {})

    @override
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's.

        Raises:
            ValueError: As in the constructor.

        """
        if not isinstance(param_group, dict) or not isinstance(param_group.get("use_muon"), bool):
            raise ValueError(
                "Expected each parameter group of MuonWithAuxAdam to say use_muon=True or use_muon=False, got one that"
                " does not. Pass [{'params': matrices, 'use_muon': True}, {'params': others, 'use_muon': False}]."
            )
        # The class checks shapes, and adds the settings that are missing.
        super().add_param_group(_part(param_group).param_groups[0])

    @override
    def _update_group(self, group: dict[str, Any]) -> None:
        if group["params"]:
            part = _part(group)
            part.state = self.state
            part.step()


def _part(group: dict[str, Any]) -> Optimizer:
    """The optimizer of one group; it has a copy of the group, as what torch's classes add must not come back."""
    if group["use_muon"]:
        return torch.optim.Muon([dict(group)])
    kind = torch.optim.AdamW if group.get("adam_w_mode", True) else torch.optim.Adam
    return kind([dict(group)])


register_by_tensor(MuonWithAuxAdam)
