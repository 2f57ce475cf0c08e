"""Training: the loop of the launchers, with its data, checkpoints and logs.

Needs the extra: `pip install 'bpjax[train]'`. `import bpjax` imports none of it.
"""
