"""The numbers of parameters of layers, of which configurations sum up those of their models."""


def dense(inputs: int, outputs: int, bias: bool = True) -> int:
    """The parameters of a dense layer.

    Example:
        >>> dense(2, 3), dense(2, 3, bias=False)
        (9, 6)
    """
    return (inputs + bias) * outputs
