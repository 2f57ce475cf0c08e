"""The theory of feedback alignment: pure functions beside the framework.

Align, then memorise: dynamics of learning with feedback alignment, Refinetti,
d'Ascoli, Ohana and Goldt, ICML 2021 (https://arxiv.org/abs/2011.12428).

`import bpjax` does not import this package. Notation is the papers': columns,
W_l of shape [n_l, n_{l-1}] and F_l of shape [n_l, C], where Flax keeps their
transposes as kernels and as `feedback`. Only `teacher_student.integrate` needs
diffrax: `pip install 'bpjax[theory]'`.
"""

from bpjax.theory import alignment
from bpjax.theory import convolution
from bpjax.theory import linear
from bpjax.theory import teacher_student

__all__ = ('alignment', 'convolution', 'linear', 'teacher_student')
