"""Callbacks."""

from lightning_ssesam.callbacks.stage_switch import StageSwitch

__all__ = ["StageSwitch"]
