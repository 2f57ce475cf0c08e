"""ResNet-18."""

from collections.abc import Sequence

from bpjax import blocks


def resnet18(
    num_classes: int, stem: str = 'imagenet', norm: str = 'batch',
    activation: str = 'relu', widths: Sequence[int] = (64, 128, 256, 512),
    conv: str = 'conv', perturbation: float = .1) -> blocks.ResNet:
  """The 18-layer residual network of the ImageNet experiments.

  Deep residual learning for image recognition, He, Zhang, Ren and Sun, CVPR
  2016, table 1 (https://arxiv.org/abs/1512.03385): a stem, 4 stages of 2 blocks
  with 64, 128, 256 and 512 channels, the mean over positions, a dense readout.
  Where the shape changes, the shortcut is a 1x1 convolution and its norm.

  Parameters with norm, for 3 input channels and any image size: 11,689,512 with
  stem 'imagenet' and 1,000 classes, 11,173,962 with stem 'cifar' and 10 classes

    stem      7*7*3*64 or 3*3*3*64                              9,408 or 1,728
    stage_1   4*9*64*64                                                147,456
    stage_2   9*64*128 + 3*9*128*128 + 64*128                          524,288
    stage_3   9*128*256 + 3*9*256*256 + 128*256                      2,097,152
    stage_4   9*256*512 + 3*9*512*512 + 256*512                      8,388,608
    norms     scale and bias of 5*64 + 5*128 + 5*256 + 5*512 = 4,800     9,600
    readout   512*1000 + 1000 or 512*10 + 10                  513,000 or 5,130

  Norm 'none' has one bias in place of each scale and bias: 4,800 fewer.

  With 64 maps in every stage, stem 'cifar' and 10 classes, the network of
  Backpropagation-free deep learning with recursive local representation
  alignment, Ororbia, Mali, Kifer and Giles, AAAI 2023, Table 2 (its blocks are
  in an appendix that could not be read; these are those of He et al.): 607,050,
  or 82,762 with conv 'perturbative', whose noise is 412,672 numbers more, for
  32x32 images, that do not learn

    stem      3*3*3*64                                       1,728        1,728
    stage_1   4*9*64*64 or 4*64*64                         147,456       16,384
    others    each as stage_1, and 64*64 for a shortcut    454,656       61,440
    norms     scale and bias of 20*64 = 1,280                2,560        2,560
    readout   64*10 + 10                                       650          650

  Args:
    num_classes: number of outputs.
    stem: 'imagenet' (7x7 convolution of stride 2, 3x3 max pooling of stride 2)
      or 'cifar' (3x3 convolution) for small images.
    norm: 'batch', 'group' (groups of 8 channels), or 'none': convolutions with
      biases, and the last weights of each block start smaller by
      `1 / sqrt(number of blocks)`, so that the sums do not grow with depth.
    activation: a name that `bpjax.activations.get` knows.
    widths: channels of each stage; (64, 64, 64, 64) in the paper of 2023.
    conv: 'conv', or 'perturbative': each 3x3 convolution of the blocks is a
      `bpjax.nn.PerturbativeConv`; stem and shortcuts stay convolutions.
    perturbation: standard deviation of its noise; not in the paper.

  Returns:
    A module from images `[batch, height, width, channels]` to logits
    `[batch, num_classes]`; its call takes `train`. Units are named
    `conv_stem`, `stage_1/block_0/conv_0` (`stage_1/block_0/conv_0/conv` with
    'perturbative'), ..., `stage_2/block_0/conv_shortcut`, ..., `readout`.

  Raises:
    ValueError: for an unknown stem, norm, activation or conv, or sizes that are
      not positive.

  Example:
    >>> model = resnet18(10, stem='cifar')
    >>> small = resnet18(
    ...     10, stem='cifar', widths=(64,) * 4, conv='perturbative')
  """
  return blocks.resnet(
      num_classes, widths, 2, stem, norm, activation, 'projection', conv,
      perturbation)
