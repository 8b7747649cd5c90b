"""The number of parameters of a layer; configurations add these up to that of their model."""


def dense(inputs: int, outputs: int, bias: bool = True) -> int:
    """The parameters of a dense layer.

    Example:
        >>> dense(2, 3), dense(2, 3, bias=False)
        (9, 6)
    """
    return (inputs + bias) * outputs
