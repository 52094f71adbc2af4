"""Fitting the models to the memory at hand: plans, what they need, and carrying one out."""
