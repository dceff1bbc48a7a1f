"""Callbacks that switch stages, move radii, weigh classes and measure curvature while a model trains."""

from lightning_ssesam.callbacks.curvature_monitor import CurvatureMonitor
from lightning_ssesam.callbacks.deferred_reweighting import DeferredReweighting
from lightning_ssesam.callbacks.radius_schedule import RadiusSchedule
from lightning_ssesam.callbacks.stage_switch import StageSwitch
from lightning_ssesam.callbacks.switch import Switch

__all__ = ["CurvatureMonitor", "DeferredReweighting", "RadiusSchedule", "StageSwitch", "Switch"]
