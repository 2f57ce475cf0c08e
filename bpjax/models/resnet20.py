"""ResNet-20 for small images."""

from bpjax import blocks


def resnet20(
    num_classes: int, norm: str = 'batch', activation: str = 'relu',
    shortcut: str = 'pad') -> blocks.ResNet:
  """The 20-layer residual network of the CIFAR experiments.

  Deep residual learning for image recognition, He, Zhang, Ren and Sun, CVPR
  2016, section 4.2 (https://arxiv.org/abs/1512.03385): a 3x3 convolution to 16
  channels, 3 stages of 3 blocks with 16, 32 and 64 channels, the mean over
  positions, a dense readout.

  Parameters for 3 input channels and 10 classes, for any image size (the paper:
  0.27M): 269,722 with norm and shortcut 'pad'

    stem      3*3*3*16                                       432
    stage_1   6*9*16*16                                   13,824
    stage_2   9*16*32 + 5*9*32*32                         50,688
    stage_3   9*32*64 + 5*9*64*64                        202,752
    norms     scale and bias of 7*16 + 6*32 + 6*64 = 688   1,376
    readout   64*10 + 10                                     650

  and 272,474 with shortcut 'projection' (16*32 + 32*64 weights and the norms of
  32 + 64 channels more, 2,752). Norm 'none' has one bias in place of each scale
  and bias: 269,034 with shortcut 'pad'.

  Args:
    num_classes: number of outputs.
    norm: 'batch', 'group' (groups of 8 channels), or 'none': convolutions with
      biases, and the last weights of each block start smaller by
      `1 / sqrt(number of blocks)`, so that the sums do not grow with depth.
    activation: a name that `bpjax.activations.get` knows.
    shortcut: where the shape changes: 'pad' (the paper's option A: every second
      position, zeros for the new channels, no parameters) or 'projection'
      (option B: a 1x1 convolution and its norm).

  Returns:
    A module from images `[batch, height, width, channels]` to logits
    `[batch, num_classes]`; its call takes `train`. Units are named
    `conv_stem`, `stage_1/block_0/conv_0`, ..., `readout`.

  Raises:
    ValueError: for an unknown norm, activation or shortcut.

  Example:
    >>> model = resnet20(10, norm='group', activation='tanh')
  """
  return blocks.resnet(
      num_classes, (16, 32, 64), 3, 'cifar', norm, activation, shortcut)
