"""Scorers: trained models and baselines behind one interface."""
