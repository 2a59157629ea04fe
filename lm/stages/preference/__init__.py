"""A policy learns from given preferences: DPO, IPO, KTO, ORPO, SimPO."""
