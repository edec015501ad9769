"""What kinds of layers modules are."""

from typing import Optional

from torch import nn


def features_of(module: nn.Module) -> Optional[tuple[int, int]]:
    """(out, in) features of a linear layer, None for anything else."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    if is_conv1d(module):
        inputs, outputs = module.get_parameter("weight").shape
        return outputs, inputs
    return None


def is_convolution(module: nn.Module) -> bool:
    """Whether this is a convolution of torch's own in which every output channel reads all input channels."""
    if type(module) not in (nn.Conv1d, nn.Conv2d, nn.Conv3d) or "forward" in vars(module):
        return False
    return bool(module.groups == 1) and module._parameters.get("weight") is not None


def is_conv1d(module: nn.Module) -> bool:
    """Whether this is transformers' ``Conv1D``, a linear whose weight is stored [in, out]."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")
