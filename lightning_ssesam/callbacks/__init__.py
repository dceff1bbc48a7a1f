"""Callbacks that switch stages, move radii, weigh classes, end mixing, measure curvature, and correct at the end."""

from lightning_ssesam.callbacks.correct_after_training import CorrectAfterTraining
from lightning_ssesam.callbacks.curvature_monitor import CurvatureMonitor
from lightning_ssesam.callbacks.deferred_reweighting import DeferredReweighting
from lightning_ssesam.callbacks.mixing_off import MixingOff
from lightning_ssesam.callbacks.radius_schedule import RadiusSchedule
from lightning_ssesam.callbacks.stage_switch import StageSwitch
from lightning_ssesam.callbacks.switch import Switch

__all__ = [
    "CorrectAfterTraining",
    "CurvatureMonitor",
    "DeferredReweighting",
    "MixingOff",
    "RadiusSchedule",
    "StageSwitch",
    "Switch",
]
