"""Training: what a step computes, and the loop that takes the steps."""
