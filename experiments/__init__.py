"""Launchers: train, sweep and evaluate the rules of bpjax on real data."""
