"""What training would allocate and send, before anybody runs it."""

from lightning_accel.planning.plan import Plan, RowPlan, plan

__all__ = ["Plan", "RowPlan", "plan"]
