"""The numbers of parameters of layers, of which configurations sum up those of their models."""


def dense(inputs: int, outputs: int, bias: bool = True) -> int:
    """The parameters of a dense layer.

    Example:
        >>> dense(2, 3), dense(2, 3, bias=False)
        (9, 6)
    """
    return (inputs + bias) * outputs


def block(width: int, inner: int) -> int:
    """The parameters of a block: four projections, two dense layers and two norms, all with biases.

    Args:
        width: the width of the hidden states.
        inner: the width inside the feed-forward.

    Example:
        >>> block(768, 3072)
        7087872
    """
    attention = 4 * dense(width, width)
    return attention + dense(width, inner) + dense(inner, width) + 2 * 2 * width
