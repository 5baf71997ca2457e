"""Numeric functions on tensors: no modules, no state, each tested against an independent reference."""
