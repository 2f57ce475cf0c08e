"""ResNet-56 for small images."""

from bpjax import blocks


def resnet56(
    num_classes: int, norm: str = 'batch', activation: str = 'relu',
    shortcut: str = 'pad') -> blocks.ResNet:
  """The 56-layer residual network of the CIFAR experiments.

  As `bpjax.models.resnet20`, with 9 blocks in each of the 3 stages. He, Zhang,
  Ren and Sun, 2016, section 4.2 (https://arxiv.org/abs/1512.03385).

  Parameters for 3 input channels and 10 classes, for any image size (the paper:
  0.85M): 853,018 with norm and shortcut 'pad'

    stem      3*3*3*16                                            432
    stage_1   18*9*16*16                                       41,472
    stage_2   9*16*32 + 17*9*32*32                            161,280
    stage_3   9*32*64 + 17*9*64*64                            645,120
    norms     scale and bias of 19*16 + 18*32 + 18*64 = 2,032   4,064
    readout   64*10 + 10                                          650

  and 855,770 with shortcut 'projection' (2,752 more). Norm 'none' has one bias
  in place of each scale and bias: 850,986 with shortcut 'pad'.

  Args:
    num_classes: number of outputs.
    norm: 'batch', 'group' (groups of 8 channels), or 'none': convolutions with
      biases, and the last weights of each block start smaller by
      `1 / sqrt(number of blocks)`, so that the sums do not grow with depth.
    activation: a name that `bpjax.activations.get` knows.
    shortcut: where the shape changes: 'pad' (the paper's option A, no
      parameters) or 'projection' (option B: a 1x1 convolution and its norm).

  Returns:
    A module from images `[batch, height, width, channels]` to logits
    `[batch, num_classes]`; its call takes `train`. Units are named
    `conv_stem`, `stage_1/block_0/conv_0`, ..., `readout`.

  Raises:
    ValueError: for an unknown norm, activation or shortcut.

  Example:
    >>> model = resnet56(10, norm='none')
  """
  return blocks.resnet(
      num_classes, (16, 32, 64), 9, 'cifar', norm, activation, shortcut)
