"""A finished network in a form that other programs run, checked against torch, and its latency there."""
