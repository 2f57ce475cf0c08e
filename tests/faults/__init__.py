"""Faults brought into runs of the launcher, and what becomes of them.

  python -m tests.faults [--faults=200] [--first=0] [--workers=2] [--output=...]

One process imports the launcher, and forks a child for every command, so that a
fault takes a second or two. A fault is drawn from its number alone. Whatever it
was, the same command is given again, and the run has to end as the one that met
no fault, to the bit; or it is refused in one sentence, and nothing is gone.
"""
